"""The choice: which pieces fit a goal and a budget, and a random one of the same size beside it.

style: what carries most of the replies for the least of plain text, by parameter. knowledge: what replies depend on
least, by parameter, so that it can learn something else. Leaves out: where the effects come from (causal.py).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from lapis.plan.pieces import Piece

Goal = Literal["style", "knowledge"]
HARM = 0.25  # how much a share of the harm to plain text weighs against a share of the style


def worth(
    goal: Goal, pieces: Sequence[Piece], effects: Mapping[str, Mapping[str, float | None]], weight: float = HARM
) -> dict[str, float]:
    """What each piece is worth for a goal, as a share of the whole less a part of the harm, by its label."""
    style = {piece.label: effects[piece.label]["style"] or 0.0 for piece in pieces}
    harm = {piece.label: max(effects[piece.label]["knowledge"] or 0.0, 0.0) for piece in pieces}
    all_style = sum(max(value, 0.0) for value in style.values()) or 1.0
    all_harm = sum(harm.values()) or 1.0
    if goal == "style":
        return {label: style[label] / all_style - weight * harm[label] / all_harm for label in style}
    size = sum(piece.parameters for piece in pieces)
    return {piece.label: piece.parameters / size - max(style[piece.label], 0.0) / all_style for piece in pieces}


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
