"""Rows of new tokens with the meaning of their old tokens: Token Distillation (Dobler et al., arXiv:2505.20133).

A model reads a stretch of text twice: in its old tokens, and in its new ones, whose rows alone are trained. After each
new token, and wherever both ways of cutting end at the same byte, the last hidden states are to be the same (mean
squared error). Here a stretch holds all of its new tokens at once, where the paper trains one at a time; each token
occurs in `snippets` stretches, as far as the text has so many. Leaves out rows that score tokens.

Shapes: B stretches, T places, D model dim, N new tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.errors import DataError
from lapis.language.rows.grown import GrownEmbed
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.extend import ExtendableTokenizer, Extension
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.text.tokenizer.vocabulary import BYTE_TOKEN
from lapis.text.tokenizer.words import batches

LENGTH = 50  # old tokens of a stretch
RATE = 1e-4
BATCH = 16


@dataclass(frozen=True)
class Snippet:
    """A text in old and in new tokens. old_ends, new_ends: places of both that end at the same byte."""

    old: list[int]
    new: list[int]
    old_ends: list[int]
    new_ends: list[int]


def distill(
    checkpoint: Checkpoint,
    base: ExtendableTokenizer,
    gained: Extension,
    texts: Sequence[str],
    rows_ND: Tensor,
    *,
    snippets: int,
    seed: int = 0,
    rate: float = RATE,
    progress: Callable[[float, float | None, str], None] = lambda done, total, label: None,
) -> Tensor:
    """Trains the embedding rows of new tokens.

    Args:
        checkpoint: The model with its old vocabulary.
        base: Its tokenizer.
        gained: What the tokenizer gains.
        texts: Text that holds the new tokens.
        rows_ND: Where the rows begin, float32.
        snippets: Stretches in which each new token is seen.
        seed: Of the order of stretches.
        rate: Of AdamW.
        progress: Called with stretches done and in all.

    Returns:
        The rows, float32, [N, D].

    Raises:
        DataError: Where the text holds none of the new tokens.
    """
    lead = Tokenizer.open(base.source).document_lead
    candidates = snippets_of(base, gained, texts, [] if lead is None else [lead])
    chosen = choose_snippets(candidates, gained, snippets, seed)
    if not chosen:
        raise DataError("extend: the text holds none of the new tokens, so there is nothing to distill them from")
    torch.manual_seed(seed)
    model = load(checkpoint, torch.float32)
    model.requires_grad_(False)
    model.eval()
    grown = GrownEmbed(model.embed, rows_ND, gained.first)
    optimizer = torch.optim.AdamW([grown.rows], lr=rate, weight_decay=0.0)
    for start in range(0, len(chosen), BATCH):
        progress(start, len(chosen), "distilling rows")
        loss = _loss(model, grown, chosen[start : start + BATCH])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return grown.rows.detach()


def snippets_of(
    base: ExtendableTokenizer, gained: Extension, texts: Sequence[str], lead: list[int]
) -> Iterator[Snippet]:
    """Every text in stretches of about LENGTH old tokens that hold a new one. lead: ids before each stretch."""
    new_backend = base.extended(gained)
    sizes = _sizes(base, gained)
    for batch in batches(texts):
        pairs = zip(
            base.backend.encode_batch(batch, add_special_tokens=False),
            new_backend.encode_batch(batch, add_special_tokens=False),
            strict=True,
        )
        for before, after in pairs:
            old, new = np.array(before.ids, np.int64), np.array(after.ids, np.int64)
            if len(new) and new.max() >= gained.first:
                yield from _cut(old, new, sizes, gained.first, lead)


def choose_snippets(candidates: Iterator[Snippet], gained: Extension, snippets: int, seed: int) -> list[Snippet]:
    """Stretches in a random order, until each new token was seen `snippets` times or there are no more."""
    listed = list(candidates)
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: Counter[int] = Counter()
    chosen = []
    for number in order:
        new = {i for i in listed[number].new if i >= gained.first}
        if any(seen[i] < snippets for i in new):
            chosen.append(listed[number])
            seen.update(new)
    return chosen


def _cut(
    old: NDArray[np.int64], new: NDArray[np.int64], sizes: NDArray[np.int64], first: int, lead: list[int]
) -> Iterator[Snippet]:
    old_at, new_at = np.cumsum(sizes[old]), np.cumsum(sizes[new])
    _, old_ends, new_ends = np.intersect1d(old_at, new_at, return_indices=True)
    begin = 0  # in the list of common ends
    old_begin = new_begin = 0
    while begin < len(old_ends):
        end = int(np.searchsorted(old_ends, old_begin + LENGTH, side="left"))
        end = max(end, begin + 1)
        old_end, new_end = int(old_ends[end - 1]) + 1, int(new_ends[end - 1]) + 1
        part = new[new_begin:new_end]
        if (part >= first).any():
            shift_old, shift_new = len(lead) - old_begin, len(lead) - new_begin
            yield Snippet(
                lead + old[old_begin:old_end].tolist(),
                lead + part.tolist(),
                (old_ends[begin:end] + shift_old).tolist(),
                (new_ends[begin:end] + shift_new).tolist(),
            )
        begin, old_begin, new_begin = end, old_end, new_end


def _sizes(base: ExtendableTokenizer, gained: Extension) -> NDArray[np.int64]:
    """Bytes of text that each id stands for."""
    sizes = np.zeros(gained.first + len(gained.tokens), np.int64)
    spelled = {**{i: token for token, i in base.ids.items()}, **dict(enumerate(gained.tokens, gained.first))}
    for i, token in spelled.items():
        if base.byte_level and token not in base.added:
            sizes[i] = len(token)
        else:
            sizes[i] = 1 if BYTE_TOKEN.fullmatch(token) and not base.byte_level else len(token.encode())
    return sizes


def _loss(model: Transformer, grown: GrownEmbed, batch: Sequence[Snippet]) -> Tensor:
    """Mean squared distance of hidden states where both ways of cutting end together, and a new token went before."""
    places = []
    for row, stretch in enumerate(batch):
        first_new = next(place for place, i in enumerate(stretch.new) if i >= grown.first)
        places += [
            (row, old, new)
            for old, new in zip(stretch.old_ends, stretch.new_ends, strict=True)
            if new >= first_new
        ]  # fmt: skip
    rows, old, new = (torch.tensor(each) for each in zip(*places, strict=True))
    with torch.no_grad():
        target_RD = model.hidden(_padded([s.old for s in batch]))[rows, old]
    inner = model.embed
    setattr(model, "embed", grown)  # noqa: B010  (a module that stands in for another)
    try:
        hidden_RD = model.hidden(_padded([s.new for s in batch]))[rows, new]
    finally:
        model.embed = inner
    return (hidden_RD - target_RD).square().mean()


def _padded(sequences: Sequence[list[int]]) -> Tensor:
    """[B, T], int64; what stands behind a sequence is seen by none of its tokens."""
    length = max(map(len, sequences))
    return torch.tensor([ids + [0] * (length - len(ids)) for ids in sequences])
