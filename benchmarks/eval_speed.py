"""How fast `lapis eval`'s own computation reads text and chats, beside transformers' forward pass over the same rows.

    python benchmarks/eval_speed.py MODEL [--rows 24] [--length 256] [--repeats 5] [--dtype bfloat16]

Both give the nats of every token of the same rows, in the same precision, on the same number of threads, in turn in one
process; medians of the repeats. Texts are rows of one length. Chats are rows of mixed lengths in which only the second
half is scored; transformers gets 8 of them in a batch, sorted by length and padded, which is the usual way. Seconds are
wall-clock; beside them the processor's seconds, which a busy machine changes less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from hardware import processor

from lapis.model.load import load
from lapis.model.scoring import ScoredSequence, nll

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
Score = Callable[[], float]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of the processor, which matter here


def theirs(model: torch.nn.Module, sequences: list[ScoredSequence], batch: int) -> float:
    """Nats of all scored tokens by transformers' forward pass, rows sorted by length and padded."""
    ordered, total = sorted(sequences, key=lambda sequence: len(sequence.ids)), 0.0
    with torch.inference_mode():
        for first in range(0, len(ordered), batch):
            rows = ordered[first : first + batch]
            longest = max(len(row.ids) for row in rows)
            ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
            scored_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
            mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
            for i, row in enumerate(rows):
                ids_BT[i, : len(row.ids)] = torch.as_tensor(row.ids)
                scored_BT[i, : len(row.ids)] = torch.as_tensor(row.scored)
                mask_BT[i, : len(row.ids)] = 1
            whole = bool(mask_BT.all())
            logits_BTV = model(input_ids=ids_BT, attention_mask=None if whole else mask_BT, use_cache=False).logits
            kept_BT = scored_BT[:, 1:]
            nats = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1][kept_BT].float(), ids_BT[:, 1:][kept_BT], reduction="sum"
            )
            total += float(nats)
    return total


def timed(score: Score) -> tuple[float, float, float]:
    """What it gives, wall-clock seconds and processor seconds."""
    wall, own = time.perf_counter(), time.process_time()
    value = score()
    return value, time.perf_counter() - wall, time.process_time() - own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    other = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    own = load(options.model, dtype)
    generator = torch.Generator().manual_seed(0)

    def sequence(length: int, first: int) -> ScoredSequence:
        ids = torch.randint(0, own.config.vocab, (length,), generator=generator).tolist()
        return ScoredSequence(ids, [False] * first + [True] * (length - first))

    lengths = torch.randint(options.length // 8, options.length, (options.rows,), generator=generator).tolist()
    kinds = {
        "text": [sequence(options.length, 1) for _ in range(options.rows)],
        "chats": [sequence(length, length // 2) for length in lengths],
    }
    result = {"processor": processor(*FLAGS), "threads": options.threads, "dtype": options.dtype,
              "torch": torch.__version__, "transformers": transformers.__version__, "rows": options.rows,
              "length": options.length}  # fmt: skip
    for kind, sequences in kinds.items():
        ways: dict[str, Score] = {
            "lapis": lambda s=sequences: sum(nll(own, s)),  # type: ignore[misc]
            "transformers": lambda s=sequences: theirs(other, s, 8),  # type: ignore[misc]
        }
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                runs[name].append(timed(way))
        middle = {
            name: {
                "nats": rows[0][0],
                "seconds": statistics.median(row[1] for row in rows),
                "processor_seconds": statistics.median(row[2] for row in rows),
            }
            for name, rows in runs.items()
        }
        ratio = statistics.median(b[1] / a[1] for a, b in zip(runs["lapis"], runs["transformers"], strict=True))
        result[kind] = {**middle, "times_faster": ratio, "tokens": sum(len(s.ids) for s in sequences)}  # type: ignore[assignment]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
