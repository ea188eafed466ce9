"""Text -> ids -> embedding vectors -> ids again, by the output embedding alone.

The vector of a token is multiplied with every row of the output embedding; the largest product says which token the
head reads in it, with no layer in between. Tied embeddings with rows of unequal norm need not give every token back.
Layers and the final norm are in lapis.inside.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from lapis.errors import CheckpointError, DataError
from lapis.text.tokenizer.folder import TOKENIZER_FILES
from lapis.text.tokenizer.tokenizer import Tokenizer

_BLOCK = 1 << 24  # numbers of the output embedding that are held at once


class _Tensors(Protocol):
    """What is needed of an opened checkpoint."""

    source: str
    index: dict[str, Any]

    def part(self, name: str) -> Any: ...
    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor: ...


def round_trip(checkpoint: _Tensors, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """For each token its id, its vector's first numbers and norm, and the id that the output embedding gives back.

    Reads the rows of these tokens and, in blocks, the output embedding.

    Args:
        checkpoint: Of the model.
        tokenizer: Of the model.
        text: Plain text.

    Raises:
        CheckpointError: Where the model has no token embedding, or tokens beyond it.
        DataError: For a text without tokens.
    """
    table = token_table(tokenizer, text)
    ids = [entry["id"] for entry in table]
    embed = _find(checkpoint, "embed")
    if embed is None:
        raise CheckpointError(f"{checkpoint.source}: has no token embedding; it is no language model")
    head = _find(checkpoint, "head") or embed
    rows, dim = checkpoint.index[embed].shape
    width = checkpoint.index[head].shape[1]
    if width != dim:
        raise CheckpointError(f"{checkpoint.source}: {head} is {width} wide and {embed} {dim}; there is no way back")
    tokenizer.check_rows(rows)
    distinct = sorted(set(ids))
    vectors_VD = torch.cat([checkpoint.read_rows(embed, i, i + 1) for i in distinct]).float()
    back = dict(zip(distinct, _nearest(checkpoint, head, vectors_VD), strict=True))
    vector = dict(zip(distinct, vectors_VD, strict=True))
    entries = [
        {
            **entry,
            "vector": vector[i][:4].tolist(),
            "norm": float(vector[i].norm()),
            "back": back[i],
            "back_text": tokenizer.text(back[i]) if back[i] < tokenizer.rows else f"row {back[i]}",
        }
        for i, entry in zip(ids, table, strict=True)
    ]
    returned = sum(entry["id"] == entry["back"] for entry in entries)
    return {
        "tokens": entries,
        "returned": returned,
        "dim": dim,
        "embedding": embed,
        "head": head,
        "tied": head == embed,
    }


def token_table(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    """Of each token of a text its spelling (`token`), what it reads as (`text`) and its `id`."""
    ids = tokenizer.encode(text)
    if not ids:
        raise DataError("the text is empty; give some")
    return [{"token": tokenizer.token(i), "text": tokenizer.text(i), "id": i} for i in ids]


def holds_only_tokenizer(folder: Path) -> bool:
    """Whether a folder on this machine has a tokenizer and no weights beside it."""
    if not folder.is_dir() or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return False
    return not any(".safetensors" in path.name or path.name == "adapter_config.json" for path in folder.iterdir())


def _find(checkpoint: _Tensors, component: str) -> str | None:
    for name, info in checkpoint.index.items():
        part = checkpoint.part(name)
        if part.component == component and part.kind == "weight" and len(info.shape) == 2:
            return name
    return None


def _nearest(checkpoint: _Tensors, head: str, vectors_ND: torch.Tensor) -> list[int]:
    """For each vector the row of the head with the largest product; the first of equals."""
    rows, dim = checkpoint.index[head].shape
    best_N = torch.full((len(vectors_ND),), float("-inf"))
    index_N = torch.zeros(len(vectors_ND), dtype=torch.int64)
    block = max(1, _BLOCK // dim)
    for first in range(0, rows, block):
        part_VD = checkpoint.read_rows(head, first, min(rows, first + block)).float()
        value_N, place_N = (vectors_ND @ part_VD.T).max(dim=1)
        index_N = torch.where(value_N > best_N, place_N + first, index_N)
        best_N = torch.maximum(best_N, value_N)
    return index_N.tolist()
