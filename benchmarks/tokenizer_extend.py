"""What extending a tokenizer costs, beside a new training by the tokenizers library on the same text.

    python benchmarks/tokenizer_extend.py --model MODEL [--rounds 3] [--write]

6 MB of Korean and Ukrainian documents of LAPIS_DATA; 10,000 new tokens for a model's tokenizer (its folder is copied
without weights), and a byte-level BPE of 10,000 tokens trained anew with the same splitting. Whole processes, in turn;
seconds by the clock and of the processor, and peak memory. Target: 60 s and 1 GB on two cores.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tokenizer_extend.md"
DATA = Path(os.environ.get("LAPIS_DATA", ROOT.parent / "shared" / "data"))
SIZE, ADD = 6_000_000, 10_000
ANEW = """
import json, sys
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=int(sys.argv[2]), initial_alphabet=alphabet, show_progress=False)
with open(sys.argv[1], encoding="utf-8") as file:
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
tokenizer.save(sys.argv[3])
"""


def write_text(path: Path) -> int:
    """Documents of several files in turn until they have SIZE bytes; returns how many bytes."""
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for name in ("ko/train", "ko/reviews-train", "uk/train"):
            for line in (DATA / "corpus" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
                text = json.loads(line)["text"]
                if written + len(text.encode()) > SIZE:
                    continue
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
    return written


def timed(command: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock and of the processor, and the peak of memory in MB, of a process."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, u.ru_maxrss / 1e3)"
    )
    started = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", script, *command], check=True, capture_output=True, text=True)
    cpu, peak = ran.stdout.split()[-2:]
    return time.perf_counter() - started, float(cpu), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        size = write_text(place / "text.jsonl")
        (place / "base").mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(options.model / name, place / "base" / name)
        runs: dict[str, list[tuple[float, float, float]]] = {"lapis tokenizer extend": [], "tokenizers, anew": []}
        for number in range(options.rounds):
            out = str(place / f"out{number}")
            runs["lapis tokenizer extend"].append(
                timed(
                    [
                        sys.executable,
                        "-m",
                        "lapis",
                        "tokenizer",
                        "extend",
                        str(place / "base"),
                        str(place / "text.jsonl"),
                        "--add",
                        str(ADD),
                        "--out",
                        out,
                    ]
                )
            )
            runs["tokenizers, anew"].append(
                timed([sys.executable, "-c", ANEW, str(place / "text.jsonl"), str(ADD), f"{out}.json"])
            )  # fmt: skip
    rows = [
        f"| {name} | {statistics.median(r[0] for r in each):.1f} | {min(r[0] for r in each):.1f} to "
        f"{max(r[0] for r in each):.1f} | {statistics.median(r[1] for r in each):.1f} | "
        f"{max(r[2] for r in each):,.0f} |"
        for name, each in runs.items()
    ]
    head = (
        f"{date.today()}: {platform.machine()}, {os.cpu_count()} cores, {options.model.name}, {size / 1e6:.2f} MB of "
        f"text, {ADD:,} tokens, {options.rounds} rounds; load before: {os.getloadavg()[0]:.1f}.\n\n"
        "| | seconds (median) | min to max | processor, s | peak MB |\n|---|---:|---:|---:|---:|\n"
    )
    table = head + "\n".join(rows) + "\n"
    print(table)
    if options.write:
        title = "" if RESULTS.exists() else "# Extending a tokenizer (benchmarks/tokenizer_extend.py)\n"
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"{title}\n{table}")


if __name__ == "__main__":
    main()
