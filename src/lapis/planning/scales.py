"""Scales for a graft: how much of each piece's difference to add, learned as one number per piece.

The replies' loss is lowered while text may get harder by a limit only (a Lagrangian whose multiplier follows the cost).
The gradient of a scale is the dot product of the loss's gradient with the piece's difference, so that beside the model
one tensor's gradient is held (gradient.py), and a handful of numbers is all that is fitted. Related: learned masks on
the difference (ILA, 2410.17875), which fit a mask per layer while training goes on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lapis.planning.gradient import Gradients
from lapis.planning.measure import Runner
from lapis.planning.pieces import Piece
from lapis.planning.tensor_swap import Bench

STEPS = 40
RATE, START = 0.15, 0.5
FACTORS = (0.0, 0.4, 0.7, 0.85, 1.0, 1.15, 1.3)


@dataclass
class Learned:
    """scales: by label. rows: the factors tried at the end."""

    scales: dict[str, float]
    rows: list[dict[str, float]] = field(default_factory=list)


def learn_scales(
    bench: Bench,
    runner: Runner,
    pieces: Sequence[Piece],
    limit: float,
    steps: int = STEPS,
    tell: Callable[[int, int], None] | None = None,
) -> Learned:
    """Scales whose cost on the exam's text (a share of its bits) is at most `limit`. Leaves the bench at home.

    Ends with one factor on all scales: of FACTORS, refined twice, the best for replies that keeps the limit.
    """
    names = {name: piece.label for piece in pieces for name in piece.names}
    scales = {piece.label: START for piece in pieces}
    runner.start()
    home = runner.score()
    first, second = dict.fromkeys(scales, 0.0), dict.fromkeys(scales, 0.0)
    mean, weight, counted = dict.fromkeys(scales, 0.0), 1.0, 0
    home_text = _text_nats(home, runner)
    for step in range(steps):
        for name, label in names.items():
            bench.put([name], "chat", scales[label])
        gradients = Gradients(bench, names)
        losses = gradients.run(batch for batch in runner.batches if batch.kind in ("chats", "text"))
        cost = losses["text"] / home_text - 1
        gains, costs = dict.fromkeys(scales, 0.0), dict.fromkeys(scales, 0.0)
        for name, label in names.items():
            gains[label] -= gradients.dots[name].get("chats", 0.0)
            costs[label] += gradients.dots[name].get("text", 0.0) / home_text
        if step == 0 and sum(costs.values()) > 0:  # at which the one scale for all would rest here
            weight = max(sum(gains.values()) / sum(costs.values()), 0.1)
        rate = RATE * (1 - step / steps) + 0.005
        for label in scales:
            slope = weight * costs[label] - gains[label]
            first[label] = 0.8 * first[label] + 0.2 * slope
            second[label] = 0.95 * second[label] + 0.05 * slope**2
            hat = first[label] / (1 - 0.8 ** (step + 1))
            scales[label] -= rate * hat / (math.sqrt(second[label] / (1 - 0.95 ** (step + 1))) + 1e-8)
        weight *= math.exp(max(-0.3, min(0.3, 8 * (cost - limit))))
        if step >= 2 * steps // 3:
            counted += 1
            for label, value in scales.items():
                mean[label] += (value - mean[label]) / counted
        if tell:
            tell(step + 1, steps)
    rows = [_tried(bench, runner, names, mean, factor, home) for factor in FACTORS]
    for _ in range(2):  # and halfway to the next one above it, twice
        best = _best(rows, limit)["factor"]
        above = [row["factor"] for row in rows if row["factor"] > best]
        if above:
            rows.append(_tried(bench, runner, names, mean, (best + min(above)) / 2, home))
    best = _best(rows, limit)["factor"]
    bench.put(names, "home")
    return Learned({label: value * best for label, value in mean.items()}, rows)


def _best(rows: Sequence[dict[str, float]], limit: float) -> dict[str, float]:
    """The row with the likeliest replies among those that keep the limit; a factor of 0 always does."""
    return min((row for row in rows if row["cost"] <= limit), key=lambda row: row["response_nll"])


def _text_nats(figures: dict[str, float], runner: Runner) -> float:
    """Nats per token of the text, from its bits per byte."""
    tokens = sum(len(batch.rows_R) for batch in runner.batches if batch.kind == "text")
    return figures["bits_per_byte"] * math.log(2) * runner.exam.size / tokens


def _tried(
    bench: Bench, runner: Runner, names: dict[str, str], scales: dict[str, float], factor: float, home: dict[str, float]
) -> dict[str, float]:
    for name, label in names.items():
        bench.put([name], "chat", factor * scales[label])
    runner.start()
    found = runner.score()
    return {
        "factor": factor,
        "response_nll": found["response_nll"],
        "cost": found["bits_per_byte"] / home["bits_per_byte"] - 1,
    }
