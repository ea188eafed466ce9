"""Style, knowledge and grafting on the base: what a plan's quarter of the parameters does, beside other quarters.

    python benchmarks/plan_tune.py --seed 0 --out runs/plan-evidence [--only style|knowledge|base]

A small base reads the built-in world; chat is base tuned on chats. Then, from the same starts with the same steps:

style      base is tuned on chats, all of it or only what a rule picks: replies, plain text, recall of planted facts
knowledge  chat reads of some 480 new facts (a second world), all of it or only what a rule picks
base       base reads of them instead, and the difference is grafted onto chat

Rules: plan (lapis plan), random quarters, magnitude (largest |chat - base| / |base|), gradient (x difference), snr
(Spectrum, 2406.06623: the quarter of the layers with the best signal-to-noise ratio, for each kind of matrix), middle
(2604.11838: layers from 20 to 80 %, three fifths of the parameters). Prints one JSON line for each model; models that
are there are not trained again.
"""

import argparse
import json
import logging
import math
import time
from itertools import islice
from pathlib import Path
from random import Random

import torch
import yaml

import lapis
from lapis.evaluate import Choice, answer, bits_per_byte, score_chats, score_choices
from lapis.model import ModelConfig, Transformer
from lapis.plan.choose import at_random
from lapis.plan.pieces import pieces_of
from lapis.text.tokenizer import Tokenizer, train_tokenizer
from lapis.tour.people import Person
from lapis.tour.tell import Teller
from lapis.tour.world import World, score, words_of
from lapis.train.config import TrainConfig
from lapis.train.loop import train
from lapis.train.objectives import Causal, Chat
from lapis.train.select import choose

PEOPLE, CONTEXT, VOCABULARY = 40, 128, 1024
STEPS = {"base": 400, "style": 120, "knowledge": 160}
BATCH = {"base": 16, "style": 8, "knowledge": 8}
RATES = {"base": 3e-3, "style": 1e-3, "knowledge": 1e-3}
SHAPE = {"dim": 96, "layers": 8, "heads": 4, "kv_heads": 2, "ffn_dim": 192, "context": CONTEXT, "tied": True}
RULES = ("all", "plan", "random-0", "random-1", "magnitude", "gradient", "snr", "middle")


