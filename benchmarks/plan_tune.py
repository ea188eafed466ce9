"""Style, knowledge and grafting on the base: what a plan's quarter of the parameters does, beside other quarters.

    python benchmarks/plan_tune.py --seed 0 [--only style|real|knowledge|base|pool] [--data $LAPIS_DATA] [--out DIR]
    python benchmarks/plan_tune.py --table            medians over the seeds that are there

A small base reads real English and the built-in world (some 160 facts of 60 people); chat is base tuned on chats of
that world. Then, from the same starts with the same steps, all of the model or only what a rule picks:

style      base is tuned on the world's chats: held-out replies, real text, recall of planted facts
real       base is tuned on real instructions (1,132), and asked about held-out ones
knowledge  chat reads of 500 new facts (a second world) with old text mixed in
base       base reads of them instead, and the difference is grafted onto chat
pool       more quarters are tuned as in style: what foretells what tuning a set does (correlations)

Rules: plan (lapis plan), random quarters, magnitude (largest |chat - base| / |base|), snr
(Spectrum, 2406.06623: the best signal-to-noise ratio, for each kind of matrix), middle (2604.11838: layers from 20 to
80 %, half of the parameters), ila (after 2410.17875: the largest of masks that are learned for the pieces' differences
to make replies likely), scales (the same, while text may get 5 % harder). The
template's token rows are trained with every rule. The rate of full tuning is the best of three by the chats that the
plan looks at, which name other people than those that are scored. Models that are there are not trained again.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import time
from itertools import islice
from pathlib import Path
from random import Random
from statistics import correlation, median

import torch

import lapis
from lapis.evaluation.chats import answer, score_chats
from lapis.evaluation.choices import Choice, score_choices
from lapis.evaluation.text import score_text
from lapis.families.base import Part
from lapis.families.config import ModelConfig
from lapis.families.patterns import covered_parts
from lapis.model.transformer import Transformer
from lapis.planning.choice import at_random, learn_scales, worth
from lapis.planning.choice import choose as pick
from lapis.planning.effects import Effects, measure_set
from lapis.planning.held_out import Runner, make_held_out
from lapis.planning.inputs import template_rows
from lapis.planning.pieces import Bench, pieces_of
from lapis.text.corpus import corpus
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.tour.narration import Teller
from lapis.tour.people import Person
from lapis.tour.world import World, score, words_of
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.objectives.supervised.next_token import Causal, Chat
from lapis.training.setup.select import choose
from lapis.training.setup.start import FRESH, zero_outputs

PEOPLE, NEW_FACTS, CONTEXT, VOCABULARY = 60, 500, 256, 2048
SHAPE = {"dim": 128, "layers": 8, "heads": 4, "kv_heads": 2, "ffn_dim": 352, "context": CONTEXT, "tied": True,
         "family": "qwen3", "qk_norm": True}  # fmt: skip
STEPS = {"base": 1000, "style": 120, "real": 120, "knowledge": 400, "longer": 800}
FULL = {"style": (6e-4, 1e-3, 2e-3), "real": (1e-3, 2e-3, 3e-3), "knowledge": (2e-3,)}
PART = {"style": 3e-3, "real": 1e-2, "knowledge": 6e-3}  # best of 1, 3, 6 and 10e-3 for a random quarter, seed 0
RULES = {
    "style": ("all", "plan", "random-0", "random-1", "magnitude", "snr", "middle", "ila", "scales"),
    "real": ("all", "plan", "random-0", "magnitude"),
    "knowledge": ("all", "plan", "random-0", "magnitude", "middle"),
}
LIMITS = {"ila": 10.0, "scales": 0.05}  # how much harder text may get while scales are learned
BUDGET = 0.25


class NewWorld(World):
    """A second world's people whom the first does not know, as many as have NEW_FACTS facts: all of them are new."""

    @property
    def everyone(self) -> tuple[Person, ...]:
        known = {person.name for person in World(self.seed - 1000, PEOPLE).everyone}
        people = World(self.seed, 200).everyone
        names = {person.name for person in people} - known
        new = [p for p in people if p.name in names and p.facts.get("sibling", p.name) in names]
        return tuple(new[: NEW_FACTS // 4])


def facts(world: World, people: list[Person], seed: int) -> list[Choice]:
    """For every fact the sentence that states it, among three that state another value of its kind."""
    teller = Teller(words_of("en"), world.everyone)
    random, questions = Random(seed), []
    slot = {"home": "place", "sibling": "other"}
    for person in people:
        own = teller.facts[person.name]
        for relation in person.facts:
            key = slot.get(relation, relation)
            values = sorted({other[key] for other in teller.facts.values() if key in other} - {own[key], own["who"]})
            said = [teller.state(relation, own | {key: value}) for value in [own[key], *random.sample(values, 3)]]
            order = random.sample(range(4), 4)
            questions.append(Choice("", tuple(said[i] for i in order), order.index(0)))
    return questions


class Lab:
    """One seed's material and models."""

    def __init__(self, root: Path, seed: int, data: Path) -> None:
        self.root, self.seed = root / f"seed-{seed}", seed
        self.root.mkdir(parents=True, exist_ok=True)
        self.old, self.new = World(seed, PEOPLE), NewWorld(1000 + seed)
        self.english = data / "corpus/en/train.jsonl"
        names = ("world", "new", "chats", "real", "plan-talks", "plan-real", "plan-text")
        self.files = {name: self.root / f"{name}.jsonl" for name in names}
        pieces = [d.text[i : i + 2000] for d in corpus.documents([data / "corpus/en/valid.jsonl"])
                  for i in range(0, len(d.text), 2000)]  # fmt: skip
        Random(1).shuffle(pieces)
        self.plain, self.told = pieces[:40], list(islice(self.old.documents("en", seed=2), 100))
        planned, self.talks = self._talks()
        real = {part: [{"messages": row["messages"]} for row in _records(data / f"instruct/{part}.jsonl")
                       if row["task"] in ("instruction", "expert")] for part in ("en", "en.valid")}  # fmt: skip
        Random(0).shuffle(real["en.valid"])
        self.held_real = real["en.valid"][:60]
        self._write("world", ({"text": t} for t in islice(self.old.documents("en", seed=1), 20_000)))
        self._write("new", ({"text": text} for text in self._readings(12_000)))
        self._write("chats", self.old.chats("en", 4_000, seed=1))
        self._write("real", real["en"])
        self._write("plan-talks", planned)
        self._write("plan-real", real["en.valid"][60:])
        self._write("plan-text", ({"text": text} for text in pieces[40:80]))
        if not (self.root / "tokenizer").is_dir():
            train_tokenizer([self.english, self.files["world"]], VOCABULARY).save(self.root / "tokenizer")
        self.tokenizer = Tokenizer.open(self.root / "tokenizer")
        self.template = tuple(self.tokenizer.id(token) for token in ("<|im_start|>", "<|im_end|>"))
        self.questions = self.old.questions("en", 100, seed=3)
        self.old_facts = facts(self.old, [p for p in self.old.everyone if p.split != "local"], 1)
        self.new_facts = facts(self.new, list(self.new.everyone), 1)

    def _talks(self) -> tuple[list, list]:
        """Held-out chats for the plan and for the scores, by the people whom they name."""
        people = [person.name for person in self.old.of("held_out")]
        halves: tuple[list, list] = ([], [])
        for chat in self.old.chats("en", 1_500, seed=2, people="held_out"):
            text = json.dumps(chat["messages"])
            named = {people.index(name) // 2 % 2 for name in people if name in text}
            if len(named) == 1:
                halves[named.pop()].append(chat)
        return halves[0][:64], halves[1][:100]

    def _readings(self, count: int):
        everyone = list(self.new.everyone)
        teller, random = Teller(words_of("en"), everyone), Random(self.seed)
        kinds = ("portrait", "portrait", "portrait", "story", "pair", "talk")
        return (teller.document(random, random.choice(kinds), everyone[i % len(everyone)]) for i in range(count))

    def _write(self, name: str, records) -> None:
        if not self.files[name].exists():
            self.files[name].write_text("".join(json.dumps(record) + "\n" for record in records))

    def learn(self, name: str, start: str | None, kind: str, rate: float, tune: list[str] = ()) -> Path:
        folder = self.root / name
        if folder.is_dir():
            return folder
        torch.manual_seed(self.seed)
        if start is None:
            model = Transformer(ModelConfig(vocab=self.tokenizer.rows, **SHAPE))
            zero_outputs(model)
        else:
            model = lapis.load(self.root / start)[0]
        if tune:
            choose(model, tune, tokens=self.template if kind in ("style", "real") else ())
        english, world, new = str(self.english), str(self.files["world"]), str(self.files["new"])
        reading = {new: 0.6, world: 0.2, english: 0.2}
        data = {
            "base": {english: 0.55, world: 0.45}, **dict.fromkeys(("knowledge", "longer"), reading),
            "style": [self.files["chats"]], "real": [self.files["real"]],
        }[kind]  # fmt: skip
        objective = (Chat if kind in ("style", "real") else Causal)(self.tokenizer, data, context=CONTEXT)
        config = TrainConfig(
            steps=STEPS[kind], batch=8, lr=rate, optimizer="muon", schedule="linear", warmup=10, seed=self.seed,
            weight_decay=0.1 if kind == "base" else 0.0, precision="bf16", threads=1, compile="off", sample_every=0,
        )  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            train(model, objective, config, folder)
        return folder

    def full(self, kind: str, start: str) -> str:
        """The best of the rates for tuning everything, by what the plan looks at."""
        files = {"style": "plan-talks", "real": "plan-real"}
        names = {rate: f"{kind}-all-{rate}" for rate in FULL[kind]}
        for rate, name in names.items():
            self.learn(name, start, kind, rate)
        if len(names) == 1:
            return next(iter(names.values()))
        talks = _records(self.files[files[kind]])
        return min(names.values(), key=lambda name: self._nll(name, talks))

    def _nll(self, name: str, talks: list[dict]) -> float:
        model, tokenizer = lapis.load(self.root / name)
        return score_chats(model, tokenizer, [talk["messages"] for talk in talks], replies=[])["response_nll"]

    def scores(self, name: str) -> dict[str, float]:
        path = self.root / f"scores-{name}.json"
        if not path.exists():
            path.write_text(json.dumps(self._scored(name)))
        return json.loads(path.read_text())

    def _scored(self, name: str) -> dict[str, float]:
        model, tokenizer = lapis.load(self.root / name)
        if name.startswith("real"):
            return {"response_nll": self._nll(name, self.held_real), **self._kept(model)}
        replies = answer(model, tokenizer, [[*q.messages, {"role": "assistant", "content": q.answer}]
                                            for q in self.questions], max_tokens=32)  # fmt: skip
        right = [r is not None and r.stop_reason == "end" and score(r.text, q)
                 for r, q in zip(replies, self.questions, strict=True)]  # fmt: skip
        found = score_chats(model, tokenizer, [t["messages"] for t in self.talks], replies=replies)
        return {
            "response_nll": found["response_nll"],
            "real_nll": self._nll(name, self.held_real),
            "stop_rate": found["stop_rate"],
            "right": sum(right) / len(right),
            **self._kept(model),
        }

    def _kept(self, model: Transformer) -> dict[str, float]:
        return {
            "bits_per_byte": score_text(model, self.tokenizer, self.plain)["bits_per_byte"],
            "bits_world": score_text(model, self.tokenizer, self.told)["bits_per_byte"],
            "old_facts": score_choices(model, self.tokenizer, self.old_facts)["accuracy"],
            "new_facts": score_choices(model, self.tokenizer, self.new_facts)["accuracy"],
        }

    def picks(self, kind: str, rule: str, chat: str) -> tuple[list[str], float]:
        """Patterns for `tune`, and their share of the blocks' parameters; none for all."""
        checkpoint = lapis.open(self.root / "base")
        parts = pieces_of(checkpoint, "components")
        total = sum(piece.parameters for piece in parts)
        if rule == "all":
            return [], 1.0
        if rule == "middle":
            last = SHAPE["layers"] - 1
            kept = [p for p in parts if math.ceil(0.2 * last) <= p.layer <= math.floor(0.8 * last)]
        elif rule.startswith("random"):
            kept = at_random(parts, int(BUDGET * total), int(rule[-1]) + 10 * self.seed)
        else:
            plan = self.plan("real" if kind == "real" else "style", chat)
            rows = {row["layer"]: row for row in plan["pieces"]}
            if rule == "plan" and kind == "knowledge":  # what lapis plan does with the same effects for this goal
                kept = pick(parts, worth("knowledge", parts, rows), int(BUDGET * total))
                return [f"layers.{p.label}" for p in kept], sum(p.parameters for p in kept) / total
            if rule == "plan":
                return [f"layers.{e['layer']}.{e['component']}" for e in plan["components"]], plan["share"]
            if rule == "snr":
                kept = []
                for component in dict.fromkeys(p.component for p in parts if "weight_snr" in rows[p.label]):
                    mine = [p for p in parts if p.component == component]
                    mine.sort(key=lambda p: -rows[p.label]["weight_snr"])
                    kept += mine[: int(BUDGET * len(mine))]
            else:
                scales = self.scales(chat, rule) if rule in LIMITS else {}
                order = {
                    "magnitude": lambda p: rows[p.label]["relative_norm"],
                    "ila": lambda p: scales[p.label],
                    "scales": lambda p: scales[p.label],
                }[rule]
                kept, room = [], int(BUDGET * total)
                for piece in sorted(parts, key=lambda p: -order(p)):
                    if piece.parameters <= room:
                        kept.append(piece)
                        room -= piece.parameters
        return [f"layers.{p.label}" for p in kept], sum(p.parameters for p in kept) / total

    def plan(self, kind: str, chat: str) -> dict:
        path = self.root / f"plan-{kind}.json"
        if not path.exists():
            found = lapis.plan(
                self.root / "base", self.root / chat, "style", BUDGET,
                chats=self.files["plan-real" if kind == "real" else "plan-talks"], text=self.files["plan-text"],
                pieces="components", spectra=True, seed=self.seed, replies=False, context=CONTEXT,
            )  # fmt: skip
            found.save(path.with_suffix(".yaml"), overwrite=True)
            path.write_text(json.dumps(found.to_json()))
        return json.loads(path.read_text())

    def scales(self, chat: str, rule: str) -> dict[str, float]:
        """A number for each piece's difference, learned to make replies likely."""
        path = self.root / f"scales-{rule}.json"
        if not path.exists():
            one, two = lapis.open(self.root / "base"), lapis.open(self.root / chat)
            texts = (document.text for document in corpus.documents([self.files["plan-text"]]))
            held_out = make_held_out(
                self.tokenizer, corpus.chats([self.files["plan-talks"]]), texts, context=CONTEXT, limit=24
            )
            bench = Bench(one, one, two, template_rows(one, one, two))
            learned = learn_scales(bench, Runner(bench.model, held_out), pieces_of(one, "components"), LIMITS[rule], 20)
            path.write_text(json.dumps(learned.scales))
        return json.loads(path.read_text())


POOL = {f"random-{i}": () for i in range(2, 5)} | {
    "first": ("layers.0-1",), "last": ("layers.6-7",), "up": ("mlp.up",), "down": ("mlp.down",),
}  # fmt: skip


def foretold(lab: Lab, chat: str) -> dict[str, dict[str, float]]:
    """Correlations over the sets that were tuned: what they do when put in, against what tuning them does."""
    one, two = lapis.open(lab.root / "base"), lapis.open(lab.root / chat)
    texts = (document.text for document in corpus.documents([lab.files["plan-text"]]))
    held_out = make_held_out(lab.tokenizer, corpus.chats([lab.files["plan-talks"]]), texts, context=CONTEXT)
    bench = Bench(one, one, two, template_rows(one, one, two))
    runner, parts = Runner(bench.model, held_out), pieces_of(one, "components")
    bench.put(one.names, "chat")
    runner.start()
    full = runner.score()
    bench.put(one.names, "home")
    runner.start()
    effects = Effects(runner.score(), full)
    rows = []
    for rule in (*RULES["style"][1:], *POOL):
        tune = list(POOL.get(rule, ())) or lab.picks("style", rule, chat)[0]
        lab.learn(f"style-{rule}", "base", "style", PART["style"], tune)
        covered = covered_parts(tune, [Part(p.layer, p.component, "weight") for p in parts], "tune")
        mine = [p for p in parts if Part(p.layer, p.component, "weight") in covered]
        put = measure_set(bench, runner, effects, mine, one.names)
        bench.put(one.names, "home")
        rows.append({**{f"put in: {key}": put[key] for key in ("style", "knowledge")}, **lab.scores(f"style-{rule}")})
    return {
        before: {after: correlation([row[before] for row in rows], [row[after] for row in rows])
                 for after in ("response_nll", "bits_per_byte", "bits_world")}
        for before in ("put in: style", "put in: knowledge")
    }  # fmt: skip


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(lab: Lab, options: argparse.Namespace) -> None:
    """Everything that was asked for, a line of JSON for each model, kept in results.jsonl."""
    started = time.monotonic()
    told = lab.root / "results.jsonl"
    done = {(row["experiment"], row["rule"]) for row in (_records(told) if told.exists() else [])}

    def tell(name: str, experiment: str, rule: str, share: float, tune: list[str]) -> None:
        if (experiment, rule) not in done:
            line = {"seed": lab.seed, "experiment": experiment, "rule": rule, "share": round(share, 3), "model": name}
            line = json.dumps({**line, **lab.scores(name), "tune": tune})
            with told.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
        if time.monotonic() - started > options.seconds:
            raise SystemExit(75)

    lab.learn("base", None, "base", FRESH["lr"])
    wanted = [options.only] if options.only else ["style", "knowledge", "base", "real"]
    chat = lab.full("style", "base")
    tell("base", "start", "base", 0, [])
    tell(chat, "start", "chat", 1, [])
    for kind in ("style", "real", "knowledge"):
        if kind not in wanted:
            continue
        start = chat if kind == "knowledge" else "base"
        whole = lab.full(kind, start)
        for rule in RULES[kind]:
            tune, share = lab.picks(kind, rule, whole if kind == "real" else chat)
            name = whole if rule == "all" else f"{kind}-{rule}"
            if rule != "all":
                lab.learn(name, start, kind, PART[kind], tune)
            tell(name, kind, rule, share, tune)
    if "pool" in wanted:
        print(json.dumps({"seed": lab.seed, "foretold": foretold(lab, chat)}))
    if "base" in wanted:
        for rule in ("all", "longer", "plan"):  # longer: everything, for twice the steps
            tune, share = lab.picks("knowledge", rule, chat) if rule == "plan" else ([], 1.0)
            name, steps = f"read-{rule}", "longer" if rule == "longer" else "knowledge"
            lab.learn(name, "base", steps, PART["knowledge"] if tune else FULL["knowledge"][0], tune)
            for scale in (1.0, 1.5):
                out = lab.root / f"grafted-{rule}-{scale}"
                if not out.is_dir():
                    lapis.graft(lab.root / "base", lab.root / name, lab.root / chat, out, scale,
                                "keep" if tune else "add", template="onto")  # fmt: skip
                tell(out.name, "base", f"{rule}, scale {scale}", share, tune)


def table(root: Path) -> str:
    """Medians over seeds, with the lowest and the highest; gain: share of full tuning's in response NLL."""
    rows = [row for path in sorted(root.glob("seed-*/results.jsonl")) for row in _records(path)]
    starts = {(row["seed"], row["rule"]): row for row in rows if row["experiment"] == "start"}
    full = {(row["seed"], row["experiment"]): row for row in rows if row["rule"] == "all"}
    lines = []
    for kind in ("start", "style", "real", "knowledge", "base"):
        names = dict.fromkeys(row["rule"] for row in rows if row["experiment"] == kind)
        if not names:
            continue
        nll = "real_nll" if kind == "real" else "response_nll"
        keys = ["response_nll", "gain", "right", "stop_rate", "bits_per_byte", "bits_world", "old_facts", "new_facts"]
        lines += ["", f"### {kind}", "", "| what is tuned | share | " + " | ".join(keys) + " |",
                  "|---|--:|" + "--:|" * len(keys)]  # fmt: skip
        for name in names:
            same = [dict(row) for row in rows if row["experiment"] == kind and row["rule"] == name]
            for row in same:
                whole = full.get((row["seed"], kind))
                if kind in ("style", "real") and whole:
                    low = starts[row["seed"], "base"][nll]
                    row["gain"] = (low - row["response_nll"]) / (low - whole["response_nll"])
            cells = [_cell([row[key] for row in same if row.get(key) is not None]) for key in keys]
            lines.append(f"| {name} | {same[0]['share']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    middle = f"{median(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LAPIS_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, default=Path("runs/plan-evidence"))
    parser.add_argument("--only", choices=("style", "real", "knowledge", "base", "pool"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after these; run again to go on")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(options.out))
        return
    logging.disable()
    torch.set_num_threads(1)
    run(Lab(options.out, options.seed, options.data), options)


if __name__ == "__main__":
    main()
