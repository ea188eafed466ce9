"""What each piece's difference does: put into one model, taken out of the other, and by its gradient.

Two sweeps over the layers with one model in memory. In: home with the piece's difference added. Out: home with the
whole difference, less the piece's. The effects of the first and the last to come are averaged, as for a Shapley value
from two of its orders. A sweep goes upwards, and what lies below the piece is not computed again, so that a layer costs
half a forward pass on average. Gradient x difference says the same to first order, for one backward pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lapis.errors import DataError
from lapis.model.scoring import token_log_probabilities
from lapis.planning.held_out import Figures, HeldOutBatch, Runner
from lapis.planning.pieces import Bench, Piece, Side, together

Dots = dict[str, dict[str, float]]  # tensor -> "chats" and "text" -> figure


@dataclass
class Effects:
    """home, full: figures of home and of home with all differences. into, out: of each piece put in and taken out, by
    label."""

    home: Figures
    full: Figures
    into: dict[str, Figures] = field(default_factory=dict)
    out: dict[str, Figures] = field(default_factory=dict)
    passes: float = 0.0

    @property
    def gap(self) -> float:
        """Nats per token of a reply that the whole difference gains."""
        return self.home["response_nll"] - self.full["response_nll"]

    def style(self, figures: Mapping[str, float], side: str) -> float:
        """The share of the gap that a piece's difference closes when put in, or opens when taken out."""
        if side == "in":
            return (self.home["response_nll"] - figures["response_nll"]) / self.gap
        return (figures["response_nll"] - self.full["response_nll"]) / self.gap

    def knowledge(self, figures: Mapping[str, float], side: str) -> float | None:
        """The share by which plain text, and right choices, get harder with the piece's difference; None unmeasured."""
        changes = []
        for key in ("bits_per_byte", "right_nll"):
            if key in self.home:
                change = figures[key] - self.home[key] if side == "in" else self.full[key] - figures[key]
                changes.append(change / self.home[key])
        return sum(changes) / len(changes) if changes else None

    def both(self, label: str) -> dict[str, float | None]:
        """style and knowledge of a piece, averaged over the sweeps that there were."""
        sides = [(table[label], side) for table, side in ((self.into, "in"), (self.out, "out")) if label in table]
        style = [self.style(figures, side) for figures, side in sides]
        knowledge = [k for figures, side in sides if (k := self.knowledge(figures, side)) is not None]
        return {
            "style": sum(style) / len(style) if style else None,
            "knowledge": sum(knowledge) / len(knowledge) if knowledge else None,
        }


def sweep(
    bench: Bench,
    runner: Runner,
    pieces: Sequence[Piece],
    everything: Sequence[str],
    sides: Iterable[str] = ("in", "out"),
) -> Effects:
    """The effect of every piece. Leaves the bench at home.

    Args:
        bench: The model.
        runner: What to measure with.
        pieces: Pieces of any size; they may overlap.
        everything: The tensors that the whole difference is made of.
        sides: "in", "out", or both.

    Raises:
        DataError: The whole difference does not make replies likelier.
    """
    sides = list(sides)

    def at(side: Side, *, keep: bool = False) -> Figures:
        bench.put(everything, side)
        runner.start()
        return runner.score(keep=keep)

    full: Figures = runner.recorded("full", lambda: at("chat"))
    todo = {side: [p for p in pieces if f"{side} {p.label}" not in runner.journal.lines] for side in sides}
    # distributions are compared with home's, so that home is run again where anything is left to measure
    home = at("home", keep=True) if any(todo.values()) else runner.recorded("home", lambda: at("home"))
    effects = Effects(home, full)
    if effects.gap <= 0:
        raise DataError(
            f"plan: chat finds these replies no likelier than base ({full['response_nll']:.3f} and "
            f"{effects.home['response_nll']:.3f} nats per token); is it its chat version, and are they its kind?"
        )
    for side in sides:
        if todo[side]:
            _sweep_side(bench, runner, todo[side], everything, side)
        table = effects.into if side == "in" else effects.out
        table |= {piece.label: runner.journal.lines[f"{side} {piece.label}"]["figures"] for piece in pieces}
    bench.put(everything, "home")
    effects.passes = runner.passes
    return effects


