"""A million mutated headers, and hundreds of thousands of other files: does one of them crash, hang, or eat memory?

    python benchmarks/fuzz.py --totals totals.jsonl --kinds headers --count 20000    goes on where it ended
    python benchmarks/fuzz.py --totals totals.jsonl --seconds 120                    what is left, for two minutes
    python benchmarks/fuzz.py --totals totals.jsonl --write                          the table

A case is given by kind, seed and number, so a crash can be tried again. `--totals` gathers what was tried: one line for
each piece. Without --count each kind is tried WANTED times.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hardware import processor  # noqa: E402
from benchmarks.reliability import RESULT  # noqa: E402
from tests.reliability.cases import CASES, make_good  # noqa: E402
from tests.reliability.fuzzing import tried  # noqa: E402

WANTED = {"headers": 1_000_000, "tokenizers": 20_000, "index": 80_000, "recipes": 90_000, "records": 80_000,
          "rows": 30_000, "adapters": 12_000, "deltas": 4_000, "config": 6_000, "report": 2_000}  # fmt: skip
MOST_SECONDS, MOST_BYTES = 2.0, 1_000_000_000
PIECE = 5_000  # cases, or as many as PIECE_SECONDS allow, between two lines of totals
PIECE_SECONDS = 20.0


def piece(kind: str, case: Any, seed: int, first: int, count: int, until: float) -> dict[str, Any]:
    """Cases first, first + 1, ... until there are `count`, or time is up."""
    found: dict[str, Any] = {"kind": kind, "seed": seed, "first": first, "cases": 0, "refused": 0, "crashes": [],
                             "slowest": 0.0, "most_memory": 0}  # fmt: skip
    begin = time.process_time()
    end = min(until, time.monotonic() + PIECE_SECONDS)
    while found["cases"] < count and time.monotonic() < end:
        outcome = tried(kind, case, seed, first + found["cases"])
        crash = outcome.crash
        if not crash and (outcome.seconds > MOST_SECONDS or outcome.grown > MOST_BYTES):
            crash = (
                f"{kind}, seed {seed}, number {first + found['cases']}: {outcome.seconds:.1f} s, {outcome.grown:,} B"
            )
        found["cases"] += 1
        found["refused"] += outcome.refused
        found["crashes"] += [crash] if crash else []
        found["slowest"] = max(found["slowest"], outcome.seconds)
        found["most_memory"] = max(found["most_memory"], outcome.grown)
    return {**found, "processor_seconds": time.process_time() - begin}


def read(totals: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in totals.read_text().splitlines()] if totals.exists() else []


def section(rows: list[dict[str, Any]]) -> str:
    """The table, with a line for each kind of file."""
    lines = ["| files | mutated | refused in a line | crashes | slowest, s | most memory, MB |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for kind in WANTED:
        own = [row for row in rows if row["kind"] == kind]
        cases, refused = (sum(row[key] for row in own) for key in ("cases", "refused"))
        crashes = sum(len(row["crashes"]) for row in own)
        slowest, memory = (max((row[key] for row in own), default=0) for key in ("slowest", "most_memory"))
        lines.append(f"| {kind} | {cases:,} | {refused:,} | {crashes} | {slowest:.2f} | {memory / 1e6:.0f} |")
    others = sum(row["cases"] for row in rows if row["kind"] not in ("headers", "tokenizers"))
    return (
        f"## Mutated files, {date.today()}\n\n{processor()}, Python {sys.version.split()[0]}. `benchmarks/fuzz.py`; "
        f"besides headers and tokenizers {others:,} files. A case counts as a crash, too, where it takes more than "
        f"{MOST_SECONDS:g} s of the processor or {MOST_BYTES / 1e9:g} GB.\n\n" + "\n".join(lines)
    )


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--totals", type=Path, required=True)
    options.add_argument("--kinds", nargs="*", default=list(WANTED), choices=list(WANTED))
    options.add_argument("--count", type=int, help="cases of each kind, in all")
    options.add_argument("--seconds", type=float, default=float("inf"), help="of this call")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--write", action="store_true", help=f"append the table to {RESULT.name}, and try nothing")
    given = options.parse_args()
    if given.write:
        with RESULT.open("a", encoding="utf-8") as file:
            file.write(f"\n{section(read(given.totals))}\n")
        return 0
    until = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory(prefix="lapis-fuzz-") as name:
        place = Path(name)
        os.environ["LAPIS_CACHE"] = str(place / "cache")
        (place / "good").mkdir()
        good = make_good(place / "good")
        for kind in given.kinds:
            (place / kind).mkdir()
            case = CASES[kind](good, place / kind)
            rows = [row for row in read(given.totals) if row["kind"] == kind and row["seed"] == given.seed]
            done, wanted = sum(row["cases"] for row in rows), given.count or WANTED[kind]
            while done < wanted and time.monotonic() < until:
                row = piece(kind, case, given.seed, done + 1, min(PIECE, wanted - done), until)
                done += row["cases"]
                with given.totals.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                for crash in row["crashes"]:
                    print(crash, flush=True)
            print(f"{kind}: {done:,} of {wanted:,}", flush=True)
    return int(any(row["crashes"] for row in read(given.totals)))


if __name__ == "__main__":
    sys.exit(main())
