"""Preference pairs as ids, in memory: for each reply the whole chat by the template, and where in it the reply is.

A chat longer than the context is cut at its end; a pair of which a reply then has no token left, or the two are the
same, is dropped. Both are counted, and so is `too_long="drop"`, which drops every pair that would be cut. Reading is in
corpus/pairs.py, batches are in evaluation/replies.py.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lapis.errors import DataError, TemplateError
from lapis.text.chat.chat import encode_turns, write_calls
from lapis.text.chat.special_token_guard import spelled_tokens
from lapis.text.corpus.pairs import (
    SIDES,
    Message,
    Pair,
    describe_preference,
    first_record,
    is_verdict,
    pairs,
    pairs_of_verdicts,
)
from lapis.text.rows.coverage import special_line
from lapis.text.rows.data_sources import split_special
from lapis.text.tokenizer.tokenizer import Tokenizer

TooLong = Literal["cut", "drop"]
Sources = str | Path | Mapping[str, Any] | Iterable[str | Path] | Iterable[Pair]


@dataclass(frozen=True)
class EncodedReply:
    """ids: int64, the chat as the template writes it. The reply and its end token are ids[first:last]."""

    ids: NDArray[np.int64]
    first: int
    last: int

    @property
    def spoken(self) -> "EncodedReply":
        """Without what the template writes after the reply: what a language model is scored on."""
        return EncodedReply(self.ids[: self.last], self.first, self.last)

    def __len__(self) -> int:
        """Tokens of the reply."""
        return self.last - self.first


def encode_reply(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    reply: Message,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    trusted: bool = False,
) -> EncodedReply:
    """The chat of prompt and reply. Raises DataError where the template leaves no token of the reply."""
    ids, mask = encode_turns(tokenizer, write_calls(tokenizer, [*prompt, reply], tools), tools=tools, trusted=trusted)
    last = len(mask)
    while last and not mask[last - 1]:
        last -= 1
    first = last
    while first and mask[first - 1]:
        first -= 1
    if first == last:
        raise DataError("the chat template leaves no token of the reply in the chat; nothing could be learned from it")
    return EncodedReply(np.asarray(ids, np.int64), max(first, 1), last)


class Paired:
    """Pairs of replies in memory.

    Attributes:
        replies: Chosen and rejected of each pair in turn, so that pair i has 2i and 2i + 1.
        margins: float32, 0 where a record gives none.
        counts: pairs, tokens, supervised, cut_replies, cut_tokens, dropped_long.
        lines: Where each pair stands.
        notices: Lines for a reader: the format, verdicts that became pairs, special tokens in the text.
    """

    def __init__(
        self,
        replies: list[EncodedReply],
        margins: NDArray[np.float32],
        counts: dict[str, int],
        lines: list[str],
        notices: list[str] | None = None,
    ) -> None:
        self.replies, self.margins, self.counts, self.lines = replies, margins, counts, lines
        self.notices = notices or []

    @classmethod
    def read(
        cls,
        sources: Sources,
        tokenizer: Tokenizer,
        context: int = 512,
        *,
        too_long: TooLong = "cut",
        verdicts: bool = False,
    ) -> "Paired":
        """Pairs from files, or as they are given.

        Args:
            sources: Files of pairs (see corpus/pairs.py), {path: ..., special: trusted} of these, or pairs.
            tokenizer: With a chat template.
            context: Tokens of a chat.
            too_long: Whether a longer chat is cut at its end, or its pair dropped.
            verdicts: Whether replies with a verdict each are taken, two of them as a pair (KTO).

        Raises:
            DataError: For what is no pair, for two replies whose tokens are the same, and where no pair is left.
        """
        names = ("pairs", "tokens", "supervised", "cut_replies", "cut_tokens", "dropped_long")
        counts, fitting, margins, lines = dict.fromkeys(names, 0), [], [], []
        place, special = split_special(sources)
        trusted, spelled = special == "trusted", Counter[str]()
        items, notices = _items(place, verdicts)
        for pair in items:
            try:
                both = [
                    encode_reply(tokenizer, prompt, reply, tools, trusted=trusted)
                    for prompt, reply, tools in map(pair.side, SIDES)
                ]
            except (DataError, TemplateError) as error:
                raise type(error)(f"{pair.where}: {error}") from None
            spelled.update(spelled_tokens(tokenizer, [pair.prompt, pair.chosen, pair.rejected]))
            if _same(both) and pair.rejected_prompt is None:
                raise DataError(f"{pair.where}: chosen and rejected are the same tokens; remove the record")
            over = [max(0, len(reply.ids) - context) for reply in both]
            both = [EncodedReply(r.ids[:context], r.first, min(r.last, context)) for r in both]
            same = _same(both) and pair.rejected_prompt is None
            if (too_long == "drop" and any(over)) or any(r.last <= r.first for r in both) or same:
                counts["dropped_long"] += 1
                continue
            counts["cut_replies"] += sum(map(bool, over))
            counts["cut_tokens"] += sum(over)
            counts["tokens"] += sum(len(reply.ids) for reply in both)
            counts["supervised"] += sum(map(len, both))
            fitting += both
            margins.append(pair.margin or 0.0)
            lines.append(pair.where)
        counts["pairs"] = len(lines)
        if not fitting:
            why = f": all {counts['dropped_long']:,} are longer than {context:,} tokens; give a larger context"
            raise DataError(f"no pair is left to learn from{why if counts['dropped_long'] else ''}")
        notices += [line] if (line := special_line(spelled, trusted)) else []
        return cls(fitting, np.asarray(margins, np.float32), counts, lines, notices)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def digest(self) -> str:
        """sha256 of tokens, places and margins: the same pairs in the same order."""
        digest = hashlib.sha256(self.margins.tobytes())
        for reply in self.replies:
            digest.update(f"{len(reply.ids)} {reply.first} {reply.last}\n".encode() + reply.ids.tobytes())
        return digest.hexdigest()

    def mismatched(self, pair: int) -> EncodedReply:
        """The pair's prompt with a reply of the next pair, chosen and rejected in turn (KTO's reference point)."""
        own, other = self.replies[2 * pair], self.replies[2 * ((pair + 1) % len(self)) + pair % 2]
        ids = np.concatenate([own.ids[: own.first], other.ids[other.first : other.last]])
        return EncodedReply(ids, own.first, len(ids))


def _items(sources: Any, verdicts: bool) -> tuple[Iterable[Pair], list[str]]:
    """Pairs, and lines on how the files were read."""
    listed: list[Any] = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if listed and isinstance(listed[0], Pair):
        return listed, []
    if not listed:
        return [], []
    notices = [line] if (line := describe_preference(first_record(listed))) else []
    if not (verdicts and is_verdict(first_record(listed))):
        return pairs(listed), notices
    made, good, bad = pairs_of_verdicts(listed)
    if good != bad:
        few = "desirable" if good < bad else "undesirable"
        notices.append(f"{good:,} desirable and {bad:,} undesirable replies; the {few} ones are read again")
    return made, notices


def _same(both: Sequence[EncodedReply]) -> bool:
    return np.array_equal(both[0].ids[: both[0].last], both[1].ids[: both[1].last])
