"""What is measured of a plan with the model in memory: every piece, every signal, the choice beside the control."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lapis.evaluation.chats import answer
from lapis.planning.causal import Effects, measure_set, sweep
from lapis.planning.gradient import Gradients
from lapis.planning.measure import Exam, Runner
from lapis.planning.pieces import Piece
from lapis.planning.scales import learn_scales
from lapis.planning.tensor_swap import Bench
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.part_kinds import is_norm, is_vocabulary

Sweeps = Literal["both", "in", "out"]
REPLIES, REPLY_TOKENS = 32, 48  # generated for the stop rate


@dataclass
class Study:
    """Everything that is measured with the model in memory."""

    bench: Bench
    exam: Exam
    tokenizer: Tokenizer
    whole: bool  # home is base itself, so that all of the difference makes chat; else what a graft adds
    replies: bool
    effects: Effects = field(init=False)
    runner: Runner = field(init=False)
    moved: list[str] = field(init=False)
    learned: dict[str, float] = field(default_factory=dict)
    scaled: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        home = self.bench.home
        self.runner = Runner(self.bench.model, self.exam)
        self.moved = [
            name
            for name in home.names
            if self.whole or not (is_norm(home.part(name)) or is_vocabulary(home.part(name)))
        ]

    def sweep(self, candidates: Sequence[Piece], sweeps: Sweeps, tell: Callable[[int, int], None]) -> None:
        sides = ("in", "out") if sweeps == "both" else (sweeps,)
        self.effects = sweep(self.bench, self.runner, candidates, self.moved, sides, tell)

    def fill(self, rows: dict[str, dict[str, Any]], pieces: Iterable[Piece]) -> None:
        """Adds style and knowledge, and the figures behind them, to each piece's row."""
        for piece in pieces:
            row = rows.setdefault(piece.label, {})
            row.update(self.effects.both(piece.label))
            for side, found in (("in", self.effects.into), ("out", self.effects.out)):
                row.update({f"{key}_{side}": value for key, value in found.get(piece.label, {}).items()})

    def fill_gradients(self, rows: dict[str, dict[str, Any]], pieces: Sequence[Piece]) -> None:
        """Adds gradient x difference at home: what replies and text would gain (+) or lose (-), in nats per token."""
        gradients = Gradients(self.bench, {name for piece in pieces for name in piece.names})
        gradients.run(batch for batch in self.runner.batches if batch.kind in ("chats", "text"))
        for piece in pieces:
            for kind in ("chats", "text"):
                if self.exam.tokens[kind]:
                    for what, table, sign in (("gradient", gradients.dots, -1), ("pull", gradients.squares, 1)):
                        total = sum(table[name].get(kind, 0.0) for name in piece.names if name in table)
                        rows[piece.label][f"{what}_{kind}"] = sign * total

    def learn(
        self, parts: Sequence[Piece], tables: Sequence[Piece], cost: float, tell: Callable[[int, int], None]
    ) -> dict[str, float]:
        """A scale for each part and token table, by label, such that text gets at most `cost` harder."""
        self.learned = learn_scales(self.bench, self.runner, [*parts, *tables], cost, tell=tell).scales
        self.scaled = {name: piece.label for piece in (*parts, *tables) for name in piece.names}
        return self.learned

    def measure(self, sets: dict[str, Sequence[Piece]]) -> dict[str, dict[str, Any]]:
        """home, each set, the whole difference, and the learned scales, with the stop rate of greedy replies."""
        effects, bench = self.effects, self.bench
        bench.put(self.moved, "home")
        result: dict[str, dict[str, Any]] = {"home": {**_plain(effects.home), **self._stop_rate()}}
        for name, pieces in sets.items():
            found = measure_set(bench, self.runner, effects, pieces, self.moved)
            result[name] = {**found, **self._stop_rate()}
        bench.put(self.moved, "chat")
        all_of_it = {"style": 1.0, "knowledge": effects.knowledge(effects.full, "in")}
        result["full"] = {**all_of_it, **_plain(effects.full), **self._stop_rate()}
        if self.scaled:
            bench.put(self.moved, "home")
            for name, label in self.scaled.items():
                bench.put([name], "chat", self.learned[label])
            self.runner.start()
            into = self.runner.score()
            effect = {"style": effects.style(into, "in"), "knowledge": effects.knowledge(into, "in")}
            result["scaled"] = {**effect, **_plain(into), **self._stop_rate()}
            bench.put(self.scaled, "home")
        return result

    def _stop_rate(self) -> dict[str, float]:
        if not (self.replies and self.exam.prompts):
            return {}
        said = answer(self.bench.model, self.tokenizer, self.exam.prompts[:REPLIES], max_tokens=REPLY_TOKENS)
        ended = [reply.stop_reason == "end" for reply in said if reply is not None]
        return {"stop_rate": sum(ended) / len(ended)} if ended else {}


def _plain(figures: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if not key.startswith("kl_")}
