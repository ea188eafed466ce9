"""The choice: which pieces fit a goal and a budget, random ones of the same size beside it, and scales for a graft.

style: what harms plain text least, first, and carries replies, second: any quarter of a model learns how to answer, but
what it does to text differs by a factor of four (docs/evidence/plan.md). knowledge: what can move with least harm to
what is known, by parameter, so that it can learn something else. Leaves out where the effects come from (effects.py).
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lapis.planning.effects import Effects, Gradients
from lapis.planning.held_out import Figures, Runner
from lapis.planning.options import Goal
from lapis.planning.pieces import Bench, Piece, together

PRICE = 10.0  # shares of the replies' gain that the harm of the whole difference is worth
LEAST = 1e-3  # a harm to text that counts as none
TRIES = 32  # sets that a search measures
PRICES = (PRICE / 2, PRICE, 2 * PRICE)  # at which the choices by single effects are made

STEPS = 40  # of learning scales
RATE, START = 0.15, 0.5
FACTORS = (0.0, 0.4, 0.7, 0.85, 1.0, 1.15, 1.3)
REFINED = 2  # times that a factor halfway to the next one is tried


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
    return _fill(sorted(pieces, key=lambda piece: -worths[piece.label] / piece.parameters), room, pieces)


def at_random(pieces: Sequence[Piece], room: int, seed: int) -> list[Piece]:
    """Pieces drawn until `room` parameters are full, in the model's order."""
    order = list(pieces)
    random.Random(f"plan control {seed}").shuffle(order)
    return _fill(order, room, pieces)