class NewWorld(World):
    """A second world's people whom the first does not know: all facts about them are new."""

    @property
    def everyone(self) -> tuple[Person, ...]:
        known = {person.name for person in World(self.seed - 1000, PEOPLE).everyone}
        people = World(self.seed, 200).everyone
        new = {person.name for person in people} - known
        return tuple(p for p in people if p.name in new and p.facts.get("sibling", p.name) in new)


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

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root / f"seed-{seed}", seed
        self.root.mkdir(parents=True, exist_ok=True)
        self.old, self.new = World(seed, PEOPLE), NewWorld(1000 + seed)
        self.files = {name: self.root / f"{name}.jsonl" for name in ("text", "chats", "new", "valid", "talks")}
        if not self.files["talks"].exists():
            self._write()
        if not (self.root / "tokenizer").is_dir():
            words = train_tokenizer([self.files["text"], self.files["new"]], VOCABULARY)
            words.save(self.root / "tokenizer")
        self.tokenizer = Tokenizer.open(self.root / "tokenizer")
        self.asked = self.old.of("asked")
        self.questions = self.old.questions("en", 100, seed=3)
        self.talks = self.old.chats("en", 100, seed=2, people="held_out")
        self.plain = list(islice(self.old.documents("en", seed=2), 250))
        self.old_facts = facts(self.old, [p for p in self.old.everyone if p.split != "local"], 1)
        self.new_facts = facts(self.new, list(self.new.everyone), 1)

    def _write(self) -> None:
        def put(name: str, records) -> None:
            with self.files[name].open("w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

        put("text", ({"text": t} for t in islice(self.old.documents("en", seed=1), 24_000)))
        everyone = list(self.new.everyone)
        teller, random = Teller(words_of("en"), everyone), Random(self.seed)
        kinds = ("portrait", "portrait", "story", "pair", "talk")
        put("new", ({"text": teller.document(random, random.choice(kinds), everyone[i % len(everyone)])}
                    for i in range(9_000)))  # fmt: skip
        put("chats", self.old.chats("en", 4_000, seed=1))
        put("valid", ({"text": t} for t in islice(self.old.documents("en", seed=5), 200)))  # what the plan looks at
        put("talks", self.old.chats("en", 100, seed=5, people="held_out"))

    def learn(self, name: str, start: str | None, kind: str, tune: list[str] = ()) -> Path:
        folder = self.root / name
        if folder.is_dir():
            return folder
        torch.manual_seed(self.seed)
        if start is None:
            model = Transformer(ModelConfig(vocab=self.tokenizer.rows, **SHAPE))
        else:
            model = lapis.load(self.root / start)[0]
        if tune:
            choose(model, tune)
        data = {"base": "text", "style": "chats", "knowledge": "new"}[kind]
        objective = (Chat if kind == "style" else Causal)(self.tokenizer, [self.files[data]], context=CONTEXT)
        config = TrainConfig(
            steps=STEPS[kind], batch=BATCH[kind], lr=RATES[kind], optimizer="muon", seed=self.seed, precision="float32",
            threads=1, compile="off", weight_decay=0.1 if kind == "base" else 0.0, sample_every=0,
        )  # fmt: skip
        train(model, objective, config, folder)
        return folder

    def scores(self, name: str) -> dict[str, float]:
        path = self.root / f"scores-{name}.json"
        if not path.exists():
            path.write_text(json.dumps(self._scored(name)))
        return json.loads(path.read_text())

    def _scored(self, name: str) -> dict[str, float]:
        model, tokenizer = lapis.load(self.root / name)
        replies = answer(model, tokenizer, [[*q.messages, {"role": "assistant", "content": q.answer}]
                                            for q in self.questions], max_tokens=32)  # fmt: skip
        right = [r is not None and r.stop_reason == "end" and score(r.text, q)
                 for r, q in zip(replies, self.questions, strict=True)]  # fmt: skip
        found = score_chats(model, tokenizer, [t["messages"] for t in self.talks], replies=replies)
        return {
            "response_nll": found["response_nll"],
            "stop_rate": found["stop_rate"],
            "right": sum(right) / len(right),
            "bits_per_byte": bits_per_byte(model, tokenizer, self.plain),
            "old_facts": score_choices(model, tokenizer, self.old_facts)["accuracy"],
            "new_facts": score_choices(model, tokenizer, self.new_facts)["accuracy"],
        }

    def picks(self, goal: str, rule: str) -> tuple[list[str], float]:
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
            kept = at_random(parts, total // 4, int(rule[-1]) + 10 * self.seed)
        else:
            plan = self.plan(goal)
            rows = {row["layer"]: row for row in plan["pieces"]}
            if rule == "plan":
                return [f"layers.{e['layer']}.{e['component']}" for e in plan["components"]], plan["share"]
            if rule == "snr":
                kept = []
                for component in dict.fromkeys(p.component for p in parts):
                    mine = [p for p in parts if p.component == component]
                    mine.sort(key=lambda p: -rows[p.label]["weight_snr"])
                    kept += mine[: len(mine) // 4]
            else:
                key = {"magnitude": "relative_norm", "gradient": "gradient_chats"}[rule]
                size = {"magnitude": lambda p: 1, "gradient": lambda p: p.parameters}[rule]
                kept, room = [], total // 4
                for piece in sorted(parts, key=lambda p: -rows[p.label][key] / size(p)):
                    if piece.parameters <= room:
                        kept.append(piece)
                        room -= piece.parameters
        return [f"layers.{p.label}" for p in kept], sum(p.parameters for p in kept) / total

    def plan(self, goal: str) -> dict:
        path = self.root / f"plan-{goal}.json"
        if not path.exists():
            found = lapis.plan(
                self.root / "base", self.root / "chat", goal, 0.25, chats=self.files["talks"], text=self.files["valid"],
                pieces="components", spectra=True, seed=self.seed, replies=False, context=CONTEXT,
            )  # fmt: skip
            path.write_text(json.dumps(found.to_json()))
            (self.root / f"plan-{goal}.yaml").write_text(found.to_yaml())
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/plan-evidence"))
    parser.add_argument("--only", choices=("style", "knowledge", "base"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after these; run again to go on")
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    options = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    lab, started = Lab(options.out, options.seed), time.monotonic()

    def pause() -> None:
        if time.monotonic() - started > options.seconds:
            raise SystemExit(75)

    def tell(name: str, experiment: str, rule: str, share: float, tune: list[str]) -> None:
        line = {"seed": options.seed, "experiment": experiment, "rule": rule, "share": round(share, 3)}
        figures = {key: round(value, 4) for key, value in lab.scores(name).items() if value is not None}
        print(json.dumps(line | figures | {"tune": tune}), flush=True)
        pause()

    lab.learn("base", None, "base")
    pause()
    lab.learn("chat", "base", "style")
    pause()
    if options.only is None:
        tell("base", "start", "base", 0, [])
        tell("chat", "start", "chat", 1, [])
    for experiment, start in (("style", "base"), ("knowledge", "chat")):
        if options.only not in (None, experiment):
            continue
        for rule in options.rules:
            tune, share = lab.picks(experiment, rule)
            pause()
            name = f"{experiment}-{rule}"
            if (experiment, rule) == ("style", "all"):
                name = "chat"
            lab.learn(name, start, experiment, tune)
            pause()
            tell(name, experiment, rule, share, tune)
    if options.only in (None, "base"):
        for rule in ("all", "plan"):
            tune, share = lab.picks("knowledge", rule)
            name = f"read-{rule}"
            lab.learn(name, "base", "knowledge", tune)
            pause()
            for scale in (0.5, 1.0):
                out = lab.root / f"grafted-{rule}-{scale}"
                if not out.is_dir():
                    scales = yaml.safe_load((lab.root / "plan-knowledge.yaml").read_text()) if rule == "plan" else scale
                    if rule == "plan":
                        scales["scales"] = [{**s, "scale": scale} for s in scales["scales"]]
                    lapis.graft(lab.root / "base", lab.root / name, lab.root / "chat", out, scales)
                tell(out.name, "grafted on base", f"{rule}, scale {scale}", share, tune)


if __name__ == "__main__":
    main()
