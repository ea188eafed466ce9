"""Rows for tokens that a tokenizer gained: of the embedding, and of a head of its own; a model folder in and out.

    tables = token_tables(checkpoint)                   the tensors with a row for each token, and what they are for
    rows = first_rows(checkpoint, tables, pieces, init, seed)
    write_grown(checkpoint, out, tables, rows, first, beside)

A new row begins as the mean of the rows of the old tokens that spelled the token. Means of several rows are shorter
than rows are, so an embedding's are scaled to the typical length (`mean-norm`): what a block sees then has the size
that it learned for. Rows that score tokens stay means: scaled up, a new token's logits would be too. NVIDIA's tokenizer
extension for Nemotron scales the one side and not the other for the same reason. A tied embedding is both, and stays a
mean. Rows that were padding are taken first. Leaves out: rows that are trained (language/), and rows after a donor
model that has the token (orthogonal matching pursuit, Goddard and Fernandes Neto, arXiv:2506.06607).
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import check_output
from lapis.checkpoint.tensor_file import INDEX, torch_dtype
from lapis.checkpoint.towers import change_language_config, language_config
from lapis.errors import CheckpointError, ConfigError
from lapis.families import find
from lapis.weights.account import Entry, count, write_account
from lapis.weights.config_fields import carried_config
from lapis.weights.engine.job import MergeResult, produce
from lapis.weights.engine.outputs import Account, Output, disk_bytes
from lapis.weights.engine.sources import RowsOf, Stored, columns_of
from lapis.weights.engine.tiles import checksum
from lapis.weights.matching import embedding_rows
from lapis.weights.merge.layout import sharded
from lapis.weights.tokenizer_files import copy_tokenizer_files, write_index
from lapis.wording import format_count

SimpleInit = Literal["mean", "mean-norm", "random"]  # ways to begin without running the model
_BLOCK = 1 << 22  # elements that are read at a time


@dataclass(frozen=True)
class TokenTables:
    """The tensors of a model that have a row for each token.

    Attributes:
        embed: The name of the embedding.
        head: Names of what scores tokens, weight and bias, where that is not the embedding itself.
        rows: Rows of each.
        tied: Whether the embedding's rows score tokens, too.
        copies: Names of heads that are stored and equal the embedding that they are tied to.
        untie: config.json ties a head that differs; it is to say so no longer.
    """

    embed: str
    head: tuple[str, ...]
    rows: int
    tied: bool
    copies: tuple[str, ...] = ()
    untie: bool = False


def token_tables(checkpoint: Checkpoint) -> TokenTables:
    """Finds the embedding and the head. Raises CheckpointError where there is no embedding of numbers."""
    rows = embedding_rows(checkpoint)
    places: dict[str, list[str]] = {"embed": [], "head": []}
    for name, info in checkpoint.index.items():
        part = checkpoint.part(name)
        if part.component in places and info.shape[:1] == (rows,) and name not in checkpoint.towers.others:
            places[part.component].append(name)
    if rows is None or not places["embed"]:
        raise CheckpointError(f"{checkpoint.source}: has no token embedding; it is no language model")
    embed = next(name for name in places["embed"] if len(checkpoint.info(name).shape) == 2)
    for name in (embed, *places["head"]):
        kind = checkpoint.info(name).dtype
        if kind not in ("F32", "F16", "BF16", "F64"):
            raise CheckpointError(
                f"{checkpoint.source}: {name} is stored as {kind}; rows are added to weights of 16 or 32 bits"
            )
    config = language_config(checkpoint.config)
    family = find(config)
    shape = family.read_config(config) if family else None
    if shape is not None and shape.layer_inputs is not None:
        raise CheckpointError(
            f"{checkpoint.source}: each token has a row in embed_tokens_per_layer, too, which lapis does not grow; "
            "keep the tokenizer"
        )
    tied = shape.tied if shape else bool(config.get("tie_word_embeddings", False))
    head = tuple(places["head"])
    if not tied:
        return TokenTables(embed, head, rows, tied=not head)
    weights = [name for name in head if len(checkpoint.info(name).shape) == 2]
    if any(not _equal(checkpoint, embed, name) for name in weights):
        return TokenTables(embed, head, rows, tied=False, untie=True)
    return TokenTables(embed, tuple(n for n in head if n not in weights), rows, tied=True, copies=tuple(weights))


def check_init(init: str | None, tables: TokenTables) -> None:
    """Raises ConfigError for a way to begin that does not go with a model."""
    if init == "mean-norm" and tables.tied:
        raise ConfigError(
            "extend: init is mean-norm, and this model's head is tied: its rows score tokens, too, and scaled-up means "
            "would make new tokens too likely; leave --init out, or give mean"
        )


def first_rows(
    checkpoint: Checkpoint,
    tables: TokenTables,
    pieces: Sequence[Sequence[int]],
    init: SimpleInit | None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What new rows begin with, by tensor: float32, [new tokens, columns].

    Args:
        checkpoint: The model.
        tables: Of `token_tables`.
        pieces: Of each new token the ids of the old tokens that spell it.
        init: None: mean-norm for an embedding, mean for what scores tokens.
        seed: Of random rows.
    """
    check_init(init, tables)
    result = {}
    for name in (tables.embed, *tables.head):
        random = torch.Generator().manual_seed(seed)
        if init == "random":
            mean_D, std_D, _ = _statistics(checkpoint, name, max(map(max, pieces), default=0) + 1)
            noise = torch.randn(len(pieces), len(mean_D), generator=random)
            rows = mean_D + std_D * noise
        else:
            rows = _means(checkpoint, name, pieces)
            scores = name != tables.embed or tables.tied
            if not scores and init in (None, "mean-norm"):
                typical = _statistics(checkpoint, name, tables.rows)[2]
                rows *= typical / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        result[name] = rows
    for name in tables.copies:
        result[name] = result[tables.embed]
    return result


