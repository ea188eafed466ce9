"""What the checks of inputs cost: a graft and the loading of a model, with them and without, in turn.

    python benchmarks/checks_cost.py [--dim 1024 --layers 16] [--rounds 7] [--write]

Three models of one shape with random weights. Without: the checksum of what is read, and the look for NaN and Inf as
weights are loaded, are replaced by nothing. Ratios are of medians of processor seconds and of wall seconds. With
--write the table goes to benchmarks/results/checks_cost.md.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from lapis.families.config import ModelConfig
from lapis.model import load as loading
from lapis.model.transformer import Transformer
from lapis.weights.graft.graft import graft

RESULT = Path(__file__).parent / "results" / "checks_cost.md"


@contextmanager
def without_checks() -> Iterator[None]:
    with (
        mock.patch("lapis.weights.engine.tiles.checksum", lambda *_: 0),
        mock.patch("lapis.weights.engine.stream.checksum", lambda *_: 0),
        mock.patch.object(loading, "finite", lambda _: True),
    ):
        yield


def measure(act: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """(processor, wall) seconds: medians with the checks, then without."""
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    act()  # what is read once is then in the cache
    for turn in range(2 * rounds):
        checked = turn % 2 == 0
        begin, wall = time.process_time(), time.perf_counter()
        if checked:
            act()
        else:
            with without_checks():
                act()
        seconds[checked].append((time.process_time() - begin, time.perf_counter() - wall))
    return [
        (statistics.median(s for s, _ in seconds[checked]), statistics.median(w for _, w in seconds[checked]))
        for checked in (True, False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    shape = ModelConfig(
        dim=options.dim, layers=options.layers, heads=16, kv_heads=8, ffn_dim=4 * options.dim, vocab=32_000, context=512
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        torch.manual_seed(0)
        model = Transformer(shape).bfloat16()
        for name in ("base", "chat", "onto"):
            loading.save(model, root / name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.001)
        size = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))

        def one_graft() -> None:
            models = {name: root / name for name in ("base", "chat", "onto")}
            graft(**models, out=root / "out", same_tokens=True)
            shutil.rmtree(root / "out")

        jobs: dict[str, Callable[[], None]] = {
            "graft": one_graft,
            "load, bfloat16": lambda: loading.load(root / "base", torch.bfloat16) and None,
            "load as float32": lambda: loading.load(root / "base", torch.float32) and None,
        }
        lines = [
            "| job | processor s with | without | ratio | wall s with | without | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, act in jobs.items():
            (cpu, wall), (cpu_off, wall_off) = measure(act, options.rounds)
            lines.append(
                f"| {name} | {cpu:.2f} | {cpu_off:.2f} | {cpu / cpu_off:.3f} | {wall:.2f} | {wall_off:.2f} "
                f"| {wall / wall_off:.3f} |"
            )
    table = "\n".join(lines)
    print(table)
    if options.write:
        RESULT.write_text(
            f"# What the checks of inputs cost\n\nA model of {size / 1e9:.2f} GB in bfloat16, files in the page cache, "
            f"medians of {options.rounds} rounds in turn, on one thread of a machine that others use. "
            f"`python benchmarks/checks_cost.py`.\n\n{table}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
