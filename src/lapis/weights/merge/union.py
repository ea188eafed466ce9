"""One vocabulary for the output of a merge: which tokens, in which rows, and from where each model's rows come.

Tokens are matched by string. A token that a model lacks takes the base's row, else that of the only model that has it,
else the mean over those that have it. Rows beyond the tokens stay what they are in the model that the rows are laid out
by; new ones are the mean of all tokens' rows. A padded size is kept. Leaves out: encoding text (text/tokenizer/).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.parsing import quoted
from lapis.text.tokenizer.vocabulary import Vocabulary
from lapis.weights.engine.sources import Stored, as_bytes, columns_of
from lapis.weights.merge.recipes.recipe import Tokens
from lapis.wording import format_count

Row = tuple[tuple[str, int], ...]
"""(model, row) whose mean a row is; nothing stands for zeros."""


@dataclass
class Words:
    """The output's vocabulary.

    donor: the model whose tokenizer files are taken. ids: token -> row. rows: how many embedding and head have.
    document: tokenizer.json, where it changes.
    """

    donor: str
    ids: dict[str, int]
    rows: int
    document: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    free: int = 0

    def add(self, token: str) -> int:
        """Gives a token the next free id."""
        self.ids[token] = self.free
        self.free += 1
        return self.ids[token]


def output_words(
    tokens: Tokens, base: str, models: Mapping[str, Checkpoint], words: Mapping[str, Vocabulary | None],
    rows: Mapping[str, int],
) -> Words:  # fmt: skip
    """The vocabulary that `tokenizer_source` asks for. rows: embedding rows of each model."""
    donor = base if tokens.source in ("base", "union") else tokens.source
    result = Words(donor, {}, rows.get(donor, 0))
    lacking = [model for model in models if words[model] is None]
    if lacking:
        result.problems.append(f"tokenizer_source needs a tokenizer.json in every model; {', '.join(lacking)} has none")
        return result
    own = words[donor]
    assert own is not None
    result.ids = {token: i for token, i in own.ids.items() if i < rows[donor]}
    result.free = max(result.ids.values(), default=-1) + 1
    added: list[dict[str, Any]] = []
    if tokens.source == "union":
        document = json.loads(json.dumps(models[donor].json("tokenizer.json")))
        for model in models:
            added += _united(result, document, model, models[model].json("tokenizer.json"), rows[model])
        result.document = document
    for token in tokens.tokens:
        if token not in result.ids:
            added.append(_entry(token, result))
    if added:
        result.document = result.document or json.loads(json.dumps(models[donor].json("tokenizer.json")))
        result.document.setdefault("added_tokens", []).extend(added)
        result.notes.append(f"{format_count(len(added), 'token was', 'tokens were')} added to the tokenizer of {donor}")
    multiple = tokens.pad_to_multiple_of
    result.rows = -(-max(result.free, result.rows) // multiple) * multiple
    return result


def _united(
    result: Words, document: dict[str, Any], model: str, theirs: Mapping[str, Any], rows: int
) -> list[dict[str, Any]]:
    """Takes over the tokens of one model that are new; returns the added ones. Learned ones come with their merges."""
    special = {entry["content"]: entry for entry in theirs.get("added_tokens") or []}
    ours, other = document.get("model", {}), theirs.get("model", {})
    table = other.get("vocab")
    learned = dict(table) if isinstance(table, dict) else {entry[0]: i for i, entry in enumerate(table or [])}
    new = [t for t, i in learned.items() if i < rows and t not in special and t not in result.ids]
    if new and not (ours.get("type") == other.get("type") and ours.get("type") in ("BPE", "WordLevel")):
        result.problems.append(
            f"{len(new):,} learned tokens of {model} ({quoted(new[0])}, ...) cannot join a {ours.get('type')} "
            "tokenizer; use tokenizer_source: base"
        )
        return []
    for token in new:
        ours["vocab"][token] = result.add(token)
    if new and ours.get("type") == "BPE":
        known = {_pair(merge) for merge in ours["merges"]}
        listed = bool(ours["merges"]) and isinstance(ours["merges"][0], list)
        for merge in map(_pair, other["merges"]):
            if merge not in known and {*merge, "".join(merge)} <= ours["vocab"].keys():
                ours["merges"].append(list(merge) if listed else " ".join(merge))
        result.notes.append(f"{len(new):,} learned tokens of {model} join after all of the base's own")
    return [
        _entry(token, result, entry)
        for token, entry in special.items()
        if token not in result.ids and entry["id"] < rows
    ]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _entry(token: str, result: Words, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A line of added_tokens under the next free id."""
    plain = {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }
    return {**(like or plain), "id": result.add(token)}


