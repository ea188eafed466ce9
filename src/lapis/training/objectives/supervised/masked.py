"""Masked language modeling (Devlin et al. 2018, section 3.1): some tokens are hidden, and predicted from both sides.

Each document is framed as the tokenizer frames a text ([CLS] ... [SEP]) and cut into pieces that fit into a row; short
pieces share a row and do not see each other. Of the tokens that are chosen 80 % become the mask token, 10 % a random
token, 10 % stay. The masks depend on seed, epoch and row only, so the size of a micro-batch does not matter, and a run
that was stopped goes on exactly. The head runs at the chosen places only. Leaves out: next-sentence prediction, spans
(SpanBERT), replaced-token detection (ELECTRA).

Shapes: B rows, T places, R chosen places, D model dim, V vocabulary.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lapis.errors import ConfigError, DataError
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.corpus.labels import bare_texts
from lapis.text.rows.packing import best_fit
from lapis.text.rows.rows import IGNORE, RowBatch
from lapis.text.rows.sequences import frame, room_within
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.objective import Cursor, DataPlace, Loss, Objective, in_order, random_of
from lapis.training.objectives.supervised.next_token import cut_columns, mean_loss, summed_cross_entropy

_SHARE_MASKED, _SHARE_RANDOM = 0.8, 0.1
_AT_ONCE = 256  # documents encoded together


@dataclass(eq=False)
class Masked(Objective):
    """Hidden words predicted from both sides: what encoders (BERT) are pre-trained on.

    Args:
        data: Files or folders of text (tables of labeled texts too), or documents.
        context: Tokens of a row.
        valid: Held-out data of the same kind: its loss is measured.
        share: Of the tokens, how many are chosen.
        whole_words: Choose words, with all of their tokens.
        dropout: See Transformer.drop.
    """

    tokenizer: Tokenizer
    _: KW_ONLY
    valid: Any = None
    share: float = 0.15
    whole_words: bool = False
    dropout: float = 0.0

    name = "masked"
    head = "masked"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"masked: share is {self.share}, dropout {self.dropout}; they are shares, from 0 to below 1"
            )
        if "mask_token" not in self.tokenizer.named:
            raise ConfigError(
                f"{self.tokenizer.source}: names no mask_token; open an encoder's tokenizer, or make one with: "
                "lapis tokenizer train --kind masked"
            )
        self.masker = Masker(self.tokenizer, self.share, self.whole_words)
        self.examples = HiddenPieces(self.tokenizer, self.data, self.context)
        self.held_out = None if self.valid is None else HiddenPieces(self.tokenizer, self.valid, self.context)
        self.rows = len(self.examples)

    def describe(self) -> dict[str, Any]:
        return {
            "objective": "masked",
            "data": self.examples.digest,
            "valid": {} if self.held_out is None else {"": self.held_out.digest},
            "counts": {"rows": self.rows, **self.examples.counts},
            "context": self.context,
            "options": {name: getattr(self, name) for name in ("share", "whole_words", "dropout")},
            "tokenizer": self.tokenizer.digest(),
        }

    def batches(self, state: DataPlace) -> Iterator[tuple[RowBatch, Cursor]]:
        for chosen, places, cursor in in_order(self.rows, state.rows, state.cursor, state.seed):
            yield self._batch(self.examples, chosen, cursor["seed"], places), cursor

    def prepare(self, model: Transformer, batch: RowBatch) -> RowBatch:
        if model.config.causal:
            raise ConfigError(
                "masked: the model is causal, it sees no token to its right; take a bert model, or causal"
            )
        model.drop(self.dropout)
        return batch.to(next(model.parameters()).device)

    def small_batch(self, model: Transformer, state: DataPlace, tokens: int) -> RowBatch:
        return cut_columns(super().small_batch(model, state, tokens), tokens)

    def loss(self, model: Transformer, batch: RowBatch) -> Loss:
        total, count = masked_loss(model, batch)
        return total, count, {"tokens": batch.ids_BT.numel()}

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """valid_loss in nats per hidden token; the same places are hidden every time."""
        if self.held_out is None:
            return {}
        numbers = range(len(self.held_out))
        parts = [list(numbers[first : first + 16]) for first in range(0, len(numbers), 16)]
        batches = (self.prepare(model, self._batch(self.held_out, rows, 0, rows)) for rows in self.counted(parts))
        return {"valid_loss": mean_loss(model, batches, masked_loss)}

    def sample(self, model: Transformer) -> str:
        """A few hidden words of the first row, and what the model predicts for them."""
        batch = self.prepare(model, self._batch(self.examples, [0], 0, [0]))
        places = (batch.targets_BT[0] != IGNORE).nonzero()[:6, 0]
        with torch.inference_mode():
            guesses = model.head(_hidden(model, batch)[0, places]).argmax(-1).tolist()
        pairs = zip(batch.targets_BT[0, places].tolist(), guesses, strict=True)
        return ", ".join(f"{self.tokenizer.text(truth)} -> {self.tokenizer.text(guess)}" for truth, guess in pairs)

    def _batch(self, pieces: "HiddenPieces", rows: list[int], seed: int, places: list[int]) -> RowBatch:
        ids, segments, positions = pieces.take(rows)
        targets = np.empty_like(ids)
        for i, place in enumerate(places):
            ids[i], targets[i] = self.masker(ids[i], segments[i] > 0, random_of(seed, place))
        return RowBatch(*(torch.from_numpy(array) for array in (ids, targets, segments, positions)))


def masked_loss(model: Transformer, batch: RowBatch) -> tuple[Tensor, int]:
    """Summed cross entropy in nats over the chosen places, and how many they are."""
    targets = batch.targets_BT.flatten()
    places_R = (targets != IGNORE).nonzero()[:, 0]
    hidden_RD = _hidden(model, batch).flatten(0, 1).index_select(0, places_R)
    return summed_cross_entropy(model, hidden_RD, targets.index_select(0, places_R)), len(places_R)


def _hidden(model: Transformer, batch: RowBatch) -> Tensor:
    if bool((batch.segments_BT == 1).all()):  # one piece in each row, and no padding
        return model.hidden(batch.ids_BT)
    return model.hidden(batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)


class Masker:
    """Hides tokens of a row: (ids_T, real_T, random) -> (ids_T with some hidden, targets_T, IGNORE elsewhere)."""

    def __init__(self, tokenizer: Tokenizer, share: float, whole_words: bool) -> None:
        mask = tokenizer.id(tokenizer.named["mask_token"])
        assert mask is not None
        self.mask, self.vocab, self.share = mask, tokenizer.rows, share
        self.special = np.zeros(tokenizer.rows, bool)
        self.special[list(tokenizer.special.values())] = True
        self.goes_on = _continuations(tokenizer) if whole_words else None

    def __call__(
        self, ids_T: NDArray[np.int64], real_T: NDArray[np.bool_], random: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        free = real_T & ~self.special[ids_T]
        draws = random.random(len(ids_T))
        if self.goes_on is not None:  # every token has the draw of the first one of its word
            goes_on = self.goes_on[ids_T] & free & np.concatenate(([False], free[:-1]))
            first = np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(ids_T))))
            draws = draws[first]
        chosen = free & (draws < self.share)
        ways = random.random(len(ids_T))
        others = random.integers(0, self.vocab, len(ids_T))
        hidden = np.where(
            ways < _SHARE_MASKED, self.mask, np.where(ways < _SHARE_MASKED + _SHARE_RANDOM, others, ids_T)
        )
        return np.where(chosen, hidden, ids_T), np.where(chosen, ids_T, IGNORE)


def _continuations(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """By id: whether a token goes on with the word before it.

    WordPiece marks these by ##; elsewhere a word's first token begins with a space, and other signs are words.
    """
    spelled: list[str] = []
    for i in range(tokenizer.rows):
        try:
            spelled.append("" if i in tokenizer.added else tokenizer.token(i))
        except DataError:  # ids may have gaps
            spelled.append("")
    if any(token.startswith("##") for token in spelled):
        return np.array([token.startswith("##") for token in spelled])
    return np.array([bool(token) and _within_word(token[0]) for token in spelled])


def _within_word(sign: str) -> bool:
    """Whether a token that begins so is within a word: a letter, or a byte of one as byte-level vocabularies spell it.

    (U+0100 to U+0121 are their spaces and control bytes, U+2581 is SentencePiece's space.)
    """
    if sign.isascii():
        return sign.isalpha()
    return sign > "\xa0" and not "\u0100" <= sign <= "\u0121" and sign != "\u2581"


class HiddenPieces:
    """Documents as framed pieces of at most `context` tokens, and which of them share a row. In memory.

    (Packed rows of `lapis data pack` hold a stream without [CLS] and [SEP], so they are not read here.)
    """

    def __init__(self, tokenizer: Tokenizer, data: Any, context: int) -> None:
        before, after = frame(tokenizer)
        room = room_within(context, before, after)
        parts: list[NDArray[np.int32]] = []
        sizes: list[int] = []
        count = 0
        for texts in _batches(data):
            for ids in tokenizer.encode_batch(texts):
                count += 1
                for start in range(0, len(ids), room):
                    piece = [*before, *ids[start : start + room], *after]
                    parts.append(np.array(piece, np.int32))
                    sizes.append(len(piece))
        if not parts:
            raise DataError("masked: every document is empty; there is nothing to learn from")
        self.context, self.pad = context, tokenizer.pad_id or 0
        self.tokens = np.concatenate(parts)
        self.starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        self.order, self.begins = best_fit(np.array(sizes, np.int64), context)
        self.counts = {
            "documents": count,
            "pieces": len(sizes),
            "tokens": len(self.tokens),
            "padding": len(self) * context - len(self.tokens),
        }
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(self.starts.tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.begins) - 1

    def take(self, rows: Iterable[int]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """ids, segments (0 = padding) and positions of these rows, [B, context] each."""
        rows = list(rows)
        shape = (len(rows), self.context)
        ids, positions = np.full(shape, self.pad, np.int64), np.zeros(shape, np.int64)
        segments = np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            at = 0
            for segment, piece in enumerate(self.order[self.begins[row] : self.begins[row + 1]], 1):
                first, last = self.starts[piece : piece + 2]
                n = int(last - first)
                ids[i, at : at + n] = self.tokens[first:last]
                segments[i, at : at + n] = segment
                positions[i, at : at + n] = np.arange(n)
                at += n
        return ids, segments, positions


def _batches(data: Any) -> Iterator[list[str]]:
    given: list[Any] = [data] if isinstance(data, (str, Path, Document)) else list(data)
    held: list[str] = []
    are_texts = bool(given) and isinstance(given[0], Document)
    for text in (document.text for document in given) if are_texts else bare_texts(given):
        held.append(text)
        if len(held) == _AT_ONCE:
            yield held
            held = []
    yield held
