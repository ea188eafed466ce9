"""Do models agree? How far one model's predictions are from another's, on a few prompts.

The proof after a graft or a merge that the result is a working model between its parents: predictions that are numbers,
and the Kullback-Leibler divergence from each parent, in nats per token, averaged over the prompts' last positions. One
model is in memory at a time. Leaves out: judging text (chats.py, choices.py).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.errors import LapisError
from lapis.families import Family
from lapis.model.load import load
from lapis.model.size import free_memory
from lapis.text.chat.chat import encode_prompt
from lapis.text.tokenizer.tokenizer import Tokenizer

PROMPTS = ("The capital of Malaysia is", "Apa khabar?", "1, 2, 3, 4,", "Who are you?")
_POSITIONS = 8  # the last ones of each prompt: 150,000 words x 32 positions are 20 MB


def agreement(
    model: str | os.PathLike[str],
    others: Mapping[str, str | os.PathLike[str]],
    prompts: Sequence[str] = PROMPTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """{"prompts", "positions", "finite", "kl_from": {name: nats per token or None}, "skipped": reason, where it was}.

    KL(model || other). None where another's tokenizer gives the prompts other ids. Where the model has a chat template,
    each prompt is also asked as a chat's first turn. Skips, with the reason, what cannot be judged: no tokenizer, an
    architecture that is not known, too little memory. progress(done, total) is called after each model.
    """
    checkpoint = open_checkpoint(model)
    if reason := _reason_against(checkpoint):
        return {"skipped": reason}
    try:
        tokenizer = Tokenizer.open(checkpoint)
        rows = [tokenizer.encode(text, add_special_tokens=True) for text in prompts]
        if tokenizer.chat_template:
            rows += [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
        rows = [ids for ids in rows if ids]
        own = _log_probabilities(checkpoint, rows)
    except LapisError as error:
        return {"skipped": str(error)}
    result: dict[str, Any] = {"prompts": len(rows), "positions": len(own), "finite": bool(torch.isfinite(own).all())}
    result["kl_from"] = {}
    for done, (name, other) in enumerate(others.items(), 1):
        progress(done, len(others) + 1)
        result["kl_from"][name] = _divergence(own, rows, tokenizer, other)
    return result


def _divergence(own: torch.Tensor, rows: list[list[int]], tokenizer: Tokenizer, other: Any) -> float | None:
    checkpoint = open_checkpoint(other)
    try:
        theirs = Tokenizer.open(checkpoint)
        if any(theirs.decode(ids) != tokenizer.decode(ids) for ids in rows):
            return None
        values = _log_probabilities(checkpoint, rows)
    except LapisError:
        return None
    words = min(own.shape[1], values.shape[1])
    ours, values = own[:, :words].log_softmax(-1), values[:, :words].log_softmax(-1)
    return float((ours.exp() * (ours - values)).sum(-1).mean())


@torch.no_grad()
def _log_probabilities(checkpoint: Checkpoint, rows: list[list[int]]) -> torch.Tensor:
    """[positions, words] at the last positions of each row.

    In one pass: on a busy machine each pass waits for all threads at every product, and the rows are short.
    """
    model = load(checkpoint)
    rows = [ids[-model.config.context :] for ids in rows]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for number, ids in enumerate(rows):
        ids_BT[number, : len(ids)], mask_BT[number, : len(ids)] = torch.tensor(ids), True
    places = [(row, place) for row, ids in enumerate(rows) for place in range(len(ids))[-_POSITIONS:]]
    rows_P, places_P = torch.tensor(places).T
    logits_PV: torch.Tensor = model.head(model.hidden(ids_BT, mask_BT)[rows_P, places_P])
    return logits_PV.float().log_softmax(-1)


def _reason_against(checkpoint: Checkpoint) -> str:
    """Why a model cannot be run here; "" where it can."""
    if not isinstance(checkpoint.family, Family):
        return f"model_type {checkpoint.config.get('model_type')} is not an architecture that lapis runs"
    if checkpoint.file("tokenizer.json") is None:
        return "there is no tokenizer.json"
    needs, free = int(1.3 * checkpoint.nbytes), free_memory()
    if free is not None and needs > free:
        return f"running it needs {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return ""
