"""The same work by hand: transformers, tokenizers and a plain loop beside lapis, at equal processor seconds.

    python benchmarks/language_peer.py --out runs/language-real [--seed 0] [--do train|score|write]

After language_real.py, with the same options, which say how long.

The tokenizer gains tokens as most scripts do it: a new BPE is trained on the text, and its tokens that the old one
lacks are added with `add_tokens`; `resize_token_embeddings` makes their rows. Then AdamW trains everything, with a
linear warm-up and a cosine. Text, share of English, rows, peak rate, precision and seconds are those of lapis's run,
whose seconds hold the extension, too. Both are scored by the same function, on documents that no step reads.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from language_real import CONTEXT, Bench, benches, case_options
from language_runs import ENGLISH, bits_per_byte, keep, kept, say, table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lapis.text.corpus import corpus

CASE = "ko-smollm2"
WARMUP = 0.1  # share of the run


def texts(paths: list[Path]) -> list[str]:
    return [document.text for document in corpus.documents(paths)]


def extended(bench: Bench) -> tuple[Any, Any]:
    """Tokenizer and model with as many new tokens as lapis adds."""
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    model = AutoModelForCausalLM.from_pretrained(bench.base, dtype=torch.float32)
    fresh = tokenizer.train_new_from_iterator(texts(bench.files), 3 * bench.case.add)
    words = (fresh.decode([i]) for i in sorted(fresh.get_vocab().values()))
    old = {tokenizer.decode([i]) for i in range(len(tokenizer))}
    new = [word for word in dict.fromkeys(words) if word not in old and "\ufffd" not in word][: bench.case.add]
    tokenizer.add_tokens(new)
    model.resize_token_embeddings(len(tokenizer))
    return tokenizer, model


def batches(tokenizer: Any, bench: Bench, seed: int) -> Iterator[Tensor]:
    """Rows of CONTEXT tokens, a share of them English, in a random order, without end."""
    random = Random(seed)
    sources = []
    for paths in (bench.files, [ENGLISH]):
        ids = [i for text in texts(paths) for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        sources.append(torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT))
    while True:
        chosen = [sources[random.random() < bench.case.replay] for _ in range(bench.case.batch)]
        yield torch.stack([rows[random.randrange(len(rows))] for rows in chosen])


def train(bench: Bench, out: Path, seed: int) -> dict[str, float]:
    """Trains until the processor seconds are spent, and saves the model."""
    begun = time.process_time()
    torch.manual_seed(seed)
    tokenizer, model = extended(bench)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=bench.case.rates["with"], betas=(0.9, 0.95), weight_decay=0.1)
    steps = 0
    low = json.loads((bench.root / f"with-{seed}" / "training.json").read_text())["precision"] == "bf16"
    prepared = time.process_time() - begun
    for ids_BT in batches(tokenizer, bench, seed):
        spent = (time.process_time() - begun) / bench.case.seconds
        if spent >= 1:
            break
        scale = min(1.0, max(spent, 0.01) / WARMUP) * 0.5 * (1 + math.cos(math.pi * spent))
        for group in optimizer.param_groups:
            group["lr"] = bench.case.rates["with"] * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps % 5 == 0:
            say(f"step {steps}, {spent:.0%}, loss {loss.item():.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"seconds": time.process_time() - begun, "prepared": prepared, "steps": steps}


def main() -> None:
    parser = case_options(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    [bench] = benches(options, [CASE])
    place = bench.root / f"peer-{options.seed}"
    if options.do in ("train", None):
        kept(place.with_suffix(".json"), lambda: train(bench, place, options.seed))
    if options.do == "train":
        return
    scores = bench.scores()
    scores["peer"] = kept(bench.root / f"scores-{place.name}.json", lambda: bits_per_byte(place, bench.texts, CONTEXT))
    names = {"base": "before", f"with-{options.seed}": "lapis", "peer": "transformers, tokenizers, a plain loop"}
    rows = [
        [what, f"{scores[name]['target']:.3f}", f"{scores[name]['target tokens']:.3f}", f"{scores[name]['en']:.3f}",
         f"{scores[name]['en'] / scores['base']['en'] - 1:+.1%}", f"{scores[name]['en tokens']:.3f}"]
        for name, what in names.items()
    ]  # fmt: skip
    head = ["", "bits per byte", "tokens per byte", "English", "cost", "English, tokens per byte"]
    how = json.loads(place.with_suffix(".json").read_text())
    text = [*table(head, rows), "", f"Peer: {how['steps']} steps in {how['seconds']:.0f} processor seconds, "
            f"{how['prepared']:.0f} of them before the first step."]  # fmt: skip
    print("\n".join(text))
    if options.do == "write":
        keep(__file__, "The same work by hand", ["", *text])


if __name__ == "__main__":
    main()
