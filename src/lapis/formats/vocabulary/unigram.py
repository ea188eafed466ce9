"""Unigram as llama.cpp computes it: a text is normalized, then cut into the pieces that are likeliest together.

Characters are replaced by SentencePiece's map: a double array over bytes (each unit: an offset, the byte that leads to
it, and whether a match ends there), then the replacements, each with a 0 behind it; the longest match counts.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lapis.errors import CheckpointError

SPACE = "▁"
UNKNOWN_PENALTY = 10.0  # of a character that no piece spells, below the worst score


BEYOND = "tokenizer.ggml.precompiled_charsmap points beyond its end; fetch the file again"


class CharacterMap:
    """What is written for what. raw: of a file; an empty one changes nothing."""

    def __init__(self, raw: bytes) -> None:
        size = int.from_bytes(raw[:4], "little")
        if raw and (size % 4 or len(raw) <= 4 + size):
            raise CheckpointError(
                f"tokenizer.ggml.precompiled_charsmap has {len(raw):,} bytes and claims {size:,} of a double array"
            )
        self.units: list[int] = np.frombuffer(raw[4 : 4 + size], "<u4").tolist()
        self.texts = raw[4 + size :]

    def replaced(self, text: str) -> str:
        """The text with every longest match replaced."""
        raw, out, at = text.encode(), bytearray(), 0
        while at < len(raw):
            length, begin = self._longest(raw, at) if self.units else (0, 0)
            if length:
                end = self.texts.find(b"\0", begin)
                if end < 0:
                    raise CheckpointError(BEYOND)
                out += self.texts[begin:end]
            else:
                length = 1 + sum(byte & 0xC0 == 0x80 for byte in raw[at + 1 : at + 4][: _more(raw[at])])
                out += raw[at : at + length]
            at += length
        return out.decode(errors="replace")

    def _longest(self, raw: bytes, start: int) -> tuple[int, int]:
        """Bytes of the longest match at a place, and where its replacement begins; (0, 0) where there is none."""
        longest, node = (0, 0), _base(self._unit(0))
        for end in range(start, len(raw)):
            node ^= raw[end]
            unit = self._unit(node)
            if unit & 0x800000FF != raw[end] or not raw[end]:
                break
            node ^= _base(unit)
            if unit >> 8 & 1:
                longest = end - start + 1, self._unit(node) & 0x7FFFFFFF
        return longest

    def _unit(self, index: int) -> int:
        if index >= len(self.units):
            raise CheckpointError(BEYOND)
        return self.units[index]


def _base(unit: int) -> int:
    return unit >> 10 << ((unit & 0x200) >> 6)


def _more(byte: int) -> int:
    """How many bytes of a character follow its first."""
    return 0 if byte < 0xC0 else 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3


def spaced(text: str, prefix: bool, merged: bool) -> str:
    """Spaces as pieces have them.

    Args:
        text: Normalized.
        prefix: One is put before the text.
        merged: Several count as one, and those at the ends as none.
    """
    if merged:
        return "".join(SPACE + word for word in text.split(" ") if word)
    return (SPACE if prefix and text.strip(" ") else "") + text.replace(" ", SPACE)


def unigram(
    pieces: dict[str, int], scores: Sequence[float], least: float, unknown: int
) -> Callable[[str], list[int]]:  # fmt: skip
    """A function from a spaced text to ids: the pieces whose scores have the greatest sum.

    Args:
        pieces: Those that a text may be cut into -> id.
        scores: By id.
        least: The worst score of a piece.
        unknown: Id of what no piece spells; several such characters in a row are one.
    """
    longest = max(map(len, pieces), default=0)

    def encode(text: str) -> list[int]:
        best: list[tuple[float, int, int]] = [(0.0, unknown, 0)] + [(-np.inf, unknown, 0)] * len(text)
        for start in range(len(text)):
            score, spelled = best[start][0], False
            for end in range(start + 1, min(start + longest, len(text)) + 1):
                if (index := pieces.get(text[start:end])) is not None:
                    spelled = spelled or end == start + 1
                    if score + scores[index] > best[end][0]:
                        best[end] = score + scores[index], index, start
            if not spelled and score + least - UNKNOWN_PENALTY > best[start + 1][0]:
                best[start + 1] = score + least - UNKNOWN_PENALTY, unknown, start
        ids: list[int] = []
        place = len(text)
        while place:
            _, index, place = best[place]
            if index != unknown or not ids or ids[-1] != unknown:
                ids.append(index)
        return ids[::-1]

    return encode
