"""What a run will take on this machine: its first steps are done and measured, and thrown away.

They are real steps on the run's own data, so nothing of the model, the objective or the machine has to be known here;
what is held out is evaluated once, and the disk is tried with a file that has no name and is gone at once.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lapis.errors import TrainingError
from lapis.model.size import measure
from lapis.model.transformer import Transformer
from lapis.training.config import TrainConfig
from lapis.training.distributed.parallel import Processes
from lapis.training.forecast.budget import Budget
from lapis.training.forecast.memory import MemoryWatch
from lapis.training.forecast.pauses import Pauses, seconds_to_save
from lapis.training.loop.loop import TrainingRun
from lapis.training.loop.progress import Watch
from lapis.training.loop.stop_request import StopRequest
from lapis.training.objectives.objective import Objective
from lapis.training.optim.footprint import copy_bytes, trained_bytes, weight_bytes, written_bytes
from lapis.training.setup.blocks import compiled
from lapis.training.setup.probe import available
from lapis.training.setup.remedies import either, for_the_state, smaller_rows

STEPS, SECONDS = 5, 30.0  # of a probe, at most; two steps are always done, after one that warms up

Start = Callable[[], tuple[Objective, Transformer]]


@dataclass(frozen=True)
class RunMemory:
    """Bytes that a run holds at its peak, by what they are for.

    Attributes:
        process: Python, libraries, the tokenizer and the data, before the first step.
        weights: Of the model, frozen ones included.
        gradients: Of what is trained.
        optimizer: Its state.
        copies: Of what is trained: an average, the best weights, the last within the limits.
        activations: What a micro-batch keeps for its backward pass, and all that was not counted above.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        steps: Updates of the weights.
        tokens: Positions that they compute.
        seconds: Of steps, held-out evaluations and checkpoints.
        seconds_per_step: The median of those measured.
        seconds_per_evaluation: Of what is held out, once.
        seconds_per_checkpoint: Until it is on the disk, as a smaller file showed it.
        flops: Of all steps: 2 FLOPs per weight and token forward, as many for the gradients of activations, and as many
            for those of what is trained.
        memory: At the peak.
        checkpoint_bytes: Of one checkpoint on disk.
        free_bytes: Of memory, beside the run at its peak.
        threads, precision, compile: How a step is computed.
        settings: What a budget changed: keys of the run's settings and their values; None for a bound of time or of
            epochs in whose place steps stand.
    """

    steps: int
    tokens: int
    seconds: float
    seconds_per_step: float
    seconds_per_evaluation: float
    seconds_per_checkpoint: float
    flops: float
    memory: RunMemory
    checkpoint_bytes: int
    free_bytes: int
    threads: int
    precision: str
    compile: bool
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def assignments(self) -> list[str]:
        """`settings` as they are given on a command line."""
        return [f"{name}={'null' if value is None else value}" for name, value in self.settings.items()]

    def to_json(self) -> dict[str, Any]:
        """The object that `lapis train --plan-only --json` prints."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def forecast(
    start: Start, config: TrainConfig, watch: Watch, budget: Budget | None = None, *, choose_batch: bool = False,
    out: Path | None = None,
) -> Forecast:  # fmt: skip
    """Measures a run's first steps.

    Args:
        start: Makes the objective and the model, anew at each call.
        config: Of the run.
        watch: Hears what is done.
        budget: Settings are chosen so that the run keeps within.
        choose_batch: A budget of time or FLOPs chooses the batch, too, by the tokens that it buys (`best_tokens`).
        out: Where the run will write its checkpoints; None leaves their seconds out.

    Raises:
        TrainingError: For a budget that nothing fits.
    """
    if budget is not None and budget.kind == "bytes":
        return _within(start, config, watch, budget, out)
    result = _probe(start, config, watch, out)
    if budget is None:
        return result
    chosen: dict[str, Any] = {}
    each, once = _costs(result, config, budget)
    if choose_batch and each + once < budget.amount:
        chosen = _batch(config, result, (budget.amount - once) / each * result.tokens / result.steps)
        result = _probe(start, replace(config, **chosen), watch, out) if chosen else result
        each, once = _costs(result, config, budget)
    steps = int((budget.amount - once) / each)
    if steps < 1:
        what = "one step takes" if not once else "one step and what is held out take"
        unit = "seconds" if budget.kind == "seconds" else "FLOPs"
        raise TrainingError(
            f"train: {what} {each + once:.3g} {unit}, which is more than {budget.text}; {smaller_rows(config.batch)}"
        )
    bounds = {name: None for name in ("minutes", "epochs") if getattr(config, name) is not None}
    share = steps / result.steps
    return replace(
        result, steps=steps, tokens=int(result.tokens * share), seconds=_seconds(result, config, steps),
        flops=result.flops * share, settings={**bounds, "steps": steps, **chosen},
    )  # fmt: skip


def best_tokens(tokens: float) -> float:
    """Tokens of a step for a model that is trained from its beginning on so many: they grow as D^0.383, whatever the
    model's size (Bergsma et al. 2025, arXiv:2505.13738), from the best of three in benchmarks/results/recipe.md."""
    return 2048 * math.pow(tokens / 196_608, 0.383)


def _costs(result: Forecast, config: TrainConfig, budget: Budget) -> tuple[float, float]:
    """What each step takes of a budget, with its share of what comes between steps, and what is there once."""
    if budget.kind != "seconds":
        return result.flops / result.steps, 0.0
    pauses = _pauses(result)
    once = pauses.evaluating * (1 + bool(config.limits)) + pauses.timed(config, budget.amount)
    return result.seconds_per_step + pauses.share(config), once


