"""Preference pairs as ids, in memory: for each reply the whole chat by the template, and where in it the reply is.

A chat longer than the context is cut at its end; a pair of which a reply then has no token left, or the two are the
same, is dropped. Both are counted, and so is `too_long="drop"`, which drops every pair that would be cut.
Leaves out: reading (pairs.py), batches (evaluation/replies.py).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lapis.errors import DataError, TemplateError
from lapis.text.chat.chat import encode_turns
from lapis.text.corpus.pairs import SIDES, Message, Pair, pairs
from lapis.text.tokenizer.tokenizer import Tokenizer

TooLong = Literal["cut", "drop"]
Sources = str | Path | Iterable[str | Path] | Iterable[Pair]


@dataclass(frozen=True)
class Reply:
    """ids: int64, the chat as the template writes it. The reply and its end token are ids[first:last]."""

    ids: NDArray[np.int64]
    first: int
    last: int

    @property
    def spoken(self) -> "Reply":
        """Without what the template writes after the reply: what a language model is scored on."""
        return Reply(self.ids[: self.last], self.first, self.last)

    def __len__(self) -> int:
        """Tokens of the reply."""
        return self.last - self.first


def encode_reply(tokenizer: Tokenizer, prompt: Sequence[Message], reply: Message) -> Reply:
    """The chat of prompt and reply. Raises DataError where the template leaves no token of the reply."""
    ids, said = encode_turns(tokenizer, [*prompt, reply])
    last = len(said)
    while last and not said[last - 1]:
        last -= 1
    first = last
    while first and said[first - 1]:
        first -= 1
    if first == last:
        raise DataError("the chat template leaves no token of the reply in the chat; nothing could be learned from it")
    return Reply(np.asarray(ids, np.int64), max(first, 1), last)


class Paired:
    """Pairs of replies. replies: chosen and rejected of each pair in turn, so that pair i has 2i and 2i + 1.

    margins: float32, 0 where a record gives none. counts: pairs, tokens, supervised, cut_replies, cut_tokens,
    dropped_long. lines: where each pair stands.
    """

    def __init__(
        self, replies: list[Reply], margins: NDArray[np.float32], counts: dict[str, int], lines: list[str]
    ) -> None:
        self.replies, self.margins, self.counts, self.lines = replies, margins, counts, lines

    @classmethod
    def read(cls, sources: Sources, tokenizer: Tokenizer, context: int = 512, *, too_long: TooLong = "cut") -> "Paired":
        """Raises DataError for what is no pair (see pairs.py), for two replies whose tokens are the same, and where no
        pair is left."""
        names = ("pairs", "tokens", "supervised", "cut_replies", "cut_tokens", "dropped_long")
        counts, kept, margins, lines = dict.fromkeys(names, 0), [], [], []
        for pair in _items(sources):
            try:
                both = [encode_reply(tokenizer, pair.prompt, getattr(pair, side)) for side in SIDES]
            except (DataError, TemplateError) as error:
                raise type(error)(f"{pair.where}: {error}") from None
            if _same(both):
                raise DataError(f"{pair.where}: chosen and rejected are the same tokens; remove the record")
            over = [max(0, len(reply.ids) - context) for reply in both]
            both = [Reply(r.ids[:context], r.first, min(r.last, context)) for r in both]
            if (too_long == "drop" and any(over)) or any(r.last <= r.first for r in both) or _same(both):
                counts["dropped_long"] += 1
                continue
            counts["cut_replies"] += sum(map(bool, over))
            counts["cut_tokens"] += sum(over)
            counts["tokens"] += sum(len(reply.ids) for reply in both)
            counts["supervised"] += sum(map(len, both))
            kept += both
            margins.append(pair.margin or 0.0)
            lines.append(pair.where)
        counts["pairs"] = len(lines)
        if not kept:
            why = f": all {counts['dropped_long']:,} are longer than {context:,} tokens; give a larger context"
            raise DataError(f"no pair is left to learn from{why if counts['dropped_long'] else ''}")
        return cls(kept, np.asarray(margins, np.float32), counts, lines)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def digest(self) -> str:
        """sha256 of tokens, places and margins: the same pairs in the same order."""
        digest = hashlib.sha256(self.margins.tobytes())
        for reply in self.replies:
            digest.update(f"{len(reply.ids)} {reply.first} {reply.last}\n".encode() + reply.ids.tobytes())
        return digest.hexdigest()

    def mismatched(self, pair: int) -> Reply:
        """The pair's prompt with a reply of the next pair, chosen and rejected in turn (KTO's reference point)."""
        own, other = self.replies[2 * pair], self.replies[2 * ((pair + 1) % len(self)) + pair % 2]
        ids = np.concatenate([own.ids[: own.first], other.ids[other.first : other.last]])
        return Reply(ids, own.first, len(ids))


def _items(sources: Any) -> Iterable[Pair]:
    if isinstance(sources, (str, Path)):
        return pairs(sources)
    found = list(sources)
    return found if found and isinstance(found[0], Pair) else pairs(found)


def _same(both: Sequence[Reply]) -> bool:
    return np.array_equal(both[0].ids[: both[0].last], both[1].ids[: both[1].last])
