"""The choice for style, by measuring whole sets: what pieces do together is not the sum of what each does alone.

A layer's difference alone may bring half of what all bring, and any quarter of them three quarters; harm to text does
add up. A set costs one forward pass: the choices by single effects and some random ones are measured, then the best is
changed by a few pieces at a time as long as that is better. Leaves out: the control, which is drawn apart (choose.py).
"""

import random
from collections.abc import Callable, Mapping, Sequence

from lapis.planning.causal import Effects
from lapis.planning.choose import PRICE, at_random, choose, value, worth
from lapis.planning.measure import Runner
from lapis.planning.pieces import Piece, together
from lapis.planning.tensor_swap import Bench

TRIES = 32  # sets that are measured
PRICES = (PRICE / 2, PRICE, 2 * PRICE)  # at which the choices by single effects are made


def search(
    bench: Bench,
    runner: Runner,
    effects: Effects,
    parts: Sequence[Piece],
    single: Mapping[str, Mapping[str, float | None]],
    everything: Sequence[str],
    room: int,
    seed: int,
    tell: Callable[[int, int], None] | None = None,
) -> list[Piece]:
    """The best of TRIES sets of at most `room` parameters, by `choose.value`.

    single: style and knowledge of each piece alone. Leaves the bench at home.
    """
    draw = random.Random(f"plan search {seed}")
    whole = effects.knowledge(effects.full, "in")
    starts = [choose(parts, worth("style", parts, single, whole, price), room) for price in PRICES]
    starts += [at_random(parts, room, 1000 + 100 * seed + i) for i in range(TRIES // 4)]
    bench.put(everything, "home")
    best: list[Piece] = []
    most = float("-inf")
    for number in range(TRIES):
        pieces = starts[number] if number < len(starts) else _changed(best, parts, room, draw)
        names = together(pieces)
        bench.put(names, "chat")
        runner.start()
        found = runner.score()
        bench.put(names, "home")
        reached = value(effects.style(found, "in"), effects.knowledge(found, "in"), whole)
        if reached > most:
            best, most = pieces, reached
        if tell:
            tell(number + 1, TRIES)
    return best


def _changed(pieces: Sequence[Piece], parts: Sequence[Piece], room: int, draw: random.Random) -> list[Piece]:
    """A fifth of the pieces exchanged for others, as far as there is room."""
    kept = draw.sample(list(pieces), len(pieces) - max(1, len(pieces) // 5))
    left = room - sum(piece.parameters for piece in kept)
    others = [piece for piece in parts if piece not in pieces]
    draw.shuffle(others)
    for piece in others:
        if piece.parameters <= left:
            kept.append(piece)
            left -= piece.parameters
    return sorted(kept, key=parts.index)
