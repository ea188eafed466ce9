"""Texts as framed token sequences, and many of them as one batch with little padding.

Several share a row; segments and positions make the model see each as if it were alone, so a batch costs about as many
places as it has tokens. Rows of a fixed length for whole corpora are in packing.py.

Shapes: B sequences, R rows, T places of a row.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lapis.errors import ConfigError
from lapis.text.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text: [CLS] and [SEP], a BOS token, or nothing."""
    framed, bare = tokenizer.encode("a", add_special_tokens=True), tokenizer.encode("a")
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return framed[:at], framed[at + len(bare) :]


def encode_framed(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> tuple[list[list[int]], int]:
    """Ids of texts in their frames, at most `context` of them each.

    What is cut is the end of the text; the frame stays. A text without any token is one BOS or end-of-text token.

    Args:
        tokenizer: Whose frame is put around ([CLS] and [SEP], or BOS).
        texts: Plain text.
        context: Ids of each at most.

    Returns:
        The ids, and how many texts were cut.
    """
    before, after = frame(tokenizer)
    room = room_within(context, before, after)
    inner = tokenizer.encode_batch(texts)
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id or 0
    sequences = [[*before, *ids[:room], *after] or [start] for ids in inner]
    return sequences, sum(len(ids) > room for ids in inner)


def room_within(context: int, before: Sequence[int], after: Sequence[int]) -> int:
    """Tokens that a text itself may have. Raises ConfigError where the frame alone fills the context."""
    room = context - len(before) - len(after)
    if room < 1:
        raise ConfigError(f"context is {context}; the tokenizer alone puts {context - room} tokens around a text")
    return room


@dataclass(frozen=True)
class Together:
    """ids_RT, positions_RT: int64. segments_RT: int32, 1, 2, ... for the sequences of a row, 0 for padding.

    row_B, first_B, last_B: int64, where each sequence lies, in the order in which they were given.
    """

    ids_RT: "torch.Tensor"
    segments_RT: "torch.Tensor"
    positions_RT: "torch.Tensor"
    row_B: "torch.Tensor"
    first_B: "torch.Tensor"
    last_B: "torch.Tensor"

    def to(self, device: "str | torch.device") -> "Together":
        return Together(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


def together(
    sequences: "Sequence[Sequence[int] | NDArray[np.int64]]", pad: int = 0, *, saving: float = 0.0
) -> Together:
    """Rows as long as the longest sequence, each filled best fit first.

    Args:
        sequences: Of 1 or more tokens each.
        pad: The id of padding.
        saving: The share of the places that this has to save; where it saves less, each sequence has a row of its own.
    """
    import torch  # here, so that reading files need not wait for it

    sizes = np.array([len(ids) for ids in sequences], np.int64)
    length = int(sizes.max())
    order, begins = best_fit(sizes, length)
    if len(begins) - 1 > (1 - saving) * len(sizes):
        order, begins = np.arange(len(sizes)), np.arange(len(sizes) + 1)
    R = len(begins) - 1
    ids = np.full((R, length), pad, np.int64)
    segments = np.zeros((R, length), np.int32)
    positions = np.zeros((R, length), np.int64)
    row_B, first_B = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    for row in range(R):
        at = 0
        for segment, item in enumerate(order[begins[row] : begins[row + 1]], 1):
            n = int(sizes[item])
            ids[row, at : at + n] = sequences[item]
            segments[row, at : at + n] = segment
            positions[row, at : at + n] = np.arange(n)
            row_B[item], first_B[item] = row, at
            at += n
    arrays = (ids, segments, positions, row_B, first_B, first_B + sizes - 1)
    return Together(*(torch.from_numpy(array) for array in arrays))


def best_fit(sizes: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which items share a row: the longest first, each into the fullest row that still holds it.

    Best-fit decreasing takes at most 22 % more rows than the least possible (Johnson et al., 1974). Time: n
    log(length), since rows with the same room are one entry.

    Args:
        sizes: Of the items, each at most `length`.
        length: Of a row.

    Returns:
        The items in the order of rows, and where in it each row begins (and the last one ends).
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free places -> rows
    rooms: list[int] = []  # the keys of `room`, sorted
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            free = rooms[at]
            row = room[free].pop()
            if not room[free]:
                del room[free], rooms[at]
            rows[row].append(int(item))
        else:
            free, row = length, len(rows)
            rows.append([int(item)])
        left = free - size
        if left:
            if left not in room:
                bisect.insort(rooms, left)
                room[left] = []
            room[left].append(row)
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(rows), np.int64, len(sizes)), ends
