"""A real model with new tokens and without, at equal processor seconds: does extending pay, and what does English lose?

    python benchmarks/language_real.py --out runs/language-real [--only ko-smollm2 ms-smollm2 ms-gemma3] [--models DIR]
    python benchmarks/language_real.py --out runs/language-real --do score      of the models that are there
    python benchmarks/language_real.py --out runs/language-real --do write      the tables into results/

Two ways of the same length on one thread. With new tokens: `lapis tokenizer extend` with calibrated rows, then blocks
and the rows of new tokens ("trained"), then each new token as likely again as it is frequent. Without them: everything,
all of the time. Both read a tenth of English. Scored on the beginnings of documents that no step reads, with the first
seed four times on the way, too, for which no time is counted. Characters per second are counted in processor seconds
too, and measured in turn.
LAPIS_MODELS names the folder of the models (smollm2-it, gemma3), where --models does not.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from language_runs import (
    DATA,
    ENGLISH,
    HELD_ENGLISH,
    beside,
    bits_per_byte,
    curve_of,
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
from lapis.checkpoint import open_checkpoint
from lapis.generation.generate import generate_batch
from lapis.language.rows.calibrate import calibrate_again
from lapis.language.texts import write_texts
from lapis.text.corpus import corpus
from lapis.text.tokenizer.extend import ExtendableTokenizer

DOCUMENTS = 10  # of each file that are scored
CONTEXT = 512
PRECISION = "bf16"  # of the forward pass, as "auto" finds it on a processor with avx512_bf16; weights are float32
GENERATED, ROUNDS = 24, 6
WAYS = ("with", "without")
CALIBRATING = 20  # processor seconds that are put by for it
QUARTERS = 4  # at whose ends a training is scored on the way


@dataclass(frozen=True)
class Case:
    """A model and a language. add: New tokens. seconds: Of the processor, for all that is done to one model. context:
    Tokens of a row. rates: Of each way, and of new rows. held_bytes: Scored. on_the_way: At each quarter, too."""

    model: str
    text: tuple[str, ...]
    held: tuple[str, ...]
    add: int
    seconds: float
    seeds: tuple[int, ...]
    batch: int = 1
    context: int = CONTEXT
    rates: Mapping[str, float] = field(default_factory=lambda: {"with": 3e-4, "without": 3e-4, "rows": 1e-3})
    replay: float = 0.1
    held_bytes: int = 6_000
    on_the_way: bool = False
    speed: bool = True


MALAY = {"text": ("ms/train.jsonl",), "held": ("ms/valid.jsonl",)}
CASES = {
    "ko-smollm2": Case("smollm2-it", ("ko/train.jsonl", "ko/reviews-train.jsonl"),
                       ("ko/valid.jsonl", "ko/reviews-valid.jsonl"), 10_000, 900, (0, 1), on_the_way=True),
    "ms-smollm2": Case("smollm2-it", add=3000, seconds=120, seeds=(0,), **MALAY),
    "ms-gemma3": Case("gemma3", add=2000, seconds=100, seeds=(0,), speed=False,
                      rates={"with": 2e-5, "without": 2e-5, "rows": 2e-4}, **MALAY),
}  # fmt: skip


class Bench:
    """A case on its way, in a folder of its own."""

    def __init__(self, case: Case, name: str, root: Path, models: Path) -> None:
        self.case, self.root, self.name = case, root / name, name
        self.base = models / self.case.model
        self.files = [DATA / "corpus" / each for each in self.case.text]
        self.data = mixture(self.files, self.case.replay)
        held = {"target": [DATA / "corpus" / each for each in self.case.held], "en": [HELD_ENGLISH]}
        self.texts = {name: held_out(paths, self.case.held_bytes, DOCUMENTS) for name, paths in held.items()}
        self.held = {name: self.root / f"{name}.jsonl" for name in held}
        self.root.mkdir(parents=True, exist_ok=True)
        for name, place in self.held.items():
            write_texts(place, self.texts[name])

    def settings(self, way: str, model: Path, rows: list[int], **more: Any) -> dict[str, Any]:
        """Of a training, but for its length."""
        case = self.case
        shared = {"model": str(model), "data": self.data, "batch": case.batch, "context": case.context, "log_every": 5,
                  "precision": PRECISION}  # fmt: skip
        taught = {"freeze": ["embed"], "tokens": rows, "share_rows": True, "rates": {"embed": case.rates["rows"]}}
        return {**shared, "lr": case.rates[way], **(taught if way == "with" else {}), **more}

    def extended(self) -> tuple[Path, float]:
        """The model with new rows, and the processor seconds that it took."""
        start = self.root / "start"

        def make() -> dict[str, Any]:
            begun = time.process_time()
            lapis.extend(self.base, self.files, start, add=self.case.add, init="calibrated", replay=[ENGLISH],
                         overwrite=True)  # fmt: skip
            return {"seconds": time.process_time() - begun}

        say(f"extending {start}")
        return start, kept(self.root / "start.json", make)["seconds"]

    def calibrated(self, seed: int) -> float:
        """The trained model with new tokens as likely again as they are; the processor seconds that it took."""
        out = self.root / f"with-{seed}"

        def make() -> dict[str, Any]:
            begun, base = time.process_time(), ExtendableTokenizer.open(self.base)
            texts = [[document.text for document in corpus.documents(files)] for files in (self.files, [ENGLISH])]
            calibrate_again(open_checkpoint(self.root / f"trained-{seed}"), base,
                            base.read_extension(self.root / "start"), texts[0], out, replay=texts[1],
                            overwrite=True)  # fmt: skip
            return {"seconds": time.process_time() - begun}

        return float(kept(self.root / f"with-{seed}.json", make)["seconds"])

    def train(self, seeds: Sequence[int], ways: Sequence[str]) -> None:
        case = self.case
        start, spent = self.extended()
        begin = {"with": start, "without": self.base}
        seconds = {"with": case.seconds - spent - CALIBRATING, "without": case.seconds}
        first = lapis.Tokenizer.open(self.base).rows
        rows = list(range(first, first + case.add))
        pace = paces(self.root / "paces.json", {way: self.settings(way, at, rows) for way, at in begin.items()})
        steps = {way: QUARTERS * max(1, round(seconds[way] / pace[way] / QUARTERS)) for way in WAYS}
        say(f"{self.name}: seconds per step {pace}, steps {steps}")
        for seed in seeds:
            for way in ways:
                how: dict[str, Any] = {"steps": steps[way], "seed": seed}
                if case.on_the_way and seed == case.seeds[0]:
                    how["eval_every"] = steps[way] // QUARTERS
                    how["valid"] = {name: str(place) for name, place in self.held.items()}
                name = f"trained-{seed}" if way == "with" else f"without-{seed}"
                run(self.root / name, **self.settings(way, begin[way], rows, **how))
                if way == "with":
                    self.calibrated(seed)

    def scores(self) -> dict[str, dict[str, float]]:
        """Of the models that are there, in their order."""
        names = ["base", "start", *(f"{way}-{seed}" for way in ("trained", *WAYS) for seed in self.case.seeds)]
        places = {name: self.base if name == "base" else self.root / name for name in names}
        return {name: self.score(name, place) for name, place in places.items() if place.is_dir()}

    def score(self, name: str, model: Path) -> dict[str, float]:
        found = kept(self.root / f"scores-{name}.json", lambda: bits_per_byte(model, self.texts, CONTEXT))
        say(f"{self.name} {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
        return dict(found)

    def speeds(self) -> dict[str, list[float]]:
        """Characters of the language in a processor second of generation, in turn, without and with new tokens."""

        def measure() -> dict[str, list[float]]:
            opened = {name: lapis.load(self.root / f"{name}-0") for name in ("without", "with")}
            text = "".join(self.texts["target"])
            found: dict[str, list[float]] = {name: [] for name in opened}
            for number in range(ROUNDS):
                for name, (model, tokenizer) in opened.items():
                    prompt = text[200 * number : 200 * number + 200]
                    sampling = lapis.Sampling(temperature=0.0, max_tokens=GENERATED)
                    begun = time.process_time()
                    made = generate_batch(model, tokenizer, [prompt], sampling)[0].ids
                    took = time.process_time() - begun
                    found[name].append(len(made) / took * len(text) / len(tokenizer.encode(text)))
            return found

        return dict(kept(self.root / "speeds.json", measure))


def lines(bench: Bench) -> list[str]:
    """The table of a case."""
    scores, case = bench.scores(), bench.case
    base = scores["base"]
    rows = []
    for name, found in scores.items():
        trained = bench.root / name.replace("with-", "trained-")
        steps = seconds_of(trained) if beside(trained).exists() else []
        read = len(steps) * (1 - case.replay)  # steps' worth of the language
        rows.append([
            name, f"{found['target']:.3f}", f"{1 - found['target'] / base['target']:+.1%}", f"{found['en']:.3f}",
            f"{found['en'] / base['en'] - 1:+.1%}", f"{found['target tokens']:.3f}", str(len(steps) or ""),
            f"{sum(steps):.0f}" if steps else "",
            f"{read * case.batch * case.context / found['target tokens'] / 1e3:.0f} KB" if steps else "",
        ])  # fmt: skip
    head = ["model", "bits per byte", "won", "English", "cost", "tokens per byte", "steps", "processor s", "text read"]
    result = [
        "",
        f"**{bench.name}**: {case.add:,} tokens, {case.seconds:.0f} processor seconds.",
        "",
        *table(head, rows),
    ]
    if case.on_the_way and len(on_the_way := curves(bench)) > 2:  # more than a head
        result += ["", "On the way, by the training's own figure, which counts where a document is cut off, too:", ""]
        result += on_the_way
    if case.speed and all((bench.root / f"{way}-0").is_dir() for way in WAYS):
        speeds = {name: statistics.median(each) for name, each in bench.speeds().items()}
        without, new = speeds["without"], speeds["with"]
        result += ["", f"Characters in a processor second of generation (median of {ROUNDS}, in turn): {without:.1f} "
                   f"without, {new:.1f} with: {new / without:.2f} times."]  # fmt: skip
    return result


def curves(bench: Bench) -> list[str]:
    """The table of what the trainings had come to on the way."""
    rows = []
    for way in WAYS:
        out = bench.root / f"{'trained' if way == 'with' else way}-{bench.case.seeds[0]}"
        spent = bench.extended()[1] if way == "with" else 0.0
        for seconds, found in curve_of(out) if out.is_dir() else []:
            bits = (f"{found[f'{name}/bits_per_byte']:.3f}" for name in bench.texts)
            rows.append([out.name, f"{spent + seconds:.0f}", *bits])
    return table(["model", "processor s", "bits per byte", "English"], rows)


def case_options(about: str | None) -> argparse.ArgumentParser:
    """The options that say which models, and how long they are trained."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/language-real"))
    parser.add_argument("--models", type=Path, help="their folder; LAPIS_MODELS without it")
    parser.add_argument("--seconds", type=float, help="what a case has without it; each with an --out of its own")
    parser.add_argument("--rates", nargs="*", default=[], metavar="NAME=RATE", help="with, without, rows; the same")
    parser.add_argument("--context", type=int, help="of a row; the same")
    parser.add_argument("--batch", type=int, help="rows of a step; the same")
    parser.add_argument("--do", choices=["train", "score", "write"], help="one of the steps; all without it")
    return parser


def benches(options: argparse.Namespace, names: Sequence[str]) -> list[Bench]:
    """The named cases, changed as the options say."""
    given = {name: getattr(options, name) for name in ("seconds", "context", "batch") if getattr(options, name)}
    rates = {name: float(rate) for name, rate in (each.split("=") for each in options.rates)}
    cases = {name: replace(CASES[name], rates={**CASES[name].rates, **rates}, **given) for name in names}
    return [Bench(case, name, options.out, models_folder(options.models)) for name, case in cases.items()]


def main() -> None:
    parser = case_options(__doc__)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="*", help="all that a case has without it")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    chosen = benches(options, options.only)
    for bench in chosen:
        if options.do in ("train", None):
            bench.train(bench.case.seeds if options.seeds is None else options.seeds, options.ways)
        if options.do in ("score", None):
            bench.scores()
    if options.do == "train":
        return
    text = [line for bench in chosen for line in lines(bench)]
    print("\n".join(text))
    if options.do == "write":
        keep(__file__, "A language with new tokens and without", text)


if __name__ == "__main__":
    main()