def rows_of(
    model: str, result: Words, tokens: Tokens, base: str | None, models: Sequence[str], words: Mapping[str, Vocabulary],
    rows: Mapping[str, int],
) -> list[Row | None]:  # fmt: skip
    """For each row of the output where it comes from in one model. None: the mean of all tokens' rows."""
    result_rows: list[Row | None] = [None] * result.rows
    for row in range(min(result.rows, rows[result.donor])):
        result_rows[row] = ((result.donor, row),)
    known = {each: {t: i for t, i in words[each].ids.items() if i < rows[each]} for each in models}
    for token, row in result.ids.items():
        source = tokens.tokens.get(token)
        own = known[model].get(token)
        if own is not None and not (source and source.force):
            result_rows[row] = ((model, own),)
        elif source and source.kind == "zero":
            result_rows[row] = ()
        elif source and source.kind == "model":
            place = source.token if isinstance(source.token, int) else known[source.model].get(source.token or token)
            if place is None or not 0 <= place < rows[source.model]:
                raise CheckpointError(f'tokenizer: "{token}" is to come from {source.model}, which has no such token')
            result_rows[row] = ((source.model, place),)
        else:
            having = tuple((each, known[each][token]) for each in models if token in known[each])
            from_base = tuple(pair for pair in having if pair[0] == base)
            result_rows[row] = from_base or having
    return result_rows


class Aligned:
    """A model's embedding in the rows of the output, each from where `rows_of` says. Read in whole rows."""

    def __init__(
        self, role: str, tensors: Mapping[str, Stored], rows: Sequence[Row | None], tokens: Sequence[int]
    ) -> None:
        """tensors: the embedding (or head) of each model. tokens: the output's rows that are tokens."""
        self.role, self._tensors, self._rows, self._tokens = role, tensors, rows, tokens
        own = tensors[role]
        self.name = own.name
        self.dtype = own.dtype
        for other in tensors.values():
            self.dtype = torch.promote_types(self.dtype, other.dtype)
        self.shape = (len(rows), *own.shape[1:])
        self._columns = columns_of(own.shape)
        self._mean: torch.Tensor | None = None

    def read(self, first: int, last: int, into: memoryview) -> int:
        columns, width = self._columns, self._columns * self.dtype.itemsize
        row, end, done, read = first // columns, last // columns, 0, 0
        while row < end:
            run, source = row + 1, self._rows[row]
            if source and len(source) == 1:  # neighbors in one model are read in one go
                model, start = source[0]
                while run < end and self._rows[run] == ((model, start + run - row),):
                    run += 1
                values = self._stored(model, start, start + run - row)
            else:
                values = self._mixed(source)
            piece = into[done : done + (run - row) * width]
            piece[:] = as_bytes(values.to(self.dtype).contiguous())
            done, read, row = done + len(piece), read + len(piece), run
        return read

    def _stored(self, model: str, first: int, last: int) -> torch.Tensor:
        tensor = self._tensors[model]
        values = torch.empty(last - first, self._columns, dtype=tensor.dtype)
        tensor.read(first * self._columns, last * self._columns, as_bytes(values))
        return values

    def _mixed(self, source: Row | None) -> torch.Tensor:
        if source is None:
            return self._mean_row()
        total = torch.zeros(1, self._columns)
        for model, row in source:
            total += self._stored(model, row, row + 1).float()
        return total / max(len(source), 1)

    def _mean_row(self) -> torch.Tensor:
        """The mean of all tokens' rows, which a token that was never trained starts from."""
        if self._mean is None:
            total = torch.zeros(1, self._columns, dtype=torch.float64)
            for row in self._tokens:
                source = self._rows[row]
                values = (
                    self._stored(*source[0], source[0][1] + 1) if source and len(source) == 1 else self._mixed(source)
                )
                total += values.double()
            self._mean = (total / max(len(self._tokens), 1)).float()
        return self._mean
