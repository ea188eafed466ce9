"""The whole flow on a real model: a graft, ElChat's way, and tuning on the language's own instructions, side by side.

    python benchmarks/language_flow.py --out runs/language-flow [--model DIR] [--add N] [--seed S] [--do STEP]

chat      base tuned on English instructions
adapted   base continued on Malay, a tenth of English beside it; with --add, after it gained so many Malay tokens, so
          that chat is grafted across tokenizers; rows stay as they begin, since no new one is read often enough
grafted   adapted + chat - base; no training; with --scale beside it, as grafted-0.5, adapted + 0.5 * (chat - base)
elchat    chat continued on Malay as base was, then mixed half and half with chat and given the rows of chat's
          template, which is what `lapis adapt --onto chat` does (ElChat, arXiv:2412.11704)
tuned     adapted tuned on Malay instructions: what the others are measured against

Every training has the same processor seconds on one thread. Scored on documents and chats that no step reads, replies
in bits per byte too, which compare across tokenizers. The gap closed is the share of the way from adapted's to tuned's,
for ElChat's way, too, as on a card of both; the cost is what English text takes in bits.
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from language_real import CONTEXT, DOCUMENTS, PRECISION
from language_runs import (
    DATA,
    ENGLISH,
    HELD_ENGLISH,
    bits_per_byte,
    held_out,
    keep,
    kept,
    mixture,
    models_folder,
    paces,
    run,
    say,
    seconds_of,
    table,
)

import lapis
from lapis.evaluation.chats import answer, score_chats
from lapis.text.corpus import corpus

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else "
    "'user' }}\n{{ message.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n"
    "{% endif %}"
)  # Gemma's turns, for a base that has no template
KINDS = {"en": ("instruction", "expert"), "ms": None}  # tasks of the instructions that are learned; None: all
REPLY = 32  # tokens of an answer
BYTES_PER_CHAT = 333  # of text that are scored for each chat that is
SHORT = 1500  # characters of a chat at most
TRAINED = ("chat", "adapted", "elchat-trained", "tuned")
MALAY = DATA / "corpus/ms/train.jsonl"


class Flow:
    """The models of a flow, in a folder. seconds: of the processor, for each training. batch: Rows of a step. add:
    Tokens that adapted gains. scored: Chats of each language, of which a third is answered. seed: Of each training.
    scales: Of further grafts."""

    def __init__(
        self, root: Path, base: Path, seconds: float, lr: float, *, batch: int, add: int, scored: int, seed: int,
        scales: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.root, self.base, self.seconds, self.lr = root, base, seconds, lr
        self.batch, self.add, self.scored, self.seed = batch, add, scored, seed
        self.grafts = {"grafted": 1.0} | {f"grafted-{scale:g}": scale for scale in scales}
        root.mkdir(parents=True, exist_ok=True)
        self.chats = {code: self._chats(code, "") for code in KINDS}
        if add and not (root / "start").is_dir():
            say(f"extending {root / 'start'}")
            lapis.extend(base, [MALAY], root / "start", add=add, init="calibrated", replay=[ENGLISH])

    def _templated(self, model: Path) -> Path:
        """A model's tokenizer with a chat template: its own folder, or a copy where it has none."""
        if lapis.Tokenizer.open(model).chat_template is not None:
            return model
        copy = self.root / f"tokenizer-{model.name}"
        copy.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(model / name, copy / name)
        (copy / "chat_template.jinja").write_text(TEMPLATE)
        return copy

    def _chats(self, code: str, part: str) -> Path:
        """The instructions of a language that are used, in a random order."""
        place = self.root / f"{code}{part}.jsonl"
        if not place.exists():
            rows = map(json.loads, (DATA / f"instruct/{code}{part}.jsonl").read_text(encoding="utf-8").splitlines())
            kinds = KINDS[code]
            used = [{"messages": row["messages"]} for row in rows if kinds is None or row["task"] in kinds]
            used = [row for row in used if sum(len(message["content"]) for message in row["messages"]) < SHORT]
            Random(0).shuffle(used)
            place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in used), encoding="utf-8")
        return place

    def settings(self, name: str) -> dict[str, Any]:
        """Of a training, but for its length."""
        start = {"tuned": self.root / "adapted", "elchat-trained": self.root / "chat"}.get(name, self.base)
        if name == "adapted" and self.add:
            start = self.root / "start"
        shared = {"context": CONTEXT, "batch": self.batch, "lr": self.lr, "log_every": 5,
                  "precision": PRECISION, "seed": self.seed}  # fmt: skip
        if name in ("chat", "tuned"):
            code = "ms" if name == "tuned" else "en"
            how = {"objective": "chat", "data": [str(self.chats[code])], "tokenizer": str(self._templated(start))}
        else:
            how = {"data": mixture([MALAY], 0.1)}
        if name == "adapted" and self.add:
            how["freeze"] = ["embed"]
        return {"model": str(start), **shared, **how}

    def train(self) -> None:
        pace = paces(self.root / "paces.json", {name: self.settings(name) for name in ("chat", "adapted")})
        say(f"seconds per step {pace}")
        for name in TRAINED:
            seconds = pace["chat" if name in ("chat", "tuned") else "adapted"]
            run(self.root / name, **self.settings(name), steps=max(1, round(self.seconds / seconds)))
        for name, scale in self.grafts.items():
            if not (self.root / name).is_dir():
                lapis.graft(self.base, self.root / "chat", self.root / "adapted", self.root / name, scale)
        if not (self.root / "elchat").is_dir():
            mixed, chat = self.root / "elchat-mixed", self.root / "chat"
            if not mixed.is_dir():
                lapis.merge(f'0.5 * "{self.root / "elchat-trained"}" + 0.5 * "{chat}"', mixed)
            lapis.graft(chat, chat, mixed, self.root / "elchat", 0.0)

    def scores(self) -> dict[str, dict[str, Any]]:
        """Of the models that are there."""
        places = {"base": self.base} | {
            name: self.root / name for name in ("chat", "adapted", *self.grafts, "elchat-trained", "elchat", "tuned")
        }
        files = {"ms": DATA / "corpus/ms/valid.jsonl", "en": HELD_ENGLISH}
        texts = {name: held_out([file], self.scored * BYTES_PER_CHAT, DOCUMENTS) for name, file in files.items()}
        found = {}
        for name, place in places.items():
            if place.is_dir():
                found[name] = kept(self.root / f"scores-{name}.json", lambda: self._score(place, texts))  # noqa: B023
                say(f"scored {name}")
        return found

    def _score(self, place: Path, texts: dict[str, list[str]]) -> dict[str, Any]:
        scores: dict[str, Any] = bits_per_byte(place, texts, CONTEXT)
        model, tokenizer = lapis.load(place)
        if tokenizer.chat_template is None:
            tokenizer.templates["default"] = TEMPLATE
        for code in KINDS:
            chats = list(islice(corpus.chats([self._chats(code, ".valid")]), self.scored))
            replies = answer(model, tokenizer, chats[: -(-self.scored // 3)], max_tokens=REPLY)
            part = score_chats(model, tokenizer, chats, replies=replies)
            if part["cut"]:  # models would be measured on different chats, and bits would be of a part of the bytes
                raise SystemExit(f"{place}: {part['cut']} of the chats do not fit; lower SHORT")
            size = sum(len(each["content"].encode()) for chat in chats for each in chat.messages
                       if each["role"] == "assistant")  # fmt: skip
            bits = part["response_nll"] * part["tokens"] / math.log(2) / size
            scores |= {f"{code} bits of replies": bits, f"{code} stops": part["stop_rate"],
                       f"{code} replies": [reply.text for reply in replies if reply]}  # fmt: skip
        return scores


def lines(flow: Flow) -> list[str]:
    """The table of a flow."""
    scores = flow.scores()
    base = scores["base"]
    rows = []
    for name, found in scores.items():
        span = scores["adapted"]["ms bits of replies"] - scores["tuned"]["ms bits of replies"]
        gap = (scores["adapted"]["ms bits of replies"] - found["ms bits of replies"]) / span
        trained = seconds_of(flow.root / name) if name in TRAINED else []
        rows.append([
            name, *(f"{found[f'{code} bits of replies']:.3f}" for code in KINDS), f"{gap:.2f}",
            *(f"{found[f'{code} stops']:.2f}" for code in KINDS), f"{found['ms']:.3f}", f"{found['en']:.3f}",
            f"{found['en'] / base['en'] - 1:+.1%}", str(len(trained) or ""), f"{sum(trained):.0f}" if trained else "",
        ])  # fmt: skip
    head = ["model", "replies en", "replies ms", "gap closed, ms", "stops en", "stops ms", "bits ms", "bits en", "cost",
            "steps", "processor s"]  # fmt: skip
    added = f", adapted with {flow.add:,} new tokens" if flow.add else ""
    how = f"{flow.base.name}{added}, {flow.seconds:.0f} processor seconds for each training, seed {flow.seed}."
    return [how, "", *table(head, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/language-flow"))
    parser.add_argument("--model", type=Path, help="its folder; smollm2-it of LAPIS_MODELS without it")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--add", type=int, default=0, help="Malay tokens that adapted gains")
    parser.add_argument("--scored", type=int, default=24, help="chats of each language that are scored")
    parser.add_argument("--seed", type=int, default=0, help="of each training; each with an --out of its own")
    parser.add_argument("--scale", type=float, nargs="*", default=[], help="of further grafts")
    parser.add_argument("--do", choices=["train", "score", "write"], help="one of the steps; all without it")
    options = parser.parse_args()
    flow = Flow(options.out, options.model or models_folder() / "smollm2-it", options.seconds, options.lr,
                batch=options.batch, add=options.add, scored=options.scored, seed=options.seed,
                scales=options.scale)  # fmt: skip
    if options.do in ("train", None):
        flow.train()
    if options.do != "train":
        text = lines(flow) if (flow.root / "tuned").is_dir() else [str(flow.scores())]
        print("\n".join(text))
    if options.do == "write":
        keep(__file__, "The whole flow", ["", *text])


if __name__ == "__main__":
    main()
