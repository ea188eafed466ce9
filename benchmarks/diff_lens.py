"""What looking costs: `lapis diff` against reading the files, and `lapis lens` against one plain forward pass.

    python benchmarks/diff_lens.py [--rounds 5] [--skip diff|lens] [--tune TEXT] [--write]

Diff: two bf16 checkpoints of 1.1 B parameters, whole processes, round after round: `cat` of both files, the start-up of
lapis (the same command on two tiny checkpoints), `lapis diff`, and a script that loads both with transformers and goes
through their state dicts. Targets: at most twice cat and start-up, four times as fast as the script, 600 MB at most.

Lens: random weights in the shape of Qwen2.5-0.5B, 64 random ids, three tracked words, each with and without a leading
space; two of them are two tokens without it, so that second tokens are read too. The last columns track the same words
with their space only. After loading, a plain pass `model(ids)` and a lens (all layers and both halves, top tokens,
ranks, entropy, KL, contributions, the check against the model's own logits) run in turn: medians over rounds, by the
clock and of processor time, which other load on the machine disturbs less. Peak memory is that of a new process that
loads a folder and looks once. Targets: 1.5 times the plain pass, and the weights plus 300 MB. Leaves out: the grid of a
page, a walk over the head per 64 of its tokens.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from merge import DIFF_STATE_DICTS, make, measured
from results_file import add_table

SHAPE = {
    "dim": 896, "layers": 24, "heads": 14, "kv_heads": 2, "ffn_dim": 4864, "vocab": 151_936, "context": 32_768,
    "family": "qwen2", "bias": "qkv", "tied": True,
}  # fmt: skip
WORDS = ["Malaysia", "Indonesia", "Myanmar"]

PEAK = """
import sys, torch, lapis, lapis.lens
model, tokenizer = lapis.load(sys.argv[1], getattr(torch, sys.argv[2]))
ids = torch.arange(int(sys.argv[4])) % 200
if sys.argv[3] == "lens":
    lapis.lens(model, tokenizer, ids.tolist(), sys.argv[5])
elif sys.argv[3] == "plain":
    with torch.inference_mode():
        model(ids[None])
weights = sum(p.nbytes for p in model.parameters())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # of this program alone
print(int(peak.split()[1]) * 1024 - weights, weights)
"""


def make_folder(folder: Path) -> None:
    """A model folder of that shape, and a small tokenizer: " Malaysia" is one token, "Malaysia" two: "M", "alaysia"."""
    from lapis.families.config import ModelConfig, Rope
    from lapis.model.load import save
    from lapis.model.transformer import Transformer
    from lapis.text.tokenizer.tokenizer import train_tokenizer

    torch.manual_seed(0)
    save(Transformer(ModelConfig(**SHAPE, rope=Rope(theta=1_000_000.0))).to(torch.bfloat16), folder)
    text = [f"in {word}, {a}{word[1:]} {b}{word[1:]}. " for word in WORDS for a, b in ("QX", "ZJ", "VK")]
    train_tokenizer(text * 50, 340).save(folder)


def times(folder: Path, dtype: torch.dtype, rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Median seconds of the plain pass and of the lens: "clock" and "processor"."""
    import lapis

    model, tokenizer = lapis.load(folder, dtype)
    ids_BT = torch.randint(0, 330, (1, tokens), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def plain() -> None:
        model(ids_BT)

    def look() -> None:
        lapis.lens(model, tokenizer, ids_BT[0].tolist(), WORDS)

    def look_spaced() -> None:
        lapis.lens(model, tokenizer, ids_BT[0].tolist(), [" " + word for word in WORDS])

    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(-2, rounds):  # the first rounds only warm up
        for name, run in (("plain", plain), ("lens", look), ("spaced", look_spaced)):
            clock, processor = time.perf_counter(), time.process_time()
            run()
            spent = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
            if turn >= 0:
                for kind, seconds in spent.items():
                    found.setdefault(name, {}).setdefault(kind, []).append(seconds)
    return {name: {kind: statistics.median(all_) for kind, all_ in kinds.items()} for name, kinds in found.items()}


def peak(folder: Path, dtype: torch.dtype, what: str, tokens: int) -> tuple[int, int]:
    """Peak memory of a process beyond the weights, and the weights, in bytes."""
    arguments = [str(folder), str(dtype).removeprefix("torch."), what, str(tokens), ",".join(WORDS)]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], check=True, capture_output=True, text=True)
    beyond, weights = map(int, done.stdout.split())
    return beyond, weights


