"""How many tokens to add, if any: a curve in, a number and a sentence out.

Whether to extend is decided by the tokens that can be learned: Token Distillation (Dobler et al., arXiv:2505.20133)
takes 100 snippets for a token, so those count that occur as often in the text at hand, and they must save a tenth of
all tokens. Then rarer ones are taken, too: their rows begin as likely as they are (rows/calibrate.py), so they make
text shorter and likelier without being learned. Among these sizes the one with the fewest FLOPs for a byte is best:
more tokens make text shorter and the head larger.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapis.wording import format_count

ENOUGH = 100  # occurrences of a token that can be learned
COUNTED = 10  # occurrences of a token whose share is known
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
    learnable, counted = (int((curve.counts >= least).sum()) for least in (ENOUGH, COUNTED))
    saved = 1 - curve.tokens_per_byte / curve.tokens_per_byte[0]
    cost = curve.tokens_per_byte if curve.flops_per_byte is None else curve.flops_per_byte
    most = float(saved.max())
    if most < WORTH:
        return {"add": 0, "reason": f"do not extend: all that this text could teach would save {most:.1%} of tokens, "
                f"and below {WORTH:.0%} new rows are not worth their training"}  # fmt: skip
    fewest = round_down(int(np.argmin(cost[: learnable + 1])))
    if saved[fewest] < WORTH <= saved[learnable]:
        what = format_count(fewest, "new token, which saves", "new tokens, which save")
        return {"add": 0, "reason": f"do not extend: FLOPs per byte are fewest with {what} {saved[fewest]:.1%} of "
                f"tokens, below {WORTH:.0%}; rows of more cost more than shorter text spares"}  # fmt: skip
    if not learnable:
        return {"add": 0, "reason": f"do not extend: no new token occurs {ENOUGH} times in this text, and rarer ones "
                "occur too seldom to be learned"}  # fmt: skip
    if saved[fewest] < WORTH:
        what = format_count(learnable, "new token that occurs", "new tokens that occur")
        return {"add": 0, "reason": f"do not extend: the {what} {ENOUGH} times or more in "
                f"this text would save {saved[learnable]:.1%} of tokens, below {WORTH:.0%}, and rarer ones occur too "
                "seldom to be learned"}  # fmt: skip
    best = round_down(int(np.argmin(cost[: counted + 1])))
    fewer = "" if curve.flops_per_byte is None else f" and {1 - cost[best] / cost[0]:.0%} of FLOPs per byte"
    taken = curve.counts[:best]  # characters that the vocabulary lacked come before merges, however rare they are
    often = int((taken >= ENOUGH).sum())
    occur = f"{often:,} of them occur {ENOUGH} times or more in this text, the others {taken.min()} or more"
    if often == best:
        occur = f"each occurs {ENOUGH} times or more in this text"
    what = format_count(best, "new token saves", "new tokens save")
    return {"add": best, "reason": f"{what} {saved[best]:.0%} of tokens{fewer}; {occur}"}


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
