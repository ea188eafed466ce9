"""`lapis.plan`: check what is given, measure, decide, and put the result together.

inputs = check_inputs(...)          problems are reported before a weight is read    inputs.py
study = Study(...)                  every piece's effects, with one model in memory      effects.py
chosen = decide(...)                which pieces fit the goal and the budget             choice.py
PlanResult                          what was found, to show and to write                 result.py
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lapis.evaluation.chats import answer
from lapis.evaluation.choices import Choice
from lapis.planning.choice import FACTORS, REFINED, STEPS, TRIES, at_random, choose, learn_scales, search, worth
from lapis.planning.effects import Effects, Gradients, measure_set, sweep
from lapis.planning.held_out import PlanJournal, Runner
from lapis.planning.inputs import (
    SHAPE,
    Files,
    Model,
    PlanInputs,
    check_inputs,
    describe_template_rows,
    same_words,
)
from lapis.planning.options import Goal, PieceSize, PlanOptions, Sweeps
from lapis.planning.pieces import Bench, Piece, differences, outside, pieces_of, tensor_signals
from lapis.planning.result import PlanResult
from lapis.text.corpus.corpus import ChatRecord
from lapis.weights.diff.table import DiffTable
from lapis.weights.matching import is_norm, is_vocabulary

REPLIES, REPLY_TOKENS = 32, 48  # generated for the stop rate

Progress = Callable[[str, float, float], None]
Rows = dict[str, dict[str, Any]]


def plan(
    base: Model,
    chat: Model,
    goal: Goal = PlanOptions.goal,
    budget: float = PlanOptions.budget,
    *,
    chats: Files | Sequence[ChatRecord] | None = None,
    text: Files | None = None,
    choices: str | Path | Sequence[Choice] | None = None,
    onto: Model | None = None,
    cost: float = PlanOptions.cost,
    embeddings: Literal["keep", "add"] = PlanOptions.embeddings,
    pieces: PieceSize = PlanOptions.pieces,
    sweeps: Sweeps = PlanOptions.sweeps,
    spectra: bool = PlanOptions.spectra,
    gradients: bool = PlanOptions.gradients,
    replies: bool = PlanOptions.replies,
    draws: int = PlanOptions.draws,
    limit: int = PlanOptions.limit,
    context: int = PlanOptions.context,
    seed: int = PlanOptions.seed,
    allow_unrelated: bool = PlanOptions.allow_unrelated,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
    journal: Path | None = None,
) -> PlanResult:
    """Which pieces of a model to tune or merge, for a goal, within a share of the blocks' parameters.

    Args:
        base: The model that chat was tuned from: a folder, or an open checkpoint.
        chat: Its chat version.
        goal: This and the options that are not named here are those of `lapis.planning.options.PlanOptions`.
        chats: Files of chats to measure with, or chats. Without them the choice rests on the tensors alone.
        text: Files of plain text that the model should not lose.
        choices: Questions of facts that it should not lose, as in `lapis eval`.
        onto: The model of a coming graft: effects are measured there, and a scale for each piece is learned.
        progress: Called with what is measured, the forward passes done, and how many there will be.
        report: Called with lines for people: what the plan costs, before it is spent.
        journal: A file that keeps what was measured, so that the same call goes on where it was killed. It is removed
            at the end.

    Raises:
        ConfigError: An option is out of range, or no piece fits into the budget.
        CheckpointError: The models do not belong together.
        DataError: There is nothing to measure with, or chat's replies are no likelier with the difference.
    """
    started = time.perf_counter()
    options = PlanOptions(
        goal, budget, cost, embeddings, pieces, sweeps, spectra, gradients, replies, draws, limit, context, seed=seed,
        allow_unrelated=allow_unrelated,
    )  # fmt: skip
    inputs = check_inputs(base, chat, onto, chats, text, choices, options)
    watch = progress or (lambda what, done, total: None)
    table = differences(inputs.base, inputs.chat, spectra, lambda done, total: watch("comparing tensors", done, total))
    rows = _tensor_rows(inputs, options, table)
    study = None
    place = None if inputs.held_out is None else journal
    with PlanJournal(place, inputs.job(options) if place else "") as plan_journal:
        if inputs.held_out is not None:
            study = Study(inputs, options, plan_journal, watch, report or (lambda line: None))
            study.measure_pieces(rows)
        chosen = decide(inputs, options, rows, study)
        result = _result(inputs, options, table, rows, chosen, study)
        if study is not None:
            if onto is not None:
                study.learn_scales(result, rows)
            study.measure_choice(result, chosen)
            result.passes = study.runner.passes
    _add_rows(result, inputs, rows, chosen)
    result.seconds = time.perf_counter() - started
    return result


def decide(inputs: PlanInputs, options: PlanOptions, rows: Rows, study: "Study | None") -> list[Piece]:
    """The pieces that fit the goal and the budget."""
    if study is None or options.goal != "style":
        return choose(inputs.parts, worth(options.goal, inputs.parts, rows), inputs.room)
    return search(study.bench, study.runner, study.effects, inputs.parts, rows, study.moved, inputs.room, options.seed)


@dataclass
class Study:
    """Everything that is measured with the model in memory.

    moved: the tensors that the whole difference is made of: all where home is base itself, else what a graft adds.
    """

    inputs: PlanInputs
    options: PlanOptions
    journal: PlanJournal
    watch: Progress
    report: Callable[[str], None]
    effects: Effects = field(init=False)
    bench: Bench = field(init=False)
    runner: Runner = field(init=False)
    moved: list[str] = field(init=False)
    learned: dict[str, float] = field(default_factory=dict)
    _scaled: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        inputs = self.inputs
        assert inputs.held_out is not None and inputs.tokenizer is not None
        home = inputs.home
        total = count_passes(inputs, self.options)
        tokens = inputs.held_out.tokens
        held = ", ".join(f"{count:,} of {kind}" for kind, count in tokens.items() if count)
        self.report(f"the plan takes about {total:,.0f} forward passes over {sum(tokens.values()):,} tokens ({held})")
        self.bench = Bench(home, inputs.base, inputs.chat, inputs.template)
        began: list[float] = []

        def spent(passes: float) -> None:
            self.watch("measuring", passes, max(total, passes))
            if not began:
                began.append(time.perf_counter())
            elif len(began) == 1 and passes >= 2:  # the first pass also warms the machine up
                began.append(passes)
                seconds = (time.perf_counter() - began[0]) / (passes - 1)
                self.report(f"a pass takes {seconds:.2g} s, so that about {_duration(seconds * total)} are ahead")

        self.runner = Runner(self.bench.model, inputs.held_out, self.journal, spent)
        if self.journal.lines:
            self.report(f"going on: {len(self.journal.lines)} measurements are there already")
        self.moved = [
            name
            for name in home.names
            if not inputs.grafting or not (is_norm(home.part(name)) or is_vocabulary(home.part(name)))
        ]

    def measure_pieces(self, rows: Rows) -> None:
        """Adds style and knowledge, and the figures behind them, to each piece's row."""
        sides = ("in", "out") if self.options.sweeps == "both" else (self.options.sweeps,)
        self.effects = sweep(self.bench, self.runner, self.inputs.candidates, self.moved, sides)
        for piece in self.inputs.candidates:
            row = rows.setdefault(piece.label, {})
            row.update(self.effects.both(piece.label))
            for side, table in (("in", self.effects.into), ("out", self.effects.out)):
                row.update({f"{key}_{side}": value for key, value in table.get(piece.label, {}).items()})
        if self.options.gradients:
            for label, figures in self.runner.recorded("gradients", self._gradients).items():
                rows[label].update(figures)

    def _gradients(self) -> Rows:
        """Gradient x difference at home: what replies and text would gain (+) or lose (-), in nats per token."""
        pieces = self.inputs.pieces
        gradients = Gradients(self.bench, {name for piece in pieces for name in piece.names})
        gradients.run(batch for batch in self.runner.batches if batch.kind in ("chats", "text"))
        self.runner.spend(3)
        rows: Rows = {piece.label: {} for piece in pieces}
        for piece in pieces:
            for kind in ("chats", "text"):
                if self.runner.held_out.tokens[kind]:
                    for what, table, sign in (("gradient", gradients.dots, -1), ("pull", gradients.squares, 1)):
                        total = sum(table[name].get(kind, 0.0) for name in piece.names if name in table)
                        rows[piece.label][f"{what}_{kind}"] = sign * total
        return rows

    def learn_scales(self, result: PlanResult, rows: Rows) -> None:
        """A scale for each part and token table, such that text gets at most `cost` harder."""
        inputs = self.inputs
        add = self.options.embeddings == "add" and same_words(inputs.base, inputs.chat, inputs.home)
        pieces = [*inputs.parts, *(outside(inputs.home) if add else [])]
        self.learned = learn_scales(self.bench, self.runner, pieces, self.options.cost).scales
        self._scaled = {name: piece.label for piece in pieces for name in piece.names}
        result.scales = [_scale(piece, self.learned[piece.label]) for piece in pieces]
        result.embeddings = "add" if len(pieces) > len(inputs.parts) else "keep"
        for label, scale in self.learned.items():
            rows.setdefault(label, {})["scale"] = scale

    def measure_choice(self, result: PlanResult, chosen: Sequence[Piece]) -> None:
        """Adds to the result: home, the choice, random choices, the whole difference, and the learned scales."""
        effects, bench = self.effects, self.bench
        size, seed = sum(piece.parameters for piece in chosen), self.options.seed
        draws = [at_random(self.inputs.parts, size, seed + i) for i in range(self.options.draws)]
        bench.put(self.moved, "home")
        measured = result.measured
        measured["home"] = {**_without_distances(effects.home), **self._stop_rate("home")}
        for name, pieces in (("chosen", chosen), ("control", draws[0])):
            figures = self.runner.recorded(
                f"measured {name}", lambda pieces=pieces: measure_set(bench, self.runner, effects, pieces, self.moved)  # type: ignore[misc]
            )  # fmt: skip
            measured[name] = {**figures, **self._stop_rate(name, pieces)}
        result.controls.append({"seed": seed, **measured["control"]})
        for number, pieces in enumerate(draws[1:], 1):
            into = self.runner.recorded(f"draw {number}", lambda pieces=pieces: self._put_in(pieces))  # type: ignore[misc]
            figures = {"style": effects.style(into, "in"), "knowledge": effects.knowledge(into, "in")}
            result.controls.append({"seed": seed + number, **figures, **_without_distances(into)})
        bench.put(self.moved, "chat")
        whole = {"style": 1.0, "knowledge": effects.knowledge(effects.full, "in")}
        measured["full"] = {**whole, **_without_distances(effects.full), **self._stop_rate("full")}
        bench.put(self.moved, "home")
        if self._scaled:
            for name, label in self._scaled.items():
                bench.put([name], "chat", self.learned[label])
            self.runner.start()
            into = self.runner.recorded("measured scaled", self.runner.score)
            figures = {"style": effects.style(into, "in"), "knowledge": effects.knowledge(into, "in")}
            measured["scaled"] = {**figures, **_without_distances(into), **self._stop_rate("scaled")}
            bench.put(self._scaled, "home")

    def _put_in(self, pieces: Iterable[Piece]) -> dict[str, float]:
        """Figures of home with the differences of some pieces."""
        self.bench.put(self.moved, "home")
        for piece in pieces:
            self.bench.put(piece.names, "chat")
        self.runner.start()
        return self.runner.score()

    def _stop_rate(self, name: str, pieces: Iterable[Piece] = ()) -> dict[str, float]:
        """The share of greedy replies that end, of the model as it stands; `pieces` are put in first."""
        prompts = self.runner.held_out.prompts[:REPLIES]
        if not (self.options.replies and prompts):
            return {}

        def measure() -> dict[str, float]:
            if pieces:
                self.bench.put(self.moved, "home")
                for piece in pieces:
                    self.bench.put(piece.names, "chat")
            assert self.inputs.tokenizer is not None
            replies = answer(self.bench.model, self.inputs.tokenizer, prompts, max_tokens=REPLY_TOKENS)
            ended = [reply.stop_reason == "end" for reply in replies if reply is not None]
            return {"stop_rate": sum(ended) / len(ended)} if ended else {}

        rates: dict[str, float] = self.runner.recorded(f"replies {name}", measure)
        return rates


