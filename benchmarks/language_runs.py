"""Trainings that are compared at equal processor seconds: what benchmarks/language_*.py have in common.

A training is counted in steps, and each step in seconds of the processor on one thread, which other work on the machine
hardly changes. Where two runs get equal seconds, both are tried for a few steps in turn, and get as many steps as fit.
What is there already is not run again; a training that was cut goes on.
"""

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from itertools import islice
from pathlib import Path
from typing import Any

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
os.environ.update(dict.fromkeys(ONE_THREAD, "1"))

import torch  # noqa: E402  (reads the number of threads when it is imported)
from results_file import add_table  # noqa: E402
from train import machine  # noqa: E402

import lapis  # noqa: E402
from lapis.evaluation.text import score_text  # noqa: E402
from lapis.language.texts import first_bytes  # noqa: E402
from lapis.text.corpus import corpus  # noqa: E402
from lapis.training.loop.progress import LiveWatch  # noqa: E402
from lapis.training.run import read_settings  # noqa: E402
from lapis.training.run import run as train  # noqa: E402

torch.set_num_threads(1)
DATA = Path(os.environ.get("LAPIS_DATA", Path(__file__).parents[2] / "shared" / "data"))
ENGLISH, HELD_ENGLISH = DATA / "corpus/en/train.jsonl", DATA / "corpus/en/valid.jsonl"
WARM = 1  # steps of a trial that do not count
COMMON = {"objective": "causal", "threads": 1, "compile": "off", "sample_every": 0, "certify": "off"}


def models_folder(given: Path | None = None) -> Path:
    """The folder of the real models: what was given, or else what LAPIS_MODELS names."""
    place = given or os.environ.get("LAPIS_MODELS")
    if not place:
        raise SystemExit("LAPIS_MODELS is not set; it names the folder with the models smollm2-it and gemma3")
    return Path(place)


class Clock(LiveWatch):
    """Writes the processor seconds of each step into a file, so that a run in several pieces is counted whole.

    Held-out evaluations on the way do not count: each ends with a note.
    """

    def __init__(self, place: Path) -> None:
        self.file = place.open("a", encoding="utf-8")
        self.last = 0.0

    def stage(self, text: str) -> None:
        self.last = time.process_time()

    def note(self, text: str) -> None:
        say(text.strip())
        self.last = time.process_time()

    def step(self, row: Mapping[str, Any]) -> None:
        now = time.process_time()
        self.file.write(f"{row['step']} {now - self.last:.3f}\n")
        self.file.flush()
        self.last = time.process_time()

    def close(self) -> None:
        self.file.close()


def seconds_of(out: Path) -> list[float]:
    """Processor seconds of each step of a training."""
    lines = [line.split() for line in beside(out).read_text().splitlines()]
    return list({int(step): float(seconds) for step, seconds in lines}.values())


def curve_of(out: Path) -> list[tuple[float, dict[str, float]]]:
    """What a training had come to at each held-out evaluation: processor seconds until then, and the metrics."""
    seconds = seconds_of(out)
    rows = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(sum(seconds[: row["step"]]), row["held_out"]) for row in rows if "held_out" in row]


def beside(out: Path) -> Path:
    """The file of a training's seconds."""
    return out.with_name(out.name + ".seconds")


def run(out: Path, **settings: Any) -> Path:
    """A training with the settings of `lapis train`, at `out`."""
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        say(f"training {out}")
        with contextlib.redirect_stderr(io.StringIO()):
            train(read_settings({**COMMON, **settings, "out": str(out)}, out.name), watch=Clock(beside(out)))
    return out


def paces(place: Path, arms: Mapping[str, Mapping[str, Any]], rounds: int = 2, steps: int = 5) -> dict[str, float]:
    """Processor seconds for a step of each training: the median of a few steps, tried in turn; kept at `place`."""
    known = dict(json.loads(place.read_text())) if place.exists() else {}
    found: dict[str, list[float]] = {name: [] for name in arms if name not in known}
    for _ in range(rounds):
        for name, each in found.items():
            with tempfile.TemporaryDirectory() as folder:
                out = run(Path(folder) / "trial", **{**arms[name], "steps": steps + WARM})
                each += seconds_of(out)[WARM:]
    known |= {name: statistics.median(each) for name, each in found.items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(known))
    return known


def kept(place: Path, compute: Callable[[], Any]) -> Any:
    """What a file says, or else what `compute` gives, which is then in the file."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(compute(), ensure_ascii=False, indent=1))
    return json.loads(place.read_text())


def mixture(files: Sequence[Path], replay: float) -> dict[str, float]:
    """Data of a training: files of a language, by their sizes, and a share of English."""
    sizes = [path.stat().st_size for path in files]
    shares = {str(path): (1 - replay) * size / sum(sizes) for path, size in zip(files, sizes, strict=True)}
    return shares | ({str(ENGLISH): replay} if replay else {})


def held_out(files: Iterable[Path], size: int, most: int = 100) -> list[str]:
    """The beginnings of held-out documents, `most` of each file, as much of each: `size` bytes in all."""
    texts: list[str] = []
    paths = list(files)
    for path in paths:
        documents = [document.text for document in islice(corpus.documents([path]), most)]
        share = size // len(paths) // len(documents)
        texts += [next(iter(first_bytes([text], share))) for text in documents]
    return texts


def bits_per_byte(model: Path | str, texts: Mapping[str, Sequence[str]], context: int) -> dict[str, float]:
    """Of each language; and `tokens_per_byte`, as `name tokens`."""
    opened, tokenizer = lapis.load(model, torch.float32)
    scores = {}
    for name, held in texts.items():
        found = score_text(opened, tokenizer, held, context)
        scores[name] = found["bits_per_byte"]
        scores[f"{name} tokens"] = found["tokens"] / found["bytes"]
    return scores


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


def keep(script: str, title: str, text: Sequence[str]) -> None:
    """Adds lines to the results of a script (its `__file__`), below the date and the machine."""
    add_table(script, title, [f"{date.today()}: {machine()}, one thread.", *text])


def mean_spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several values, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in markdown; all but its first column are numbers."""
    lines = [list(head), ["---", *["--:"] * (len(head) - 1)], *map(list, rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
