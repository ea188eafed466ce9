"""The whole flow on a real model: a graft, ElChat's way, and tuning on the language's own instructions, side by side.

    python benchmarks/language_flow.py --out runs/language-flow [--model DIR] [--do train|score|write]

chat      base tuned on English instructions
adapted   base continued on Malay, a tenth of English beside it
grafted   adapted + chat - base; no training
elchat    chat continued on Malay as base was, then mixed half and half with chat and given the rows of chat's
          template, which is what `lapis adapt --onto chat` does (ElChat, arXiv:2412.11704)
tuned     adapted tuned on Malay instructions: what the others are measured against

Every training has the same processor seconds on one thread. Scored on documents and chats that no step reads. The gap
closed is the share of the way from adapted's response NLL to tuned's; the cost is what English text takes in bits.
"""

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from language_real import CONTEXT, DOCUMENTS
from language_runs import (
    DATA,
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
SCORED, ANSWERED, REPLY = 24, 8, 32  # chats, chats that are answered, and tokens of an answer
HELD_BYTES = 8_000
SHORT = 1500  # characters of a chat at most
TRAINED = ("chat", "adapted", "elchat-trained", "tuned")


class Flow:
    """The models of a flow, in a folder. seconds: of the processor, for each training."""

    def __init__(self, root: Path, base: Path, seconds: float, lr: float) -> None:
        self.root, self.base, self.seconds, self.lr = root, base, seconds, lr
        root.mkdir(parents=True, exist_ok=True)
        self.chats = {code: self._chats(code, "") for code in KINDS}
        self.tokenizer = base
        if lapis.Tokenizer.open(base).chat_template is None:
            self.tokenizer = root / "tokenizer"
            self.tokenizer.mkdir(exist_ok=True)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(base / name, self.tokenizer / name)
            (self.tokenizer / "chat_template.jinja").write_text(TEMPLATE)

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
        shared = {"context": CONTEXT, "batch": 2, "lr": self.lr, "log_every": 5}
        if name in ("chat", "tuned"):
            code = "ms" if name == "tuned" else "en"
            how = {"objective": "chat", "data": [str(self.chats[code])], "tokenizer": str(self.tokenizer)}
        else:
            how = {"data": mixture([DATA / "corpus/ms/train.jsonl"], 0.1)}
        return {"model": str(start), **shared, **how}

    def train(self) -> None:
        pace = paces(self.root / "paces.json", {name: self.settings(name) for name in ("chat", "adapted")})
        say(f"seconds per step {pace}")
        for name in TRAINED:
            seconds = pace["chat" if name in ("chat", "tuned") else "adapted"]
            run(self.root / name, **self.settings(name), steps=max(1, round(self.seconds / seconds)))
        if not (self.root / "grafted").is_dir():
            lapis.graft(self.base, self.root / "chat", self.root / "adapted", self.root / "grafted")
        if not (self.root / "elchat").is_dir():
            mixed, chat = self.root / "elchat-mixed", self.root / "chat"
            if not mixed.is_dir():
                lapis.merge(f'0.5 * "{self.root / "elchat-trained"}" + 0.5 * "{chat}"', mixed)
            lapis.graft(chat, chat, mixed, self.root / "elchat", 0.0)

    def scores(self) -> dict[str, dict[str, Any]]:
        """Of the models that are there."""
        places = {"base": self.base} | {
            name: self.root / name for name in ("chat", "adapted", "grafted", "elchat-trained", "elchat", "tuned")
        }
        texts = {"ms": held_out([DATA / "corpus/ms/valid.jsonl"], HELD_BYTES, DOCUMENTS),
                 "en": held_out([HELD_ENGLISH], HELD_BYTES, DOCUMENTS)}  # fmt: skip
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
            tokenizer.templates["default"] = lapis.Tokenizer.open(self.tokenizer).templates["default"]
        for code in KINDS:
            chats = list(islice(corpus.chats([self._chats(code, ".valid")]), SCORED))
            replies = answer(model, tokenizer, chats[:ANSWERED], max_tokens=REPLY)
            part = score_chats(model, tokenizer, chats, replies=replies)
            scores |= {f"{code} nll": part["response_nll"], f"{code} stops": part["stop_rate"],
                       f"{code} replies": [reply.text for reply in replies if reply]}  # fmt: skip
        return scores


def lines(flow: Flow) -> list[str]:
    """The table of a flow."""
    scores = flow.scores()
    base = scores["base"]
    rows = []
    for name, found in scores.items():
        gap = {}
        for code in KINDS:
            span = scores["adapted"][f"{code} nll"] - scores["tuned"][f"{code} nll"]
            gap[code] = (scores["adapted"][f"{code} nll"] - found[f"{code} nll"]) / span
        trained = seconds_of(flow.root / name) if name in TRAINED else []
        rows.append([
            name, *(f"{found[f'{code} nll']:.3f}" for code in KINDS), f"{gap['ms']:.2f}",
            *(f"{found[f'{code} stops']:.2f}" for code in KINDS), f"{found['ms']:.3f}", f"{found['en']:.3f}",
            f"{found['en'] / base['en'] - 1:+.1%}", str(len(trained) or ""), f"{sum(trained):.0f}" if trained else "",
        ])  # fmt: skip
    head = ["model", "NLL en", "NLL ms", "gap closed, ms", "stops en", "stops ms", "bits ms", "bits en", "cost",
            "steps", "processor s"]  # fmt: skip
    return [f"{flow.base.name}, {flow.seconds:.0f} processor seconds for each training.", "", *table(head, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/language-flow"))
    parser.add_argument("--model", type=Path, help="its folder; smollm2-it of LAPIS_MODELS without it")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--do", choices=["train", "score", "write"], help="one of the steps; all without it")
    options = parser.parse_args()
    flow = Flow(options.out, options.model or models_folder() / "smollm2-it", options.seconds, options.lr)
    if options.do in ("train", None):
        flow.train()
    if options.do != "train":
        text = lines(flow) if (flow.root / "tuned").is_dir() else [str(flow.scores())]
        print("\n".join(text))
    if options.do == "write":
        keep(__file__, "The whole flow", ["", *text])


if __name__ == "__main__":
    main()
