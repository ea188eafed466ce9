"""Do models agree? How far one model's predictions are from another's, on a few prompts.

The proof after a graft or a merge that the result is a working model between its parents: predictions that are numbers,
and the Kullback-Leibler divergence from each parent, in nats per token, averaged over the prompts' last positions. One
model is in memory at a time, and how many tokens it reads depends on its size, so that a model of any size computes for
about two thirds of a second on one core; what is left is reading its weights. Leaves out: judging text (chats.py,
choices.py).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.errors import LapisError
from lapis.evaluation.chats import score_chats
from lapis.model.load import load
from lapis.model.size import free_memory
from lapis.text.chat.chat import encode_prompt
from lapis.text.corpus.corpus import ChatRecord
from lapis.text.rows.sequences import together
from lapis.text.tokenizer.tokenizer import Tokenizer

PROMPTS = ("The capital of Malaysia is", "Apa khabar?", "1, 2, 3, 4,", "Who are you?")
_POSITIONS = 8  # the last ones of each prompt: 150,000 words x 32 positions are 20 MB
_WORK = 16e9  # parameters x tokens: twice as many FLOPs, at about 50 billion a second on one core
_LEAST = 8  # tokens, however large the model is


def agreement(
    model: str | os.PathLike[str] | Checkpoint,
    others: Mapping[str, str | os.PathLike[str] | Checkpoint],
    prompts: Sequence[str] = PROMPTS,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
    *,
    name: str | None = None,
) -> dict[str, Any]:
    """{"prompts", "tokens", "positions", "finite", "kl_from": {name: nats per token or None}}, or {"skipped": reason}.

    KL(model || other). None where another's tokenizer gives the prompts other ids. Where the model has a chat template,
    each prompt is also given as a chat's first turn. A large model reads fewer of them, or the end of one. Skips, with
    the reason, what cannot be judged: no tokenizer, an architecture that is not known, too little memory. Others whose
    weights lie on a server are not downloaded for this; "on_servers" names them.
    progress(done, total, what) is called before each model; name: what the first is called in it, if not as its folder.
    """
    checkpoint = _opened(model)
    if reason := _reason_against(checkpoint):
        return {"skipped": reason}
    try:
        tokenizer = Tokenizer.open(checkpoint)
        rows = _rows(checkpoint, tokenizer, prompts)
        tokens = sum(map(len, rows))
        label = f"trying the result out on {tokens} tokens: reading and running {{}}".format
        progress(0, len(others) + 1, label(name or os.path.basename(checkpoint.source)))
        own = _log_probabilities(checkpoint, rows)
    except LapisError as error:
        return {"skipped": str(error)}
    result: dict[str, Any] = {"prompts": len(rows), "tokens": tokens, "positions": len(own)}
    result |= {"finite": bool(torch.isfinite(own).all()), "kl_from": {}, "on_servers": []}
    for done, (role, other) in enumerate(others.items(), 1):
        progress(done, len(others) + 1, label(role))
        try:
            opened = _opened(other)
        except LapisError:
            result["kl_from"][role] = None
            continue
        if opened.by_ranges and opened.computed is None:
            result["on_servers"].append(role)
        else:
            result["kl_from"][role] = _divergence(own, rows, tokenizer, opened)
    return result


def reply_nll(models: Mapping[str, Checkpoint], chats: Iterable[ChatRecord]) -> dict[str, float]:
    """How likely each model finds the replies of some chats: name -> nats per token. One is in memory at a time.

    Raises:
        CheckpointError: Where one cannot be run.
        DataError: Where no chat holds a reply.
    """
    records = list(chats)
    return {
        name: float(score_chats(load(model), Tokenizer.open(model), records, replies=())["response_nll"])
        for name, model in models.items()
    }


def _opened(model: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model, adapters=True)


def _rows(checkpoint: Checkpoint, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts as chats and as text in turn, as many as the model's size allows; the last one may lose its start."""
    room = max(_LEAST, int(_WORK / max(1, sum(info.elements for info in checkpoint.index.values()))))
    rows = []
    for text in prompts:
        if tokenizer.chat_template:
            rows.append(encode_prompt(tokenizer, [{"role": "user", "content": text}]))
        rows.append(tokenizer.encode(text, add_special_tokens=True))
    chosen = []
    for ids in rows:
        if ids and room > 0:
            chosen.append(ids[-room:])
            room -= len(chosen[-1])
    return chosen


def _divergence(own: torch.Tensor, rows: list[list[int]], tokenizer: Tokenizer, checkpoint: Checkpoint) -> float | None:
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
    """[positions, words] at the last positions of each row, from one pass in which rows share lines."""
    model = load(checkpoint)
    rows = [ids[-model.config.context :] for ids in rows]
    batch = together(rows)
    hidden_RTD = model.hidden(batch.ids_RT, positions_BT=batch.positions_RT, segments_BT=batch.segments_RT)
    places = [
        (int(batch.row_B[number]), int(batch.last_B[number]) - back)
        for number, ids in enumerate(rows)
        for back in range(min(len(ids), _POSITIONS))
    ]
    rows_P, places_P = torch.tensor(places).T
    logits_PV: torch.Tensor = model.head(hidden_RTD[rows_P, places_P])
    return logits_PV.float().log_softmax(-1)


def _reason_against(checkpoint: Checkpoint) -> str:
    """Why a model cannot be run here; "" where it can."""
    if checkpoint.runs is None:
        return f"model_type {checkpoint.config.get('model_type')} is not an architecture that lapis runs"
    if checkpoint.file("tokenizer.json") is None:
        return "there is no tokenizer.json"
    needs, free = int(1.3 * checkpoint.nbytes), free_memory()
    if free is not None and needs > free:
        return f"running it needs {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return ""