def search(
    bench: Bench,
    runner: Runner,
    effects: Effects,
    parts: Sequence[Piece],
    single: Mapping[str, Mapping[str, float | None]],
    everything: Sequence[str],
    room: int,
    seed: int,
) -> list[Piece]:
    """The choice for style: the best of TRIES sets of at most `room` parameters, by `value`. Leaves the bench at home.

    What pieces do together is not the sum of what each does alone: a layer's difference alone may bring half of what
    all bring, and any quarter of them three quarters; harm to text does add up. A set costs one forward pass: the
    choices by single effects and some random ones are measured, then the best is changed by a few pieces at a time as
    long as that is better. single: style and knowledge of each piece alone.
    """
    draw = random.Random(f"plan search {seed}")
    whole = effects.knowledge(effects.full, "in")
    starts = [choose(parts, worth("style", parts, single, whole, price), room) for price in PRICES]
    starts += [at_random(parts, room, 1000 + 100 * seed + i) for i in range(TRIES // 4)]
    bench.put(everything, "home")

    def put_in(names: Sequence[str]) -> Figures:
        bench.put(names, "chat")
        runner.start()
        figures = runner.score()
        bench.put(names, "home")
        return figures

    best: list[Piece] = []
    most = float("-inf")
    for number in range(TRIES):
        pieces = starts[number] if number < len(starts) else _changed(best, parts, room, draw)
        figures = runner.recorded(f"set {number}", lambda pieces=pieces: put_in(together(pieces)))  # type: ignore[misc]
        reached = value(effects.style(figures, "in"), effects.knowledge(figures, "in"), whole)
        if reached > most:
            best, most = pieces, reached
    return best


def _fill(order: Sequence[Piece], room: int, pieces: Sequence[Piece], taken: Sequence[Piece] = ()) -> list[Piece]:
    """`taken`, and of `order` what then fits into `room` parameters, in the order of `pieces`."""
    result = list(taken)
    left = room - sum(piece.parameters for piece in result)
    for piece in order:
        if piece.parameters <= left:
            result.append(piece)
            left -= piece.parameters
    return sorted(result, key=pieces.index)


def _changed(pieces: Sequence[Piece], parts: Sequence[Piece], room: int, draw: random.Random) -> list[Piece]:
    """A fifth of the pieces exchanged for others, as far as there is room."""
    staying = draw.sample(list(pieces), len(pieces) - max(1, len(pieces) // 5))
    others = [piece for piece in parts if piece not in pieces]
    draw.shuffle(others)
    return _fill(others, room, parts, staying)


@dataclass
class LearnedScales:
    """scales: by label. rows: the factors tried at the end."""

    scales: dict[str, float]
    rows: list[Figures] = field(default_factory=list)


@dataclass
class _Fit:
    """The state of learning scales, by label: the scales, Adam's two moments, and the mean of the last third of the
    steps; weight: the Lagrange multiplier of the cost."""

    scales: dict[str, float]
    first: dict[str, float]
    second: dict[str, float]
    mean: dict[str, float]
    weight: float = 1.0
    counted: int = 0


def learn_scales(
    bench: Bench, runner: Runner, pieces: Sequence[Piece], limit: float, steps: int = STEPS
) -> LearnedScales:
    """How much of each piece's difference to add in a graft, learned as one number per piece. Leaves the bench at home.

    The replies' loss is lowered while text may get harder by a limit only (a Lagrangian whose multiplier follows the
    cost). The gradient of a scale is the dot product of the loss's gradient with the piece's difference, so that beside
    the model one tensor's gradient is held, and a handful of numbers is all that is fitted. Ends with one factor on all
    scales: of FACTORS, refined twice, the best for replies that keeps the limit. Related: learned masks on the
    difference (ILA, arXiv:2410.17875), which fit a mask per layer while training goes on.

    Args:
        limit: The most that the scales may cost on held-out text, as a share of its bits.
    """
    names = {name: piece.label for piece in pieces for name in piece.names}
    runner.start()
    home: Figures = runner.recorded("scales home", runner.score)
    labels = [piece.label for piece in pieces]
    zero = dict.fromkeys(labels, 0.0)
    fit = _Fit(dict.fromkeys(labels, START), zero, zero, zero)
    home_text = _text_nats(home, runner)
    for step in range(steps):
        # a step is a function of the state before it, so that a rerun takes what the journal holds
        after = runner.recorded(
            f"scales {step}",
            lambda fit=fit, step=step: vars(_step(bench, runner, names, fit, step, steps, limit, home_text)),  # type: ignore[misc]
        )
        fit = _Fit(**after)
    rows = [_tried(bench, runner, names, fit.mean, factor, home) for factor in FACTORS]
    for _ in range(REFINED):  # halfway to the next one above it
        best = _best(rows, limit)["factor"]
        above = [row["factor"] for row in rows if row["factor"] > best]
        if above:
            rows.append(_tried(bench, runner, names, fit.mean, (best + min(above)) / 2, home))
    best = _best(rows, limit)["factor"]
    bench.put(names, "home")
    return LearnedScales({label: scale * best for label, scale in fit.mean.items()}, rows)


def _step(
    bench: Bench,
    runner: Runner,
    names: Mapping[str, str],
    fit: _Fit,
    step: int,
    steps: int,
    limit: float,
    home_text: float,
) -> _Fit:
    """One step of Adam on the scales, and of the multiplier on the cost."""
    for name, label in names.items():
        bench.put([name], "chat", fit.scales[label])
    gradients = Gradients(bench, names)
    losses = gradients.run(batch for batch in runner.batches if batch.kind in ("chats", "text"))
    runner.spend(3)
    cost = losses["text"] / home_text - 1
    gains, costs = dict.fromkeys(fit.scales, 0.0), dict.fromkeys(fit.scales, 0.0)
    for name, label in names.items():
        slopes = gradients.dots.get(name, {})  # none where no token came by: an expert that nothing chose
        gains[label] -= slopes.get("chats", 0.0)
        costs[label] += slopes.get("text", 0.0) / home_text
    weight = fit.weight
    if step == 0 and sum(costs.values()) > 0:  # at which the one scale for all would rest here
        weight = max(sum(gains.values()) / sum(costs.values()), 0.1)
    rate = RATE * (1 - step / steps) + 0.005
    result = _Fit(dict(fit.scales), {}, {}, dict(fit.mean), weight, fit.counted)
    for label in fit.scales:
        slope = weight * costs[label] - gains[label]
        result.first[label] = 0.8 * fit.first[label] + 0.2 * slope
        result.second[label] = 0.95 * fit.second[label] + 0.05 * slope**2
        hat = result.first[label] / (1 - 0.8 ** (step + 1))
        result.scales[label] -= rate * hat / (math.sqrt(result.second[label] / (1 - 0.95 ** (step + 1))) + 1e-8)
    result.weight *= math.exp(max(-0.3, min(0.3, 8 * (cost - limit))))
    if step >= 2 * steps // 3:
        result.counted += 1
        for label, scale in result.scales.items():
            result.mean[label] += (scale - result.mean[label]) / result.counted
    return result


def _best(rows: Sequence[Figures], limit: float) -> Figures:
    """The row with the likeliest replies among those that keep the limit; a factor of 0 always does."""
    return min((row for row in rows if row["cost"] <= limit), key=lambda row: row["response_nll"])


def _text_nats(figures: Figures, runner: Runner) -> float:
    """Nats per token of the text, from its bits per byte."""
    tokens = sum(len(batch.rows_R) for batch in runner.batches if batch.kind == "text")
    return figures["bits_per_byte"] * math.log(2) * runner.held_out.size / tokens


def _tried(
    bench: Bench, runner: Runner, names: Mapping[str, str], scales: Mapping[str, float], factor: float, home: Figures
) -> Figures:
    def measure() -> dict[str, Any]:
        for name, label in names.items():
            bench.put([name], "chat", factor * scales[label])
        runner.start()
        return runner.score()

    figures = runner.recorded(f"factor {factor:g}", measure)
    return {
        "factor": factor,
        "response_nll": figures["response_nll"],
        "cost": figures["bits_per_byte"] / home["bits_per_byte"] - 1,
    }
