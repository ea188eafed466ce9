"""The choice: which pieces fit a goal and a budget, and a random one of the same size beside it.

style: what harms plain text least, first, and carries replies, second: any quarter of a model learns how to answer, but
what it does to text differs by a factor of four (docs/evidence/plan.md). knowledge: what can move with least harm to
what is known, by parameter, so that it can learn something else. Leaves out: where the effects come from (causal.py).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from lapis.planning.pieces import Piece

Goal = Literal["style", "knowledge"]
PRICE = 10.0  # shares of the replies' gain that the harm of the whole difference is worth
LEAST = 1e-3  # a harm to text that counts as none


def worth(
    goal: Goal,
    pieces: Sequence[Piece],
    effects: Mapping[str, Mapping[str, float | None]],
    whole: float | None = None,
    price: float = PRICE,
) -> dict[str, float]:
    """What each piece is worth for a goal, by its label. whole: the harm that all of the difference does to text."""
    style = {piece.label: effects[piece.label]["style"] or 0.0 for piece in pieces}
    if goal == "style":
        return {label: value(style[label], effects[label]["knowledge"], whole, price) for label in style}
    harm = {label: max(effects[label]["knowledge"] or 0.0, 0.0) for label in style}
    if not any(harm.values()):  # no text was given: what replies depend on stands for what is known
        harm = {label: max(share, 0.0) for label, share in style.items()}
    size, all_harm = sum(piece.parameters for piece in pieces), sum(harm.values()) or 1.0
    return {piece.label: piece.parameters / size - harm[piece.label] / all_harm for piece in pieces}


def value(style: float, harm: float | None, whole: float | None, price: float = PRICE) -> float:
    """A share of the replies' gain, less `price` times the share of the whole difference's harm to text."""
    return style - price * max(harm or 0.0, 0.0) / max(whole or 0.0, LEAST)


def choose(pieces: Sequence[Piece], worths: Mapping[str, float], room: int) -> list[Piece]:
    """The pieces of most worth per parameter that fit into `room` parameters, in the model's order."""
    taken, left = [], room
    for piece in sorted(pieces, key=lambda piece: -worths[piece.label] / piece.parameters):
        if piece.parameters <= left:
            taken.append(piece)
            left -= piece.parameters
    return sorted(taken, key=pieces.index)


def at_random(pieces: Sequence[Piece], room: int, seed: int) -> list[Piece]:
    """Pieces drawn until `room` parameters are full, in the model's order."""
    order, taken, left = list(pieces), [], room
    random.Random(f"plan control {seed}").shuffle(order)
    for piece in order:
        if piece.parameters <= left:
            taken.append(piece)
            left -= piece.parameters
    return sorted(taken, key=pieces.index)