def count_passes(inputs: PlanInputs, options: PlanOptions) -> float:
    """Forward passes over the held-out material that a plan takes, about; a backward pass counts as two."""
    layers, sides = inputs.shape.layers, 2 if options.sweeps == "both" else 1
    whole = layers if inputs.stepwise else math.inf
    pieces = sum(1.0 if piece.layer is None else 1 - piece.layer / whole for piece in inputs.candidates)
    passes = 2 + sides * (pieces + 1) + (1 if options.sweeps != "in" else 0)
    passes += 3 if options.gradients else 0
    passes += TRIES if options.goal == "style" else 0
    passes += 3 * STEPS + len(FACTORS) + REFINED + 2 if inputs.grafting else 0
    return passes + 3 + options.draws


def _tensor_rows(inputs: PlanInputs, options: PlanOptions, table: DiffTable) -> Rows:
    """What the tensors alone tell of each piece of base, by label."""
    pieces = [*pieces_of(inputs.base, "layers"), *pieces_of(inputs.base, options.pieces)]
    rows = {piece.label: tensor_signals(table, piece) for piece in pieces}
    if inputs.held_out is None:
        for row in rows.values():
            row.update(style=row["energy"], knowledge=None)
    return rows


def _result(
    inputs: PlanInputs,
    options: PlanOptions,
    table: DiffTable,
    rows: Mapping[str, Any],
    chosen: Sequence[Piece],
    study: Study | None,
) -> PlanResult:
    """The choice and the control, before they are measured together."""
    size = sum(piece.parameters for piece in chosen)
    control = at_random(inputs.parts, size, options.seed)
    shape = {key: getattr(inputs.shape, key) for key in ("family", "head_dim", *SHAPE) if hasattr(inputs.shape, key)}
    result = PlanResult(
        options.goal, options.budget, inputs.base.source, inputs.chat.source, shape,
        seed=options.seed, notes=[*inputs.notes, *table.notes],
    )  # fmt: skip
    result.share = size / sum(piece.parameters for piece in inputs.layers)
    result.tune, result.control = ([e for p in set_ for e in p.entries()] for set_ in (chosen, control))
    result.scales = [_scale(piece, 1.0) for piece in chosen]
    if study is None:
        result.notes.append("no chats were given: the choice rests on the size of the differences alone")
    else:
        result.signal, result.tokens = "causal", study.runner.held_out.tokens
        result.notes += [] if inputs.stepwise else [n for n in study.bench.model.notes if n not in result.notes]
        if options.goal == "style":
            result.notes.append(
                f"the choice is the best of {TRIES} sets that were measured on this same material, so a part of its "
                f"lead over random choices is selection; other chats and texts tell how much"
            )
        if not inputs.has_text:
            result.notes.append("no text and no choices were given: what plain text loses is not measured")
    if options.goal == "knowledge":
        result.notes.append(
            "for knowledge no choice of layers was found that keeps chat as well as this: let all of base read, with "
            "old text mixed in, and graft the difference onto chat (docs/choosing-layers.md)"
        )
    else:
        result.template_rows = describe_template_rows(inputs)
        result.template = [row["token"] for row in result.template_rows]
    return result


def _add_rows(result: PlanResult, inputs: PlanInputs, rows: Rows, chosen: Sequence[Piece]) -> None:
    """Adds a row for each piece and for each layer, with every signal."""
    taken = {piece.label for piece in chosen}
    drawn = {(entry["layer"], entry["component"]) for entry in result.control}
    others = [piece for piece in outside(inputs.home) if piece.label in rows]
    result.pieces = [
        {"layer": p.label, "parameters": p.parameters, **rows[p.label], "chosen": p.label in taken,
         "control": p.layer is not None and all((e["layer"], e["component"]) in drawn for e in p.entries())}
        for p in [*inputs.parts, *others]
    ]  # fmt: skip
    result.scores = [
        {"layer": p.layer, "parameters": p.parameters, **rows[p.label], "chosen": p.layer in result.layers,
         "control": p.layer in {entry["layer"] for entry in result.control}}
        for p in inputs.layers
    ]  # fmt: skip


def _without_distances(figures: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if not key.startswith("kl_")}


def _scale(piece: Piece, scale: float) -> dict[str, Any]:
    where = {} if piece.layer is None else {"layers": [piece.layer]}
    return {**where, "components": list(piece.components), "scale": round(scale, 4)}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
