"""What export and import cost: seconds, processor seconds, peak memory and size, as whole processes.

    python benchmarks/gguf_files.py [--models DIR] [--types q8_0 bf16 q4_0] [--size 1.1b] [--text FILE] [--write]

Each folder of --models (SmolLM2-135M, Gemma-3-270M) is exported in each type, and each file of its gguf/ imported; then
a Llama of 1.1 B parameters with random weights is exported. With --text, bits per byte before and after. Targets:
export of SmolLM2-135M to q8_0 and its import in under 15 seconds each, and less than 600 MB of peak memory for the
model of 1.1 B.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

from merge import make, measured
from results_file import add_table

from lapis.formats.vocabulary.probe import LINES
from lapis.text.tokenizer.tokenizer import train_tokenizer


def timed(command: list[str], place: Path) -> tuple[float, float, int, dict[str, object]]:
    """Seconds, processor seconds, peak bytes, and what the command printed as JSON."""
    log = place / "log"
    seconds, peak, cpu, status = measured([sys.executable, "-m", "lapis", *command, "--json"], log, 0, [])
    text = log.read_text()
    if status:
        raise SystemExit(f"{' '.join(command)}: {text[-500:]}")
    return seconds, cpu, peak, json.loads(next(line for line in text.splitlines() if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path)
    parser.add_argument("--types", nargs="+", default=["q8_0", "bf16", "q4_0"])
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [f"{date.today()}: {platform.machine()}, Python {platform.python_version()}, one run each, "
             f"load {os.getloadavg()[0]:.0f}", "",
             "| what | seconds | processor, s | peak MB | file or weights, MB | bits per byte |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    print("\n".join(lines))

    def row(name: str, command: list[str], place: Path) -> None:
        seconds, cpu, peak, result = timed(command, place)
        bits = result.get("bits_per_byte")
        cost = f"{bits['before']:.4f} -> {bits['after']:.4f}" if isinstance(bits, dict) else ""
        size = f"{float(str(result['bytes'])) / 1e6:,.0f}"
        lines.append(f"| {name} | {seconds:.1f} | {cpu:.1f} | {peak / 1e6:,.0f} | {size} | {cost} |")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folders = sorted(path.parent for path in options.models.glob("*/config.json")) if options.models else []
        for folder in folders:
            for kind in options.types:
                command = ["export", str(folder), "--gguf", str(place / "x.gguf"), "--type", kind, "--overwrite"]
                row(f"export {folder.name} to {kind}", command, place)
                if options.text:
                    command += ["--text", str(options.text)]
                    row(f"export {folder.name} to {kind}, with --text", command, place)
        for file in sorted((options.models / "gguf").glob("*.gguf")) if options.models else []:
            row(f"import {file.name}", ["import", str(file), "--out", str(place / "back"), "--overwrite"], place)
        folder = place / "random"
        make(folder, options.size, 0)
        train_tokenizer(list(LINES), 600).save(folder)
        for kind in options.types:
            command = ["export", str(folder), "--gguf", str(place / "x.gguf"), "--type", kind, "--overwrite"]
            row(f"export {options.size} of random weights to {kind}", command, place)
    if options.write:
        add_table(__file__, "What export and import cost", lines)


if __name__ == "__main__":
    main()