def _seconds(result: Forecast, config: TrainConfig, steps: int) -> float:
    """Of so many steps, what comes between them, the evaluation at the end, and with limits the one at the start."""
    pauses, pace = _pauses(result), result.seconds_per_step
    return pace * steps + pauses.to_come(config, 0, steps, pace) + pauses.evaluating * bool(config.limits)


def _pauses(result: Forecast) -> Pauses:
    return Pauses(result.seconds_per_evaluation, result.seconds_per_checkpoint)


def _batch(config: TrainConfig, result: Forecast, tokens: float) -> dict[str, Any]:
    """The batch for a run of so many tokens, a power of two of rows, and the parts in which it fits into what is free;
    nothing where that is what the run has."""
    per_row = result.tokens / result.steps / config.batch
    rows = 2 ** max(0, round(math.log2(min(best_tokens(tokens), tokens / 2) / per_row)))
    each = result.memory.activations * config.accumulate / config.batch  # bytes of a row, at most
    room = (result.free_bytes + result.memory.activations) / 2
    parts = next((n for n in (2**k for k in range(rows.bit_length())) if each * rows / n <= room), rows)
    chosen = {"batch": rows, "accumulate": parts}
    return {name: value for name, value in chosen.items() if value != getattr(config, name)}


def _within(start: Start, config: TrainConfig, watch: Watch, budget: Budget, out: Path | None) -> Forecast:
    """The run with `accumulate`, and where that is not enough `checkpointing`, so that a step fits into the memory."""
    least, ways = 0, list[str]()

    def begin() -> tuple[Objective, Transformer]:
        objective, model = start()
        ways[:] = for_the_state(config, model)
        return objective, model

    for checkpointing in dict.fromkeys((config.checkpointing, "whole")):
        whole = replace(config, checkpointing=checkpointing)
        one, two = (
            _probe(begin, replace(whole, batch=rows, accumulate=1), watch, least=True).memory.total for rows in (1, 2)
        )
        least = one
        rows = 1 + (budget.amount - one) / max(two - one, 1)
        parts = [n for n in range(config.accumulate, config.batch + 1) if config.batch % n == 0]
        for accumulate in (n for n in parts if one <= budget.amount and config.batch / n <= rows):
            result = _probe(start, replace(whole, accumulate=accumulate), watch, out)
            if result.memory.total <= budget.amount:
                chosen = {"accumulate": accumulate, "checkpointing": checkpointing}
                return replace(result, settings={n: v for n, v in chosen.items() if v != getattr(config, n)})
    raise TrainingError(
        f"train: even one row at a time takes {least / 1e9:.2f} GB, which is more than {budget.text}; "
        f"{either([smaller_rows(1), *ways])}"
    )


def _first_steps(run: TrainingRun, most: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each of some first steps, after one that warms up, and of an evaluation of what is held out."""
    times: list[float] = []
    with run.computing():
        with compiled(run.model, bool(run.facts.get("compile"))):
            batches = run.objective.batches(run.state)
            while len(times) <= most and (len(times) < 3 or sum(times) < seconds):
                start = time.perf_counter()
                run.step(batches)
                times.append(time.perf_counter() - start)
        start = time.perf_counter()
        held_out = run.evaluator.metrics()
    return times[1:], time.perf_counter() - start if held_out else 0.0


def _probe(
    start: Start, config: TrainConfig, watch: Watch, out: Path | None = None, *, least: bool = False
) -> Forecast:  # fmt: skip
    """The first steps of a run. out: as for `forecast`; least: as few of them as show the memory."""
    objective, model = start()
    memory = MemoryWatch(next(model.parameters()).device)
    process = max(0, memory.held - weight_bytes(model))
    run = TrainingRun(model, objective, config, Processes(), None, watch, StopRequest())  # nothing is saved at a signal
    times, evaluating = _first_steps(run, 1 if least else STEPS, 0.0 if least else SECONDS)
    weights, trained = weight_bytes(model), trained_bytes(model)  # in the precision that the run gave them
    optimizer = sum(t.nbytes for t in run.state.optimizers.tensors().values())
    state = run.state
    now = sum(t.nbytes for group in (state.average.tensors, state.within.weights) for t in group.values())
    copied = max(now, copy_bytes(model, config))
    counted = process + weights + trained + optimizer + now
    parts = RunMemory(process, weights, trained, optimizer, copied, max(0, memory.peak - counted))
    each = statistics.median(times)
    checkpoint = written_bytes(model) + optimizer + copied
    pauses = Pauses(evaluating, 0.0 if out is None else seconds_to_save(out.parent, checkpoint))
    steps = run.state.schedule.total or max(1, pauses.steps_within(config, each, (config.minutes or 0) * 60))
    tokens = run.state.window.sums.get("tokens", 0.0) / (len(times) + 1)
    size = measure(model.config, min(objective.context, model.config.context))
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(p.numel() for p in model.parameters())
    result = Forecast(
        steps=steps,
        tokens=int(tokens * steps),
        seconds=0.0,
        seconds_per_step=each,
        seconds_per_evaluation=evaluating,
        seconds_per_checkpoint=pauses.saving,
        flops=size.flops_per_token * tokens * steps * (2 + min(1.0, share)),
        memory=parts,
        checkpoint_bytes=checkpoint,
        free_bytes=available(memory.device),
        threads=int(run.facts["threads"]),
        precision=str(run.facts["precision"]),
        compile=bool(run.facts.get("compile")),
    )
    return replace(result, seconds=_seconds(result, config, steps))
