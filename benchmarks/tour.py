"""Whole tours, one after another: what each ends with, in seconds, tokens, right answers and likelihoods.

Each row is `lapis tour` in a process of its own; a row whose folder holds a finished tour is not run again. Models do
not depend on what else the machine does, seconds do: rows that are to show seconds are run with nothing beside them.

    python benchmarks/tour.py --out runs/tours                       # all rows
    python benchmarks/tour.py --out runs/tours --rows idle-0 busy-0  # some
    python benchmarks/tour.py --out runs/tours --write               # and the table into results/tour.md
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from train import machine

PLAIN = ("quiz", "reading", "drill", "gloss")  # kinds of text whose wording is the chats', or that translate words
CHATTING = ("chat", "grafted", "tuned", "yardstick")
RUN = (
    "import sys; from lapis.tour import world; world.KINDS.update(dict.fromkeys(sys.argv.pop(1).split(), 0.0)); "
    "from lapis.cli.main import main; sys.exit(main())"
)
SPIN = "import torch; a = torch.rand(1500, 1500); torch.set_num_threads(2)\nwhile True: a @ a"


@dataclass(frozen=True)
class Row:
    """One tour: what it is called in the table, its options, and what it runs with."""

    what: str
    options: tuple[str, ...] = ()
    threads: int = 0  # 0: what the tour itself finds fastest
    beside: bool = False  # another job of two threads
    without: tuple[str, ...] = ()  # kinds of text of the built-in world

    def run(self, out: Path) -> None:
        """Runs it, and leaves beside its folder what it took."""
        if (out / "tour.json").exists():
            return
        environment = os.environ | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})
        command = [sys.executable, "-c", RUN, " ".join(self.without), "tour", "--out", str(out), *self.options]
        spin = subprocess.Popen([sys.executable, "-c", SPIN]) if self.beside else None
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            subprocess.run(command, env=environment, check=True)
        finally:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if spin:
                spin.kill()
                spin.wait()
        took = {"processor": after.ru_utime - before.ru_utime, "load": os.getloadavg()[1], "cores": os.cpu_count()}
        out.with_name(out.name + ".took.json").write_text(json.dumps(took))


ROWS = {
    **{f"idle-{seed}": Row(f"seed {seed}", ("--seed", str(seed))) for seed in range(3)},
    "busy-0": Row("seed 0, a job of two threads beside it", beside=True),
    **{f"one-{seed}": Row(f"seed {seed}, one thread", ("--seed", str(seed)), threads=1) for seed in range(3)},
    "float32-0": Row("seed 0, float32", ("--precision", "float32")),
    **{f"{code}-0": Row(f"seed 0, to {name}", ("--language", code), threads=1)
       for code, name in {"ko": "Korean", "uk": "Ukrainian", "zh": "Chinese"}.items()},
    "plain-0": Row("seed 0, no lessons and no glosses in the text", threads=1, without=PLAIN),
}  # fmt: skip


def digest(folder: Path) -> str:
    """The start of the sha256 of a model's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:8]


def line(row: Row, out: Path) -> list[str]:
    """The cells of a finished tour."""
    result: dict[str, Any] = json.loads((out / "tour.json").read_text())
    took_file = out.with_name(out.name + ".took.json")
    took = json.loads(took_file.read_text()) if took_file.exists() else {}
    english, target = result["languages"]
    scores = result["scores"]
    right = [" + ".join(f"{scores[name][code]['answers']:.2f}" for code in (english, target)) for name in CHATTING]
    nll = " / ".join(f"{scores[name][target]['response_nll']:.2f}" for name in ("adapted", *CHATTING[1:]))
    way, cost = result["gap_closed_to_yardstick"], result["cost"]
    return [
        row.what, f"{result['seconds']:.0f}", f"{took['processor']:.0f}" if took else "",
        f"{took['load']:.1f}" if took else "", f"{sum(result['tokens'].values()) / 1e6:.2f} M", *right, nll,
        f"{way:.2f}", f"{cost:+.1%}", f"{result['scale']:g}", f"{digest(out / 'base')} {digest(out / 'grafted')}",
    ]  # fmt: skip


HEAD = [
    "tour", "seconds", "processor seconds", "load", "tokens", *(f"right: {name}" for name in CHATTING),
    "NLL: adapted / grafted / tuned / yardstick", "way", "cost", "scale", "sha256: base, grafted",
]  # fmt: skip


def table(done: dict[str, Path]) -> str:
    """Of the tours that are finished, in markdown."""
    rows = [HEAD, ["---"] + ["--:"] * (len(HEAD) - 1), *(line(ROWS[name], out) for name, out in done.items())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tours"))
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--write", action="store_true", help="the table of all finished rows into results/tour.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        ROWS[name].run(options.out / name)
    text = table({name: options.out / name for name in ROWS if (options.out / name / "tour.json").exists()})
    print(text)
    if options.write:
        note = (
            "Seconds are of the tour's own clock; load: the average over five minutes when it ended, its own included."
        )
        place = Path(__file__).parent / "results" / "tour.md"
        place.write_text(f"# Whole tours\n\n{date.today()}. {machine()}\n\n{note}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
