"""Every system call of every job, killed once and twice, and failing with every error: is anything lost or wrong?

    python benchmarks/reliability.py --write             all jobs, and a table at the end of results/reliability.md
    python benchmarks/reliability.py --jobs graft fuse   some of them

A kill: the process ends before the n-th call that changes the disk; what is visible must be old or new, and the same
command must then give the bytes of an undisturbed run, with nothing left behind. An error: the n-th call fails or does
half; the command must end with its output, or with one line and no traceback, and the rerun must give the same bytes.
Where errors are too many, every so many-th trial is made (--step). Needs a C compiler on Linux.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hardware import processor  # noqa: E402
from tests.reliability.aimed import (  # noqa: E402
    ERRORS,
    Forks,
    Job,
    OutOfTime,
    build,
    digest,
    fail_each,
    kill_each,
)
from tests.reliability.catalogue import count as count_faults  # noqa: E402
from tests.reliability.fuzzing import processor_seconds  # noqa: E402
from tests.reliability.jobs import jobs, lookers, make_inputs  # noqa: E402
from tests.reliability.legs import fail_legs, kill_legs  # noqa: E402

# job -> every so many-th kill, how many of the last ones, every so many-th error, where trials are long or many
STEPS = {"plan": (4, 20, 40), "tour": (8, 4, 60), "adapt": (8, 4, 40), "graft and a look at it": (2, 20, 4)}
RESULT = ROOT / "benchmarks" / "results" / "reliability.md"


def trials(job: Job, phase: str, step: int, skip: int, until: float) -> dict[str, Any]:
    """All trials of one job, "kills" or "errors", but for the first `skip`, and those after `until`."""
    job.skip, job.until, done = skip, until, True
    inputs = digest(job.place / "inputs")
    begin, spent = time.monotonic(), processor_seconds()
    kill_step, last, error_step = STEPS.get(job.name, (1, 20, step))
    try:
        if job.grows:
            with tempfile.TemporaryDirectory(dir=job.place.parent) as room:
                if phase == "errors":
                    fail_legs(job, Path(room), ERRORS, error_step)
                else:
                    kill_legs(job, Path(room), kill_step)
        elif phase == "errors":
            fail_each(job, error_step)
        elif job.outputs:
            kill_each(job, kill_step, last)
            kill_each(job, 2 * kill_step, twice=True)
    except OutOfTime:
        done = False
    if digest(job.place / "inputs") != inputs:
        job.wrong.append(f"{job.name}: the inputs changed")
    return {
        "job": job.name,
        "phase": phase,
        "done": done,
        "tried": job.tried - min(skip, job.tried),
        "kills": job.kills,
        "errors": job.errors,
        "wrong": job.wrong,
        "seconds": time.monotonic() - begin,
        "processor_seconds": processor_seconds() - spent,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each job, over both phases, and one for all."""
    lines = ["| job | kills | errors injected | wrong |", "|---|---:|---:|---:|"]
    total = [0, 0, 0]
    for name in dict.fromkeys(row["job"] for row in rows):
        own = [row for row in rows if row["job"] == name]
        kills, errors = (sum(row[key] for row in own) for key in ("kills", "errors"))
        wrong = sum(len(row["wrong"]) for row in own)
        lines.append(f"| {name} | {kills:,} | {errors:,} | {wrong} |")
        total = [a + b for a, b in zip(total, (kills, errors, wrong), strict=True)]
    return "\n".join([*lines, "| **all** | **{:,}** | **{:,}** | **{}** |".format(*total)])


def section(rows: list[dict[str, Any]]) -> str:
    """The table with its date and processor, and how many numbered faults tests name."""
    claimed, places = count_faults()
    return (
        f"## Aimed kills and injected errors, {date.today()}\n\n{processor()}, Python {sys.version.split()[0]}. "
        f"`benchmarks/reliability.py`; {claimed} numbered faults are claimed, {places} tests or inputs name one.\n\n"
        f"{table(rows)}"
    )


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--jobs", nargs="*", default=[])
    options.add_argument("--phases", nargs="*", default=["kills", "errors"])
    options.add_argument("--step", type=int, default=2, help="of errors, where a job's own is not smaller")
    options.add_argument(
        "--results", type=Path, help="a .jsonl to which results are appended; trials in it are not made"
    )
    options.add_argument("--seconds", type=float, default=float("inf"), help="after which no trial is begun")
    options.add_argument("--write", action="store_true", help=f"append the table to {RESULT.name}")
    given = options.parse_args()
    place = Path(tempfile.mkdtemp(prefix="lapis-reliability-"))
    rows: list[dict[str, Any]] = []
    if given.results and given.results.exists():
        rows = [json.loads(line) for line in given.results.read_text().splitlines()]
    forks, until = Forks(build(place), place), time.monotonic() + given.seconds
    try:
        (place / "jobs").mkdir()
        make_inputs(forks, place / "jobs" / "inputs")
        every = {**jobs(forks, place / "jobs"), **lookers(forks, place / "jobs")}
        for phase, name in product(given.phases, every):
            known = [row for row in rows if (row["job"], row["phase"]) == (name, phase)]
            wanted = not given.jobs or name in given.jobs
            if not wanted or any(row["done"] for row in known) or time.monotonic() > until:
                continue
            row = trials(every[name](), phase, given.step, sum(row["tried"] for row in known), until)
            rows.append(row)
            print(f"{name}: {row['kills']} kills, {row['errors']} errors, {len(row['wrong'])} wrong", flush=True)
            for line in row["wrong"]:
                print(f"  {line}", flush=True)
            if given.results:
                with given.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    finally:
        forks.close()
        shutil.rmtree(place, ignore_errors=True)
    shown = section(rows)
    print(shown)
    if given.write:
        with RESULT.open("a", encoding="utf-8") as file:
            file.write(f"\n{shown}\n")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
