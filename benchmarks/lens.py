"""What the lens costs: its time against one plain forward pass, and its peak memory against the weights.

    python benchmarks/lens.py [--rounds 9] [--tokens 64] [--write]

Weights are random, in the shape of Qwen2.5-0.5B; the prompt is random ids. Three words are tracked, each with and
without a leading space; two of them are two tokens without it, so that second tokens are read on too. The last columns
track the same words with their space only. After loading, a plain pass `model(ids)` and a lens (all layers and both
halves, top tokens, ranks, entropy, KL, contributions, the check against the model's own logits) run in turn; the
figures are medians over rounds, in seconds by the clock and in seconds of processor time, which other load on the
machine disturbs less. Peak memory is that of a new process that loads a folder and looks once. Targets: 1.5 times the
plain pass, and the weights plus 300 MB. Leaves out: the grid of a page, a walk over the head per 64 of its tokens.
"""

import argparse
import json
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
    from lapis.model import ModelConfig, Rope, Transformer, save
    from lapis.text.tokenizer import train_tokenizer

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
    from lapis.lens import tune

    model, tokenizer = lapis.load(folder, torch.bfloat16)
    start = time.perf_counter()
    made = tune(model, tokenizer, text)
    seconds = time.perf_counter() - start
    before, after = (sum(made.info[key]) / len(made.info[key]) for key in ("kl_before", "kl_after"))
    return (
        f"A tuned lens on {made.info['tokens']:,} tokens, bfloat16: {seconds:.0f} s; mean KL on held-out text "
        f"{before:.3f} -> {after:.3f} nats (random weights)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lapis-bench-lens")
    parser.add_argument("--tune", type=Path, help="a text file: also time a tuned lens on it")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/lens.md")
    options = parser.parse_args()
    if not (options.folder / "tokenizer.json").exists():
        make_folder(options.folder)
    lines = [
        "| weights | plain, s | lens, s | ratio | ratio, processor | MB beyond weights: loaded | plain | lens "
        "| ratio, one token per word | its processor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    result = {}
    for dtype in (torch.bfloat16, torch.float32):
        found = times(options.folder, dtype, options.rounds, options.tokens)
        ratios = {
            f"{what} {kind}": found[what][kind] / found["plain"][kind]
            for what in ("lens", "spaced") for kind in ("clock", "processor")
        }  # fmt: skip
        beyond = {
            what: peak(options.folder, dtype, what, options.tokens)[0] / 1e6 for what in ("load", "plain", "lens")
        }
        name = str(dtype).removeprefix("torch.")
        lines.append(
            f"| {name} | {found['plain']['clock']:.3f} | {found['lens']['clock']:.3f} "
            f"| {ratios['lens clock']:.2f} | {ratios['lens processor']:.2f} | {beyond['load']:.0f} "
            f"| {beyond['plain']:.0f} | {beyond['lens']:.0f} "
            f"| {ratios['spaced clock']:.2f} | {ratios['spaced processor']:.2f} |"
        )
        result[name] = {**ratios, "beyond_mb": beyond["lens"]}
    head = (
        f"{date.today()}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; {options.tokens} tokens, {len(WORDS)} words, median of {options.rounds}."
    )
    if options.tune:
        lines += ["", tuning(options.folder, options.tune)]
    print("\n".join([head, "", *lines]))
    if options.write:
        place = Path(__file__).with_name("results") / "lens.md"
        place.parent.mkdir(exist_ok=True)
        before = place.read_text() if place.exists() else "# What the lens costs (benchmarks/lens.py)\n"
        place.write_text(f"{before}\n{head}\n\n" + "\n".join(lines) + "\n")
    print(json.dumps(result), file=sys.stderr)


if __name__ == "__main__":
    main()
