"""How large is a delta, and how long do extracting and applying it take beside the graft itself?

    python benchmarks/delta.py --size 0.5b --rounds 3

Makes base, chat and onto of a real shape with random weights (chat is base plus noise of 1.5 % of its weights, so that
an exact delta is as hard to compress as noise is), then runs the graft and every delta in turn, round after round, each
as a whole process. The exact delta's output is compared with the graft's, byte by byte. Adds a dated table to
benchmarks/results/delta.md.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merge import ROOT, make
from results_file import add_table

KINDS = {
    "exact": [], "8 bits": ["--bits", "8"], "4 bits": ["--bits", "4"], "1 bit": ["--bits", "1"],
    "rank 64": ["--rank", "64"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as folder:
        place = Path(folder)
        make(place / "base", options.size, 0)
        make(place / "chat", options.size, 1, place / "base")
        make(place / "onto", options.size, 2, place / "base")
        add_table(__file__, "Deltas beside the graft", measure(place, options))


def measure(place: Path, options: argparse.Namespace) -> list[str]:
    weights = place / "chat" / "model.safetensors"
    base, chat, onto = (["--" + role, str(place / role)] for role in ("base", "chat", "onto"))
    jobs = {"graft": ["graft", *base, *chat, *onto, "--no-smoke"]}
    for kind in options.kinds:
        jobs[f"extract {kind}"] = ["delta", "extract", *base, *chat, *KINDS[kind], "--no-smoke"]
        jobs[f"apply {kind}"] = ["delta", "apply", str(place / f"extract {kind}"), *onto, "--no-smoke"]
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in jobs}
    facts: dict[str, dict] = {}
    for _ in range(options.rounds):
        for name, arguments in jobs.items():
            shutil.rmtree(place / name, ignore_errors=True)
            *figures, facts[name] = run([*arguments, "--out", str(place / name), "--json"])
            seen[name].append(tuple(figures))
    if "exact" in options.kinds:
        one, two = (place / name / "model.safetensors" for name in ("graft", "apply exact"))
        same = one.read_bytes() == two.read_bytes()
    cores, model = os.cpu_count(), weights.stat().st_size
    head = f"## {options.size}, {options.rounds} rounds, {datetime.date.today()}, {cores} cores"
    lines = [f"{head}, model {model / 1e6:,.0f} MB", ""]
    if "exact" in options.kinds:
        lines += [f"The exact delta gives the graft's bytes: {'yes' if same else 'NO'}.", ""]
    lines += ["| job | seconds (median) | times the graft | CPU seconds | peak MB | delta, MB | of the model | error |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seen.items()}
    for name, (seconds, cpu, peak) in middle.items():
        size = facts[name].get("bytes")
        error = facts[name].get("relative_error")
        shown = ("", "") if size is None else (f"{size / 1e6:,.1f}", f"{size / model:.1%}")
        lines.append(
            f"| {name} | {seconds:.2f} | {seconds / middle['graft'][0]:.2f} | {cpu:.2f} | {peak:,.0f} | {shown[0]} "
            f"| {shown[1]} | {'' if error is None else f'{error:.2%}'} |"
        )
    print("\n".join(lines))
    return lines


def run(arguments: list[str]) -> tuple[float, float, float, dict]:
    """Seconds, processor seconds, peak MB and the JSON of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "lapis", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr}")
    result = json.loads(done.stdout)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, result["peak_memory_bytes"] / 1e6, result


if __name__ == "__main__":
    main()
