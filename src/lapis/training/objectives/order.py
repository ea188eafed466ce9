"""The order in which examples are read: a seeded permutation per epoch, and a cursor of three numbers.

A place is where an example stands in the endless stream of epochs. What is random about an example (masks, shifts) is
drawn from (seed, place), so it does not depend on the size of a batch, on ranks, or on where a run was stopped.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lapis.text.rows.rows import shuffled


def in_order(
    count: int, size: int, cursor: dict[str, Any] | None, seed: int
) -> Iterator[tuple[list[int], list[int], dict[str, Any]]]:
    """Without end: `size` of `count` examples by number, their places, and the cursor behind them."""
    epoch, row = (cursor["epoch"], cursor["row"]) if cursor else (0, 0)
    seed = cursor["seed"] if cursor else seed
    while True:
        numbers: list[int] = []
        places: list[int] = []
        while len(numbers) < size:
            epoch, row = (epoch + 1, 0) if row == count else (epoch, row)
            now = min(count - row, size - len(numbers))
            numbers += shuffled(np.arange(row, row + now), count, seed, epoch).tolist()
            places += range(epoch * count + row, epoch * count + row + now)
            row += now
        yield numbers, places, {"epoch": epoch, "row": row, "seed": seed}


def random_of(seed: int, place: int) -> np.random.Generator:
    """The random numbers of one place."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, place]))
