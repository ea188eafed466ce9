"""Training beside its peers: tokens per second, peak memory, and minutes to a loss.

    python benchmarks/train.py --only speed          a few minutes, alone on the machine
    python benchmarks/train.py --only memory
    python benchmarks/train.py --only loss --seed 0  (or --only ablation); needs --data, a folder with corpus/en
    python benchmarks/train.py --only gpu            tokens per second and MFU; tiny shapes on a CPU
    python benchmarks/train.py --write               puts the pieces into benchmarks/results/train.md

Each piece leaves a JSON file in --folder, so that a run can be cut. One shape throughout: 6 layers, 384 wide,
vocabulary 8192, 256 tokens x 16 rows, bfloat16, 14 million parameters. Loops run in turn, a few steps each, several
rounds; the figure is the median over steps. A step begins before its batch is made and ends after its optimizer.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hardware import processor
from torch import Tensor

HERE = Path(__file__).parent
SIZES = {"dim": 384, "layers": 6, "heads": 6, "vocab": 8192, "context": 256}
GPT2 = {**SIZES, "ffn_dim": 1536, "family": "gpt2", "norm": "layer", "positions": "learned", "bias": "all",
        "mlp": "gelu_tanh", "tied": True}  # fmt: skip
RECIPE = {**SIZES, "ffn_dim": 1024, "family": "qwen3", "qk_norm": True, "tied": True}
BATCH = 16
STEP_TOKENS = BATCH * SIZES["context"]
LOOPS = (
    "transformers Trainer, GPT-2, AdamW",
    "bare GPT loop, fused AdamW",
    "lapis, GPT-2, AdamW",
    "lapis, its recipe, Muon",
)


def random_rows(count: int = 256) -> Any:
    """Packed rows of random tokens, for speed only."""
    import numpy as np

    from lapis.text.rows.rows import Rows

    length, vocab = SIZES["context"], SIZES["vocab"]
    tokens = np.random.default_rng(0).integers(3, vocab, count * length).astype("uint16")
    counts = {"bytes": 4 * len(tokens), "supervised": len(tokens), "tokens": len(tokens), "padding": 0,
              "documents": count}  # fmt: skip
    info = {"kind": "documents", "length": length, "rows": count, "digest": "random", "counts": counts,
            "end": 0, "pad": 0, "vocab": vocab, "tokenizer": "none"}  # fmt: skip
    return Rows(info, {"tokens": tokens, "starts": np.arange(0, len(tokens) + 1, length, dtype="int64")})


class NoTokenizer:
    """Rows of random tokens have no text."""

    end_ids = ()

    def digest(self) -> str:
        return "none"

    def save(self, folder: Path) -> None:
        pass


def tensors(rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as a tutorial has them: slices of one tensor."""
    batch = rows.take(__import__("numpy").arange(len(rows)))
    while True:
        for first in range(0, len(rows) - BATCH, BATCH):
            yield batch.ids_BT[first : first + BATCH], batch.targets_BT[first : first + BATCH]


def lapis_seconds(rows: Any, shape: dict[str, Any], optimizer: str, steps: int, threads: int) -> list[float]:
    """`lapis.train` as a user calls it; its settings are given, so that nothing is measured within."""
    from lapis.families.config import ModelConfig
    from lapis.model.transformer import Transformer
    from lapis.training.config import TrainConfig
    from lapis.training.loop.loop import train
    from lapis.training.loop.progress import Silent
    from lapis.training.objectives.supervised.next_token import Causal

    torch.manual_seed(0)
    config = TrainConfig(
        steps=steps + 1, batch=BATCH, optimizer=optimizer, lr=1e-3, log_every=1, sample_every=0, precision="bf16",
        threads=threads, compile="off",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        objective = Causal(NoTokenizer(), rows)
        result = train(Transformer(ModelConfig(**shape)), objective, config, Path(place) / "out", watch=Silent())
    return [row["train_seconds"] for row in result.log[1:]]


def loop(name: str, steps: int, threads: int) -> Callable[[], list[float]]:
    """Seconds of `steps` steps of the named loop, the first one left out, each time it is called."""
    from train_peers import bare_steps, trainer_seconds

    torch.set_num_threads(threads)
    rows = random_rows()
    if name.startswith("bare"):
        running = bare_steps(tensors(rows), SIZES, 1e-3)
        return lambda: [next(running)[0] for _ in range(steps + 1)][1:]
    if name.startswith("transformers"):
        ids = rows.take(__import__("numpy").arange(len(rows))).ids_BT

        def trainer() -> list[float]:
            with tempfile.TemporaryDirectory() as place:
                return trainer_seconds(ids, SIZES, BATCH, steps + 1, Path(place))

        return trainer
    shape, optimizer = (GPT2, "adamw") if "GPT-2" in name else (RECIPE, "muon")
    return lambda: lapis_seconds(rows, shape, optimizer, steps, threads)


def measure_speed(rounds: int, steps: int, threads: int) -> dict[str, Any]:
    loops = {name: loop(name, steps, threads) for name in LOOPS}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, run in loops.items():
            seconds[name] += run()
            rate = STEP_TOKENS / statistics.median(seconds[name])
            print(f"round {number + 1}  {name:36} {rate:8,.0f} tokens/s", file=sys.stderr, flush=True)
    return {"threads": threads, "load": os.getloadavg()[0], "seconds": seconds}


def measure_memory(threads: int) -> dict[str, Any]:
    """Peak resident memory of a process that does nothing but one loop, and of one that only imports it."""
    peaks = {}
    for name in ("imports", *LOOPS):
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); import train; "
            + ("import torch, transformers; train.peak()" if name == "imports" else
               f"train.loop({name!r}, 5, {threads})(); train.peak()")
        )  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout.split()[-1])
        print(f"{name:36} {peaks[name] / 1e6:8,.0f} MB", file=sys.stderr, flush=True)
    return {"threads": threads, "peak_bytes": peaks, "logits_bytes": largest_logits()}