def write_grown(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    tables: TokenTables,
    rows: Mapping[str, Tensor],
    first: int,
    beside: Callable[[Path], list[str]],
    recipe: Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes the model with new rows as a folder. A killed run of the same job goes on where it stopped.

    Args:
        checkpoint: The model.
        out: A new folder.
        tables: Its tensors with a row for each token.
        rows: By tensor, the new rows, [new tokens, columns].
        first: The id of the first new token. Rows from there on that the model has already were padding.
        beside: Writes the tokenizer's files into a folder, over those of the model; gives lines to tell.
        recipe: What the account says of how the rows were made.
        overwrite: Swap an existing folder for the new one, whole.
        progress: Called with bytes done and bytes in all.

    Raises:
        OutputError: Where `out` cannot be written.
    """
    new = len(next(iter(rows.values())))
    total = max(tables.rows, first + new)
    entries: list[Entry] = []
    outputs = [_output(checkpoint, name, rows, first, total, entries) for name in checkpoint.names]
    files = sharded(outputs)
    inputs = {"onto": checkpoint}
    check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=[checkpoint.root])
    padding = min(new, max(0, tables.rows - first))
    where = f"{format_count(padding, 'row that was padding', 'rows that were padding')}, " if padding else ""
    notes = [
        f"{format_count(new, 'new token')}: {where}{format_count(total - tables.rows, 'new row')}; {total:,} in all"
    ]
    if tables.untie:
        notes.append("config.json tied a head that differs from the embedding; the output says that it is not tied")
    result = MergeResult(str(out), count(entries), needs={"disk_bytes": disk_bytes(files)}, notes=notes)
    carried, dropped = carried_config(checkpoint.config)
    notes += dropped
    config = change_language_config(
        carried, {"vocab_size": total} | ({"tie_word_embeddings": False} if tables.untie else {})
    )

    def write_beside(folder: Path, account: Account) -> None:
        notes.extend(copy_tokenizer_files(checkpoint, folder, config=config))
        notes.extend(beside(folder))
        (folder / INDEX).unlink(missing_ok=True)
        if len(files) > 1:
            write_index(folder, files)
        write_account(folder, "extend", recipe, inputs, entries, account.figures, notes)

    digests = {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in rows.items()}
    produce(result, files, inputs, [dict(recipe), digests, first], write_beside, overwrite=overwrite, progress=progress)
    return result


class _NewRows:
    """Writes the new rows over elements of a tile, rounded to the output's dtype."""

    def __init__(self, first: int, rows: Tensor) -> None:
        self._start, self._values = first * columns_of(rows.shape), rows.reshape(-1)

    def __call__(self, first: int, last: int, values: Tensor) -> int:
        start, end = max(first, self._start), min(last, self._start + len(self._values))
        if start >= end:
            return 0
        given = self._values[start - self._start : end - self._start]
        values[start - first : end - first] = given
        return checksum(given, 0, start)


def _output(
    checkpoint: Checkpoint, name: str, rows: Mapping[str, Tensor], first: int, total: int, entries: list[Entry]
) -> Output:
    info = checkpoint.info(name)
    dtype = torch_dtype(info.dtype) or torch.uint8
    if name not in rows:
        entries.append(Entry(name, "copied"))
        stored = Stored("onto", checkpoint, name)
        if stored.scaled:
            raise CheckpointError(
                f"{checkpoint.source}: {name} is stored as {info.dtype} with scales; give the same model in 16 bits"
            )
        return Output(name, dtype, info.shape, (stored,))
    entries.append(Entry(name, "merged", f"{format_count(len(rows[name]), 'row is', 'rows are')} new"))
    numbers = [*range(info.shape[0]), *[-1] * (total - info.shape[0])]
    source = RowsOf(Stored("onto", checkpoint, name), numbers)
    shape = (total, *info.shape[1:])
    return Output(name, dtype, shape, (source,), None, _NewRows(first, rows[name].view(-1, *info.shape[1:])))


def _means(checkpoint: Checkpoint, name: str, pieces: Sequence[Sequence[int]]) -> Tensor:
    """[new tokens, columns]: of each the mean of its old tokens' rows."""
    listed = sorted({i for ids in pieces for i in ids})
    place = {i: n for n, i in enumerate(listed)}
    width = columns_of(checkpoint.info(name).shape)
    old = torch.cat([checkpoint.read_range(name, i * width, (i + 1) * width).view(1, width) for i in listed]).float()
    flat = torch.tensor([place[i] for ids in pieces for i in ids])
    owner = torch.tensor([n for n, ids in enumerate(pieces) for _ in ids])
    sums = torch.zeros(len(pieces), width).index_add_(0, owner, old[flat])
    return sums / torch.tensor([[len(ids)] for ids in pieces])


def _statistics(checkpoint: Checkpoint, name: str, rows: int) -> tuple[Tensor, Tensor, float]:
    """Mean and standard deviation of each column, and the median length of the rows that are not zero."""
    width = columns_of(checkpoint.info(name).shape)
    step = max(1, _BLOCK // width)
    sums, squares, lengths = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64), []
    for first in range(0, rows, step):
        last = min(rows, first + step)
        block = checkpoint.read_range(name, first * width, last * width).view(-1, width).double()
        sums += block.sum(0)
        squares += block.square().sum(0)
        lengths.append(block.norm(dim=1))
    length = torch.cat(lengths)
    mean = sums / rows
    std = (squares / rows - mean.square()).clamp_min(0).sqrt()
    typical = float(length[length > 0].median()) if bool((length > 0).any()) else 1.0
    return mean.float(), std.float(), typical


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.info(one).shape != checkpoint.info(other).shape:
        return False
    size = checkpoint.info(one).elements
    spans = ((first, min(size, first + _BLOCK)) for first in range(0, size, _BLOCK))
    return all(torch.equal(*(checkpoint.read_range(name, *span) for name in (one, other))) for span in spans)