def _sweep_side(bench: Bench, runner: Runner, pieces: Sequence[Piece], everything: Sequence[str], side: str) -> None:
    """Measures pieces from the lowest layer to the highest; each is back where it was afterwards."""
    rest: Side = "home" if side == "in" else "chat"
    other: Side = "chat" if side == "in" else "home"
    bench.put(everything, rest)
    runner.start()
    if side == "out":
        runner.score(keep=True)

    def without_distances(piece: Piece) -> Figures:
        """Of an embedding or a head: the whole pass is new, and distributions are not compared, for their head is
        another."""
        runner.start()
        return {key: value for key, value in runner.score().items() if not key.startswith("kl_")}

    for piece in (piece for piece in pieces if piece.layer is None):
        bench.put(piece.names, other)
        runner.recorded(f"{side} {piece.label}", lambda piece=piece: without_distances(piece))  # type: ignore[misc]
        bench.put(piece.names, rest)
    if any(piece.layer is None for piece in pieces):
        runner.start()
    last = max((piece.layer for piece in pieces if piece.layer is not None), default=-1)
    for layer in range(last + 1):
        for piece in (piece for piece in pieces if piece.layer == layer):
            bench.put(piece.names, other)
            runner.recorded(f"{side} {piece.label}", lambda layer=layer: runner.score(layer))  # type: ignore[misc]
            bench.put(piece.names, rest)
        runner.advance(layer)


def measure_set(
    bench: Bench, runner: Runner, effects: Effects, pieces: Sequence[Piece], everything: Sequence[str]
) -> dict[str, float | None]:
    """style and knowledge of several pieces put in together, and taken out together. Leaves them in."""
    names = together(pieces)
    bench.put(everything, "chat")
    bench.put(names, "home")
    runner.start()
    out = runner.score()
    bench.put(everything, "home")
    bench.put(names, "chat")
    runner.start()
    into = runner.score()
    return {
        "style": effects.style(into, "in"),
        "style_out": effects.style(out, "out"),
        "knowledge": effects.knowledge(into, "in"),
        "knowledge_out": effects.knowledge(out, "out"),
        **{key: value for key, value in into.items() if not key.startswith("kl_")},
    }


class Gradients:
    """Gradient x difference: what the losses say of every tensor's change without making it.

    One backward pass over held-out material gives for each tensor the dot product of the loss's gradient with
    chat - base (how the loss changes, to first order, when the difference is added) and the squared length of the
    gradient (how much the loss would have of moving there). A gradient is used as soon as it is there and let go, so
    that beside the model there is one tensor's gradient and one tensor's difference.

    dots: gradient . difference, by tensor on disk. squares: |gradient|^2, summed by batch.
    """

    def __init__(self, bench: Bench, names: Iterable[str]) -> None:
        self.bench = bench
        self.dots: Dots = {}
        self.squares: Dots = {}
        self._owners: dict[str, list[tuple[str, int]]] = {}
        for name in (name for name in names if bench.movable(name)):
            for i, region in enumerate(bench.regions(name)):
                if isinstance(bench.parameter(region.parameter), nn.Parameter):
                    self._owners.setdefault(region.parameter, []).append((name, i))

    def run(self, batches: Iterable[HeldOutBatch], weights: dict[str, float] | None = None) -> dict[str, float]:
        """Backward passes over batches; the loss of each kind is its mean over tokens times its weight (1)."""
        batches = [batch for batch in batches if len(batch.rows_R)]
        counts: dict[str, int] = {}
        for batch in batches:
            counts[batch.kind] = counts.get(batch.kind, 0) + len(batch.rows_R)
        losses: dict[str, float] = {}
        handles: list[Any] = []
        kind = ""

        def hook(target: str) -> Any:
            def take(parameter: Tensor) -> None:
                self._take(target, parameter, kind)

            return take

        try:
            for target in self._owners:
                parameter = self.bench.parameter(target).requires_grad_(True)
                added = parameter.register_post_accumulate_grad_hook(hook(target))  # type: ignore[no-untyped-call]
                handles.append(added)
            for batch in batches:
                kind = batch.kind
                loss = self._loss(batch) / counts[kind]
                losses[kind] = losses.get(kind, 0.0) + float(loss.detach())
                (loss * (weights or {}).get(kind, 1.0)).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
            self.bench.model.requires_grad_(False)
        return losses

    def _loss(self, batch: HeldOutBatch) -> Tensor:
        hidden_RD = self.bench.model.hidden(batch.ids_BT)[batch.rows_R, batch.places_R]
        return -token_log_probabilities(self.bench.model, hidden_RD, batch.targets_R).sum()

    def _take(self, target: str, parameter: Tensor, kind: str) -> None:
        assert parameter.grad is not None
        for name, place in self._owners[target]:
            gradient = self.bench.regions(name)[place].of(parameter.grad)
            for table, value in (
                (self.dots, torch.sum(gradient * self.bench.difference(name)[place], dtype=torch.float64)),
                (self.squares, torch.sum(gradient**2, dtype=torch.float64)),
            ):
                row = table.setdefault(name, {})
                row[kind] = row.get(kind, 0.0) + float(value)
        parameter.grad = None