def tuning(folder: Path, text: Path) -> str:
    """Seconds that a tuned lens takes on a text file, and what it does to the KL (with random weights, little)."""
    import lapis
    from lapis.inside.lens.tuned import tune

    model, tokenizer = lapis.load(folder, torch.bfloat16)
    start = time.perf_counter()
    made = tune(model, tokenizer, text)
    seconds = time.perf_counter() - start
    before, after = (sum(made.info[key]) / len(made.info[key]) for key in ("kl_before", "kl_after"))
    return (
        f"A tuned lens on {made.info['tokens']:,} tokens, bfloat16: {seconds:.0f} s; mean KL on held-out text "
        f"{before:.3f} -> {after:.3f} nats (random weights)."
    )


def diff_lines(place: Path, rounds: int) -> list[str]:
    """The table of diff, and a line of ratios."""
    for size in ("1.1b", "tiny"):
        if not (place / size / "chat" / "config.json").exists():
            make(place / size / "base", size, 1)
            make(place / size / "chat", size, 2, place / size / "base")
    script = place / "diff_state_dicts.py"
    script.write_text(DIFF_STATE_DICTS)
    one, two, *tiny = (str(place / size / name) for size in ("1.1b", "tiny") for name in ("base", "chat"))
    diff = [sys.executable, "-m", "lapis", "diff", "--json"]
    contestants = {
        "cat of both files": ["sh", "-c", f"cat {one}/*.safetensors {two}/*.safetensors > /dev/null"],
        "start-up: lapis diff of tiny models": [*diff, *tiny],
        "lapis diff": [*diff, one, two],
        "transformers, state dicts": [sys.executable, str(script), one, two],
    }
    seen: dict[str, list[tuple[float, int, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, command in contestants.items():
            seconds, peak, cpu, status = measured(command, place / "log.txt", 1 << 30)
            if status:
                raise SystemExit(f"{name}: exit {status}: {(place / 'log.txt').read_text()[-500:]}")
            seen[name].append((seconds, peak, cpu))
    lines = ["| two checkpoints of 1.1 B, bf16 | seconds | min to max | processor, s | peak MB |"]
    lines += ["|---|---:|---:|---:|---:|"]
    median = {name: statistics.median(run[0] for run in runs) for name, runs in seen.items()}
    for name, runs in seen.items():
        times = [run[0] for run in runs]
        lines.append(
            f"| {name} | {median[name]:.2f} | {min(times):.2f} to {max(times):.2f} "
            f"| {statistics.median(run[2] for run in runs):.2f} | {max(run[1] for run in runs) / 1e6:,.0f} |"
        )
    cat, startup, ours, theirs = median.values()
    return [
        *lines, "",
        f"`lapis diff` takes {ours / (cat + startup):.2f} times cat and start-up; the script takes {theirs / ours:.1f} "
        "times as long as `lapis diff`.",
    ]  # fmt: skip


def lens_lines(folder: Path, rounds: int, tokens: int, text: Path | None) -> list[str]:
    """The table of the lens."""
    if not (folder / "tokenizer.json").exists():
        make_folder(folder)
    lines = [
        "| lens, weights | plain, s | lens, s | ratio | ratio, processor | MB beyond weights: loaded | plain | lens "
        "| ratio, one token per word | its processor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for dtype in (torch.bfloat16, torch.float32):
        found = times(folder, dtype, rounds, tokens)
        ratios = [
            found[what][kind] / found["plain"][kind] for what in ("lens", "spaced") for kind in ("clock", "processor")
        ]
        beyond = [peak(folder, dtype, what, tokens)[0] / 1e6 for what in ("load", "plain", "lens")]
        name = str(dtype).removeprefix("torch.")
        lines.append(
            f"| {name} | {found['plain']['clock']:.3f} | {found['lens']['clock']:.3f} | {ratios[0]:.2f} "
            f"| {ratios[1]:.2f} | " + " | ".join(f"{mb:.0f}" for mb in beyond)
            + f" | {ratios[2]:.2f} | {ratios[3]:.2f} |"
        )  # fmt: skip
    return [*lines, "", tuning(folder, text)] if text else lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--skip", choices=("diff", "lens"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lapis-bench-diff-lens")
    parser.add_argument("--tune", type=Path, help="a text file: also time a tuned lens on it")
    parser.add_argument("--write", action="store_true", help="keep the tables in benchmarks/results/diff_lens.md")
    options = parser.parse_args()
    lines = [
        f"{date.today()}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; median of {options.rounds} rounds; lens: {options.tokens} tokens, "
        f"{len(WORDS)} words."
    ]
    if options.skip != "diff":
        lines += ["", *diff_lines(options.work, options.rounds)]
    if options.skip != "lens":
        lines += ["", *lens_lines(options.work / "lens", 2 * options.rounds - 1, options.tokens, options.tune)]
    print("\n".join(lines))
    if options.write:
        add_table(__file__, "What looking costs", lines)


if __name__ == "__main__":
    main()
