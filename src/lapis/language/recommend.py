"""How many tokens to add, if any: a curve in, a number and a sentence out.

A new row is worth having where its token occurs often enough to be learned. Token Distillation (Dobler et al.,
arXiv:2505.20133) takes 100 snippets for a token; so no row is recommended that occurs less often in the text at hand.
Among these sizes the one with the fewest FLOPs for a byte is best: more tokens make text shorter and the head larger.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ENOUGH = 100  # occurrences of a token in the text
WORTH = 0.10  # share of tokens that must be saved


@dataclass(frozen=True)
class Curve:
    """What the first 0, 1, 2, ... new tokens bring.

    tokens_per_byte: Of held-out text, by the number of added tokens. counts: How often each new token occurred when it
    was learned. flops_per_byte: Of held-out text; None where the model's shape is not known.
    """

    tokens_per_byte: NDArray[np.float64]
    counts: NDArray[np.int64]
    flops_per_byte: NDArray[np.float64] | None = None


def recommend(curve: Curve) -> dict[str, Any]:
    """{"add", "reason"}: how many tokens to add, 0 for none, and why in one sentence."""
    learnable = int((curve.counts >= ENOUGH).sum())
    saved = 1 - curve.tokens_per_byte / curve.tokens_per_byte[0]
    cost = curve.tokens_per_byte if curve.flops_per_byte is None else curve.flops_per_byte
    best = round_down(int(np.argmin(cost[: learnable + 1])))
    most = float(saved.max())
    if most < WORTH:
        return {"add": 0, "reason": f"do not extend: all that this text could teach would save {most:.1%} of tokens, "
                f"and below {WORTH:.0%} new rows are not worth their training"}  # fmt: skip
    if saved[best] < WORTH:
        return {"add": 0, "reason": f"do not extend: the {learnable:,} new tokens that occur {ENOUGH} times or more in "
                f"this text would save {saved[learnable]:.1%} of tokens, below {WORTH:.0%}, and rarer ones occur too "
                "seldom to be learned"}  # fmt: skip
    fewer = "" if curve.flops_per_byte is None else f" and {1 - cost[best] / cost[0]:.0%} of FLOPs per byte"
    return {"add": best, "reason": f"{best:,} new tokens save {saved[best]:.0%} of tokens{fewer}, and each occurs "
            f"{ENOUGH} times or more in this text"}  # fmt: skip


def knee_of(values: NDArray[np.float64]) -> int:
    """Where a falling curve bends most: farthest below the line from its first to its last point (Satopää et al. 2011,
    "Kneedle")."""
    if len(values) < 3 or values[0] <= values[-1]:
        return 0
    x = np.linspace(0, 1, len(values))
    y = (values - values[-1]) / (values[0] - values[-1])
    return round_down(int(np.argmax(1 - x - y)))


def round_down(count: int) -> int:
    """A count with two significant digits at most."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit
