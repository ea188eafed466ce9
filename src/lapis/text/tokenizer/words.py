"""Text as words: the runs of tokens within which tokens may be joined, and how often each occurs.

A word lies within one piece of the tokenizer's own splitting. Where that leaves sentences whole, as SentencePiece's
does, letters and their marks belong together, with the mark of a space before them; a character that the vocabulary
lacks and spells in bytes is one character again. Leaves out: learning from words (merges.py, extend.py).
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import tokenizers
from numpy.typing import NDArray

from lapis.errors import DataError
from lapis.text.tokenizer.vocabulary import BYTE_TOKEN

SPACE = "▁"
_BATCH = 500_000  # characters that are encoded at a time


@dataclass
class WordCounts:
    """Words of a text as a tokenizer cuts them.

    Attributes:
        words: Ids of a word of two tokens or more -> how often it occurs. Ids beyond the tokenizer's stand for
            `characters`, in their order.
        characters: Characters that the vocabulary lacks and spells in bytes -> occurrences.
        documents: Texts read.
        bytes: Of UTF-8.
        tokens: Of the whole text, also outside of words.
        marks: Letters with a combining mark behind them.
        cut_marks: Those of them that the tokenizer's splitting cuts from their mark.
    """

    words: Counter[tuple[int, ...]] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    marks: int = 0
    cut_marks: int = 0


class WordCutter:
    """Cuts encodings into words. characters: what the vocabulary lacked so far, in the order of their ids.

    Args:
        ids: Token -> id, added tokens included.
        added: Added tokens, which are no part of a word.
        byte_level: Whether the tokenizer's characters are bytes, and its own pieces are words.
    """

    def __init__(self, ids: Mapping[str, int], added: Collection[str], byte_level: bool) -> None:
        self.characters: Counter[str] = Counter()
        self._byte_level, self._size = byte_level, 1 + max(ids.values())
        self._number: dict[str, int] = {}
        self._begins, self._ends = np.zeros(self._size, bool), np.zeros(self._size, bool)
        self._space, self._byte = np.zeros(self._size, bool), np.full(self._size, -1, np.int64)
        for token, i in () if byte_level else ids.items():
            if token in added:
                continue
            self._space[i] = token == SPACE
            if BYTE_TOKEN.fullmatch(token):
                self._byte[i] = int(token[3:5], 16)
            elif token:
                self._begins[i], self._ends[i] = _in_word(token[0]), _in_word(token[-1])

    def words(self, encoding: tokenizers.Encoding) -> Iterator[tuple[int, ...]]:
        """The words of two tokens or more."""
        ids = np.array(encoding.ids, np.int64)
        piece = np.array([-1 if i is None else i for i in encoding.word_ids], np.int64)
        if self._byte_level:
            joined = piece[1:] == piece[:-1]
        else:
            if (self._byte[ids] >= 0).any():
                ids, piece = self._with_characters(ids, piece)
            left, right = ids[:-1], ids[1:]
            joined = (self._ends[left] | self._space[left]) & self._begins[right] & (piece[1:] == piece[:-1])
        borders = np.flatnonzero(~joined) + 1
        starts, stops = np.concatenate(([0], borders)), np.concatenate((borders, [len(ids)]))
        long = stops - starts > 1
        listed = ids.tolist()
        for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
            yield tuple(listed[start:stop])

    def _with_characters(
        self, ids: NDArray[np.int64], piece: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids in which bytes that spell a character are that character; half characters stay bytes."""
        values, result, pieces, place = self._byte[ids].tolist(), [], [], 0
        while place < len(ids):
            character, length = "", 1
            if values[place] >= 0 and (length := _length(values[place])):
                run = values[place : place + length]
                if len(run) == length and min(run) >= 0:
                    character = bytes(run).decode(errors="ignore")
            result.append(self._id(character) if character else int(ids[place]))
            pieces.append(int(piece[place]))
            place += length if character else 1
        return np.array(result, np.int64), np.array(pieces, np.int64)

    def _id(self, character: str) -> int:
        self.characters[character] += 1
        number = self._number.get(character)
        if number is None:
            number = self._number[character] = self._size + len(self._number)
            word = _in_word(character)
            self._begins, self._ends = np.append(self._begins, word), np.append(self._ends, word)
            self._space, self._byte = np.append(self._space, False), np.append(self._byte, -1)
        return number


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about half a million characters. Raises DataError for half of a surrogate pair."""
    batch, size = [], 0
    for text in texts:
        refuse_half_characters([text])
        batch.append(text)
        size += len(text)
        if size > _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def refuse_half_characters(texts: Iterable[str]) -> None:
    """Raises DataError for half of a surrogate pair, which no encoding of text has."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise DataError(f"character {error.start} is half a surrogate pair (U+{code:04X}); remove it") from None


def marked_letters(text: str) -> Iterator[str]:
    """Each letter of a text that a combining mark follows, with the mark."""
    marks = set(filter(is_mark, set(text)))
    for place, character in enumerate(text) if marks else ():
        if character in marks and place and unicodedata.category(text[place - 1])[0] == "L":
            yield text[place - 1 : place + 1]


def is_mark(character: str) -> bool:
    """Whether it combines with the character before it."""
    return unicodedata.category(character)[0] == "M"


def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"


def _length(first: int) -> int:
    """Bytes of a UTF-8 character by its first; 0 for a byte that begins none."""
    bounds = ((0x80, 1), (0xC2, 0), (0xE0, 2), (0xF0, 3), (0xF5, 4))
    return next((length for bound, length in bounds if first < bound), 0)
