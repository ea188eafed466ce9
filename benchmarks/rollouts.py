"""New tokens per second of rollouts: lapis and transformers' generate, same weights, same batch, in turn.

    python benchmarks/rollouts.py [--rounds 3] [--write]

A policy's step asks for several replies to each prompt. Both draw at temperature 1 from the whole vocabulary, in
float32, with a cache and no end token; prompts differ in length by up to a quarter. transformers gets
num_return_sequences; lapis also gives each token's log-probability, for which others go through the model again. A
round runs each engine on each size, one after the other; the figure is the best round, since other work on the machine
only slows. Weights are random. Leaves out: servers of their own for rollouts.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from results_file import add_table

SIZES: dict[str, dict[str, Any]] = {
    "5 M": {"dim": 256, "layers": 6, "heads": 4, "ffn_dim": 704, "vocab": 4096, "context": 1024, "tied": True},
    "124 M": {"dim": 768, "layers": 12, "heads": 12, "ffn_dim": 2048, "vocab": 50_257, "context": 1024, "tied": True},
}


class Lapis:
    def __init__(self, folder: Path) -> None:
        from lapis.model.load import load

        self.model = load(folder, dtype=torch.float32).eval()

    def run(self, prompts: list[list[int]], group: int, tokens: int) -> int:
        from lapis.training.objectives.policy.rollouts import sample_rollouts

        made = sample_rollouts(
            self.model, prompts, range(len(prompts)), [], group=group, max_tokens=tokens, temperature=1.0, seed=0
        )
        return int(made.mask_BR.sum())


class Transformers:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def run(self, prompts: list[list[int]], group: int, tokens: int) -> int:
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        made = self.model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0,
            num_return_sequences=group, pad_token_id=0,
        )  # fmt: skip
        return int(made[:, longest:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/rollouts.md")
    options = parser.parse_args()
    from lapis.families.config import ModelConfig
    from lapis.model.load import save
    from lapis.model.transformer import Transformer

    lines = ["| new tokens per second | transformers | lapis | ratio |", "|---|---:|---:|---:|"]
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            torch.manual_seed(0)
            save(Transformer(ModelConfig(**SIZES[size])), Path(place))
            engines = {"transformers": Transformers(Path(place)), "lapis": Lapis(Path(place))}
        draw = torch.Generator().manual_seed(0)
        lengths = [options.prompt - i * options.prompt // (4 * options.prompts) for i in range(options.prompts)]
        prompts = [torch.randint(1, SIZES[size]["vocab"], (n,), generator=draw).tolist() for n in lengths]
        best = dict.fromkeys(engines, 0.0)
        for turn, (name, engine) in product(range(-1, options.rounds), engines.items()):
            begun = time.perf_counter()
            made = engine.run(prompts, options.group, 4 if turn < 0 else options.tokens)
            if turn >= 0:  # the first round only warms up
                best[name] = max(best[name], made / (time.perf_counter() - begun))
        theirs, ours = best["transformers"], best["lapis"]
        lines.append(f"| {size} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.2f} |")
    head = (
        f"{date.today()}: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; {options.prompts} prompts of about {options.prompt} tokens, "
        f"{options.group} replies each, {options.tokens} new tokens, best of {options.rounds}"
    )
    print("\n".join([head, "", *lines]))
    if options.write:
        add_table(__file__, "Rollouts, side by side", [head, "", *lines])
    print(" ".join(sys.argv), file=sys.stderr)


if __name__ == "__main__":
    main()
