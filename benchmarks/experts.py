"""Tokens per second through a mixture of experts: lapis and transformers' eager path, same weights, in turn.

    python benchmarks/experts.py [--rounds 5] [--batch 8] [--length 256] [--threads 1] [--write]

Weights and ids are random, in float32, in the shape of a small Qwen3-MoE. transformers runs with eager attention and
eager experts, and with what it chooses by itself. A round runs each engine once, forward alone and then with the
backward pass of a loss; the figure is the median round, in seconds of the processor (of all threads), since other work
on the machine takes time of the clock and less of that. `products alone` is what no engine that makes them can go
below: all matrix products of a pass, each expert's over an even share of the rows, and attention, on arrays that are
there already; nothing is sorted, gathered, normed, weighed or added. Leaves out: GPUs, generation, other engines.
"""

import argparse
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from hardware import processor
from results_file import add_table

SHAPE = {"dim": 512, "layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 64, "ffn_dim": 192, "vocab": 4096,
         "context": 1024, "family": "qwen3_moe", "qk_norm": True}  # fmt: skip
EXPERTS, ACTIVE = 64, 8
ALONE = "products alone"

Logits = Callable[[torch.Tensor], torch.Tensor]


def engines(folder: Path) -> dict[str, Logits]:
    """Name -> ids [B, T] to logits [B, T, V]; all have the weights of one folder."""
    from transformers import AutoModelForCausalLM, logging

    from lapis.families.config import Experts, ModelConfig
    from lapis.model.load import load, save
    from lapis.model.transformer import Transformer

    torch.manual_seed(0)
    save(Transformer(ModelConfig(**SHAPE, experts=Experts(EXPERTS, ACTIVE))), folder)
    logging.disable_progress_bar()
    made: dict[str, Logits] = {}
    for name, options in {
        "transformers, eager": {"attn_implementation": "eager", "experts_implementation": "eager"},
        "transformers": {},
    }.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        made[name] = lambda ids, model=model: model(input_ids=ids, use_cache=False).logits
    made["lapis"] = load(folder)
    return made


class Products:
    """The products of a pass and nothing else; with gradients also the two that each has on the way back."""

    def __init__(self, batch: int, length: int) -> None:
        self.tokens = batch * length
        dim, inner, kv = SHAPE["dim"], SHAPE["heads"] * SHAPE["head_dim"], SHAPE["kv_heads"] * SHAPE["head_dim"]
        rows, width = self.tokens * ACTIVE // EXPERTS, SHAPE["ffn_dim"]
        of_layer = [
            (self.tokens, dim, inner),
            (self.tokens, dim, kv),
            (self.tokens, dim, kv),
            (self.tokens, inner, dim),
        ]
        of_layer += EXPERTS * [(rows, dim, width), (rows, dim, width), (rows, width, dim)]
        self.made: dict[tuple[int, int, int], list[torch.Tensor]] = {}
        self.order = [*(of_layer * SHAPE["layers"]), (self.tokens, dim, SHAPE["vocab"])]
        for rows, inputs, outputs in dict.fromkeys(self.order):
            shapes = ((rows, inputs), (outputs, inputs), (rows, outputs), (rows, inputs), (outputs, inputs))
            self.made[rows, inputs, outputs] = [torch.randn(shape) for shape in shapes]
        self.heads = torch.randn(batch, SHAPE["heads"], length, SHAPE["head_dim"], requires_grad=True)

    def seconds(self, learn: bool) -> float:
        """Processor seconds of one pass."""
        start = time.process_time()
        for key in self.order:
            x, weight, y, to_x, to_weight = self.made[key]
            torch.mm(x, weight.t(), out=y)
            if learn:
                torch.mm(y, weight, out=to_x)
                torch.mm(y.t(), x, out=to_weight)
        with torch.set_grad_enabled(learn):
            for _ in range(SHAPE["layers"]):
                mixed = F.scaled_dot_product_attention(self.heads, self.heads, self.heads, is_causal=True)
                if learn:
                    mixed.sum().backward()
        return time.process_time() - start


def seconds(logits_of: Logits, ids_BT: torch.Tensor, learn: bool) -> float:
    """Processor seconds of one pass."""
    start = time.process_time()
    with torch.set_grad_enabled(learn):
        logits_BTV = logits_of(ids_BT)
        if learn:
            F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten()).backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/experts.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spent: dict[tuple[str, bool], list[float]] = defaultdict(list)
    products = Products(options.batch, options.length)
    with tempfile.TemporaryDirectory() as folder:
        made = engines(Path(folder))
        ids_BT = torch.randint(0, 4096, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            first, *others = (logits_of(ids_BT[:1]) for logits_of in made.values())
        for other in others:  # where two experts are equally probable up to rounding, one token may differ
            assert ((first - other).abs().amax(-1) > 1e-4).float().mean() <= 0.01
        for _ in range(options.rounds):
            for learn in (False, True):
                for name, logits_of in made.items():
                    spent[name, learn].append(seconds(logits_of, ids_BT, learn))
                spent[ALONE, learn].append(products.seconds(learn))
    middle = {key: median(rounds) for key, rounds in spent.items()}
    tokens = options.batch * options.length
    lines = ["| tokens per processor second | forward | lapis' ratio | forward and backward | lapis' ratio |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for name in (*made, ALONE):
        cells = [f"{tokens / middle[name, learn]:,.0f} | {middle[name, learn] / middle['lapis', learn]:.2f}"
                 for learn in (False, True)]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    size = f"{SHAPE['layers']} layers of {EXPERTS} experts of {SHAPE['dim']} x {SHAPE['ffn_dim']}, {ACTIVE} active"
    head = (
        f"{date.today()}: {processor()}, {os.cpu_count()} cores, {options.threads} thread(s), {platform.system()}, "
        f"torch {torch.__version__}, float32; {options.batch} x {options.length} tokens, {size}; median of "
        f"{options.rounds}; load average {os.getloadavg()[0]:.0f}."
    )
    print("\n".join([head, "", *lines]))
    if options.write:
        add_table(__file__, "Mixtures of experts, side by side", [head, "", *lines])


if __name__ == "__main__":
    main()