def peak() -> None:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def largest_logits(vocab: int = 151_936, rows: int = 8 * 1024, dim: int = 16) -> int:
    """Bytes of all that has a column for each token of the vocabulary, over a loss and its gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lapis.training.objectives.supervised.cross_entropy import head_cross_entropy

    found: dict[int, int] = {}

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == vocab:
                found[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
            return out

    hidden, weight = torch.randn(rows, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Watching():
        head_cross_entropy(hidden, weight, torch.arange(rows)).backward()
    return sum(found.values())


def measure_gpu(device: str, steps: int) -> dict[str, Any]:
    """Tokens per second and MFU (Chowdhery et al. 2022, appendix B: model FLOPs over the peak's) of lapis alone."""
    from lapis.families.config import ModelConfig
    from lapis.model.size import measure
    from lapis.model.transformer import Transformer
    from lapis.training.config import TrainConfig
    from lapis.training.loop.loop import train
    from lapis.training.loop.progress import Silent
    from lapis.training.objectives.supervised.next_token import Causal

    cuda = device == "cuda"
    shapes = {
        "124 M": ({"dim": 768, "layers": 12, "heads": 12, "ffn_dim": 2048, "vocab": 50304, "context": 1024}, 32),
        "1 B": ({"dim": 2048, "layers": 16, "heads": 16, "ffn_dim": 8192, "vocab": 50304, "context": 2048}, 8),
    }
    if not cuda:
        shapes = {"tiny": ({"dim": 64, "layers": 2, "heads": 4, "ffn_dim": 128, "vocab": 512, "context": 64}, 4)}
    found = {}
    for name, (sizes, batch) in shapes.items():
        shape = ModelConfig(**sizes, family="qwen3", qk_norm=True, tied=True)
        SIZES.update(vocab=sizes["vocab"], context=sizes["context"])
        model = Transformer(shape).to(device)
        config = TrainConfig(steps=steps, batch=batch, optimizer="muon", log_every=1, sample_every=0, threads=1,
                             precision="bf16", compile="on" if cuda else "off")  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            objective = Causal(NoTokenizer(), random_rows(64))
            result = train(model, objective, config, Path(place) / "out", watch=Silent())
        rate = statistics.median(row["tokens_per_second"] for row in result.log[steps // 2 :])
        flops = 3 * measure(shape, sizes["context"]).flops_per_token * rate
        found[name] = {"tokens_per_second": rate, "flops": flops, "mfu": flops / peak_flops(device)}
        print(f"{name:8} {rate:10,.0f} tokens/s  MFU {found[name]['mfu']:.1%}", file=sys.stderr, flush=True)
    return {"device": torch.cuda.get_device_name() if cuda else "cpu", "shapes": found}


def peak_flops(device: str) -> float:
    """bfloat16 FLOP/s by the maker's sheet (dense), or those of a large product where the device is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for part, flops in {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}.items():
        if part in name:
            return flops
    a = torch.randn(1024, 1024, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - begin)
    return float(2 * 1024**3 / min(times))


def machine() -> str:
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "memory", "loss", "ablation", "gpu"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the minutes of loss and ablation")
    parser.add_argument("--run", action="append", help="only these runs of loss and ablation")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LAPIS_DATA", "../shared/data")))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-train"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/train.md")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    import train_loss

    for piece in [given.only] if given.only else [] if given.write else ["speed", "memory", "loss", "ablation", "gpu"]:
        if piece in ("loss", "ablation"):
            train_loss.measure(piece, given)
            continue
        found = (
            measure_speed(given.rounds, given.steps, given.threads) if piece == "speed"
            else measure_memory(given.threads) if piece == "memory"
            else measure_gpu(given.device, 30 if given.device == "cuda" else 6)
        )  # fmt: skip
        stamp = {"date": str(date.today()), "machine": machine()}
        (given.folder / f"{piece}.json").write_text(json.dumps({**stamp, **found}, indent=1))
    text = train_loss.tables(given.folder)
    print(text)
    if given.write:
        (HERE / "results" / "train.md").write_text(text)


if __name__ == "__main__":
    main()
