"""Token sequences of many lengths as one batch with little padding: several share a row, kept apart by segments.

Segments and positions make the model see each as if it were alone, so a batch costs about as many places as it has
tokens. Leaves out: rows of a fixed length for whole corpora (packing.py).

Shapes: B sequences, R rows, T places of a row.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lapis.text.packing import best_fit

if TYPE_CHECKING:
    import torch


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


def together(sequences: Sequence[Sequence[int]], pad: int = 0) -> Together:
    """Rows as long as the longest sequence (1 or more tokens each), each filled best fit first."""
    import torch  # here, so that reading files need not wait for it

    sizes = np.array([len(ids) for ids in sequences], np.int64)
    length = int(sizes.max())
    order, begins = best_fit(sizes, length)
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
