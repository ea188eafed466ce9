"""The causal signal: one piece's difference put into a model, or taken out of the other, and what that changes.

Two sweeps over the layers with one model in memory. In: home with the piece's difference added. Out: home with the
whole difference, less the piece's. The effects of the first and the last to come are averaged, as for a Shapley value
from two of its orders. A sweep goes upwards, and what lies below the piece is not computed again, so that a layer costs
half a forward pass on average.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lapis.errors import DataError
from lapis.planning.measure import Runner
from lapis.planning.pieces import Piece, together
from lapis.planning.tensor_swap import Bench, Side

Figures = dict[str, float]
Tell = Callable[[int, int], None]


@dataclass
class Effects:
    """home, full: figures of home and of home with all differences. inside, outside: of each piece, by label."""

    home: Figures
    full: Figures
    into: dict[str, Figures] = field(default_factory=dict)
    out: dict[str, Figures] = field(default_factory=dict)
    passes: float = 0.0

    @property
    def gap(self) -> float:
        """Nats per token of a reply that the whole difference gains."""
        return self.home["response_nll"] - self.full["response_nll"]

    def style(self, figures: Figures, side: str) -> float:
        """The share of the gap that a piece's difference closes when put in, or opens when taken out."""
        if side == "in":
            return (self.home["response_nll"] - figures["response_nll"]) / self.gap
        return (figures["response_nll"] - self.full["response_nll"]) / self.gap

    def knowledge(self, figures: Figures, side: str) -> float | None:
        """The share by which plain text, and right choices, get harder with the piece's difference; None unmeasured."""
        found = []
        for key in ("bits_per_byte", "right_nll"):
            if key in self.home:
                change = figures[key] - self.home[key] if side == "in" else self.full[key] - figures[key]
                found.append(change / self.home[key])
        return sum(found) / len(found) if found else None

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
    tell: Tell | None = None,
) -> Effects:
    """The effect of every piece. everything: the tensors that the whole difference is made of.

    Leaves the bench at home. Raises DataError where the whole difference does not make replies likelier.
    """
    bench.put(everything, "chat")
    runner.start()
    full = runner.score()
    bench.put(everything, "home")
    runner.start()
    effects = Effects(runner.score(keep=True), full)
    if effects.gap <= 0:
        raise DataError(
            f"plan: chat finds these replies no likelier than base ({full['response_nll']:.3f} and "
            f"{effects.home['response_nll']:.3f} nats per token); is it its chat version, and are they its kind?"
        )
    wanted = list(sides)
    total, done = len(wanted) * len(pieces), 0
    for side in wanted:
        rest: Side = "home" if side == "in" else "chat"
        other: Side = "chat" if side == "in" else "home"
        table = effects.into if side == "in" else effects.out
        bench.put(everything, rest)
        runner.start()
        if side == "out":
            runner.score(keep=True)
        for piece in (piece for piece in pieces if piece.layer is None):
            table[piece.label] = _outside(bench, runner, piece, rest, other)
        if any(piece.layer is None for piece in pieces):
            runner.start()
        for layer in range(bench.model.config.layers):
            for piece in (piece for piece in pieces if piece.layer == layer):
                bench.put(piece.names, other)
                table[piece.label] = runner.score(layer)
                bench.put(piece.names, rest)
                done += 1
                if tell:
                    tell(done, total)
            runner.advance(layer)
    bench.put(everything, "home")
    effects.passes = runner.passes
    return effects


def measure_set(
    bench: Bench, runner: Runner, effects: Effects, chosen: Sequence[Piece], everything: Sequence[str]
) -> dict[str, float | None]:
    """style and knowledge of several pieces put in together, and taken out together. Leaves them in."""
    names = together(chosen)
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


def _outside(bench: Bench, runner: Runner, piece: Piece, rest: Side, other: Side) -> Figures:
    """An embedding or a head: the whole pass is new, and distributions are not compared, since their head is gone."""
    bench.put(piece.names, other)
    runner.start()
    found = runner.score()
    bench.put(piece.names, rest)
    return {key: value for key, value in found.items() if not key.startswith("kl_")}
