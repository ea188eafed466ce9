"""What scoring every layer costs, in forward passes and in memory, on random weights of a published shape.

    python benchmarks/plan_cost.py [--shape qwen2.5-0.5b] [--chats 64] [--pieces layers halves]

base is random, chat is base with small noise; chats are random ids, half of them scored. No text is scored unless
--text asks for as many tokens of it. Prints a line of JSON: seconds of a plain forward pass, of the scoring, their
ratio, the passes that the scoring counted, and peak memory beside that of the loaded model.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.commit import commit
from lapis.errors import DataError
from lapis.families import PRESETS, find
from lapis.model.load import save
from lapis.model.scoring import ScoredSequence
from lapis.model.transformer import Transformer
from lapis.planning.effects import sweep
from lapis.planning.held_out import HeldOut, Runner
from lapis.planning.pieces import Bench, pieces_of

TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--pieces", nargs="+", default=["layers"], choices=("layers", "halves", "components"))
    parser.add_argument("--write", type=Path, help="only write the two models here")
    parser.add_argument("--measure", nargs=2, type=Path, help="only measure with these")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.write:
        _write(options.shape, options.write)
    elif options.measure:
        try:
            print(json.dumps(measure(*options.measure, options)))
        except DataError:
            raise SystemExit(3) from None
    else:
        # each in a process of its own, so that peak memory is the scoring's
        with tempfile.TemporaryDirectory(prefix="plan-cost-") as scratch:
            pair = [f"{scratch}/base", f"{scratch}/chat"]
            again = [sys.executable, __file__, *sys.argv[1:]]
            subprocess.run([*again, "--write", scratch], check=True)
            if subprocess.run([*again, "--measure", *pair]).returncode == 3:
                # of two random models either may find the replies likelier
                subprocess.run([*again, "--measure", *reversed(pair)], check=True)


def measure(base: Path, chat: Path, options: argparse.Namespace) -> dict:
    one, two = open_checkpoint(base), open_checkpoint(chat)
    bench = Bench(one, one, two)
    loaded = _resident()
    ids = torch.randint(0, bench.model.config.vocab, (options.chats, TOKENS + 1)).tolist()
    half = [place > TOKENS // 2 for place in range(TOKENS + 1)]
    rows = [ScoredSequence(row, half) for row in ids]
    whole = [ScoredSequence(row, [place > 0 for place in range(TOKENS + 1)]) for row in ids] if options.text else []
    runner = Runner(bench.model, HeldOut(rows, whole, size=max(4 * len(whole) * TOKENS, 1)))
    pieces = list(dict.fromkeys(p for size in options.pieces for p in pieces_of(one, size)))

    def plain() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(ids), 2):
                bench.model(torch.tensor(ids[first : first + 2])[:, :-1])
        return time.perf_counter() - started

    started = time.perf_counter()
    effects = sweep(bench, runner, pieces, one.names)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    forward, layers = min(plain(), plain()), bench.model.config.layers
    largest = max(sum(one.info(n).elements for n in p.names) for p in pieces_of(one, "layers"))
    return {
        "shape": options.shape, "chats": options.chats, "pieces": len(pieces), "text": options.text,
        "forward_s": round(forward, 2), "scoring_s": round(seconds, 2),
        "forward_passes": round(seconds / forward, 1), "counted": round(effects.passes, 1),
        "allowed": 3 * (layers + 2), "model_gb": round(4 * sum(p.numel() for p in bench.model.parameters()) / 1e9, 3),
        "layer_gb": round(4 * largest / 1e9, 3), "loaded_gb": loaded,
        "peak_gb": round(peak, 3),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "cpus": os.cpu_count(),
    }  # fmt: skip


def _write(shape: str, root: Path) -> None:
    """base and chat in bfloat16, drawn one tensor after another."""
    config = find(PRESETS[shape]).read_config(PRESETS[shape])
    model = Transformer(config).to(torch.bfloat16)
    for name in ("base", "chat"):
        if name == "chat":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1e-3 * torch.randn_like(parameter))
        with commit(root / name) as staging:
            save(model, staging.path)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e9, 3)


if __name__ == "__main__":
    main()
