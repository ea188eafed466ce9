"""The one training loop. It never looks inside a batch: what is learned is the objective's business.

    result = train(model, Causal(tokenizer, ["corpus.jsonl"], context=256), TrainConfig(minutes=3), "runs/base")

A run can be killed at any moment; the same call goes on from its newest whole checkpoint and gives the same bytes.
Under torchrun every process runs this loop, the first writes, and the weights are those of one process (parallel.py).
Leaves out: the update itself (update.py), sharding.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapis.checkpoint.commit import commit
from lapis.errors import ConfigError, TrainingError
from lapis.model.transformer import Transformer
from lapis.training.config import TrainConfig
from lapis.training.distributed import parallel
from lapis.training.loop.curve import Window
from lapis.training.loop.held_out import judge, watched
from lapis.training.loop.progress import Silent, Watch, watcher
from lapis.training.loop.state import Journal, TrainState, kept_by_objective, left_clean, restore, weights_digest
from lapis.training.loop.stop_request import Wish, interruptible
from lapis.training.loop.update import Batches, Updater, memory_told
from lapis.training.objectives.objective import Objective
from lapis.training.optim.ema import Average
from lapis.training.optim.optim import Optimizers
from lapis.training.optim.schedule import Schedule
from lapis.training.result import TrainResult, last_tenth, write_result
from lapis.training.setup import probe
from lapis.training.setup.compiled import compiled, pays
from lapis.training.setup.memory import require_room
from lapis.training.setup.recompute import recomputed
from lapis.training.setup.select import describe

_SAVE_SECONDS = 300.0


def train(
    model: Transformer,
    objective: Objective,
    config: TrainConfig,
    out: Path | str,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    watch: Watch | None = None,
) -> TrainResult:
    """Train `model` in place and put the result at `out` as a model folder, with log.jsonl and training.json.

    overwrite: replace a folder at `out`. fresh: forget an interrupted run. watch: who is told of progress.
    Raises TrainingError for a loss that is not finite, nothing supervised, a step that does not fit into memory,
    another run's checkpoints, or a stop by Ctrl-C or SIGTERM (after saving); OutputError where `out` cannot be written.
    """
    out = Path(out)
    world = parallel.join()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not world.leads:
        with interruptible() as wish:
            result = _Run(model, objective, config, world, None, Silent(), wish).go(out)
            world.gather(None)  # until the first process has written
            return result
    watch = watch or watcher(out.name)
    try:
        with (
            commit(out, overwrite=overwrite, resumable=True, needs_bytes=(3 * config.keep + 4) * weights) as staging,
            left_clean(staging, fresh) as journal,
            interruptible() as wish,
        ):
            result = _Run(model, objective, config, world, journal, watch, wish).go(out)
            write_result(model, objective, config, staging.path, result)
        world.gather(None)
    finally:
        watch.close()
    return result


class _Run:
    """journal: of the process that writes; None in the others."""

    def __init__(
        self, model: Transformer, objective: Objective, config: TrainConfig, world: parallel.World,
        journal: Journal | None, watch: Watch, wish: Wish,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.config, self.world = model, objective, config, world
        self.journal, self.watch = journal, watch
        self.begun = time.monotonic()
        self._set_dtype()
        parts = config.accumulate * world.size
        if config.batch % parts:
            raise ConfigError(
                f"train: batch {config.batch} does not divide into {parts} equal parts "
                f"(accumulate {config.accumulate}, {world.size} processes)"
            )
        begin = getattr(objective, "begin", None)
        if begin is not None:  # also where the run goes on: these are the weights that it started from
            begin(model, journal.folder if journal else None)
        extra = getattr(objective, "extra", None)
        self.state = TrainState(
            model,
            Optimizers(model, config.optimizer, config.lr, config.weight_decay, config.seed, extra),
            self._schedule(),
            rows=config.batch // parts,
            parts=parts,
            objective=objective,
            seed=config.seed,
            average=Average(model, config.ema if world.leads else 0.0),
        )
        if not self.state.optimizers.parameters:
            raise TrainingError("train: every weight is frozen; leave some to train")
        self.updater = Updater(self.state, objective, config, world, wish)
        self.window = Window(means=getattr(objective, "means", frozenset()))
        self.facts: dict[str, Any] = {}

    def _set_dtype(self) -> None:
        trained = {p.dtype for p in self.model.parameters() if p.requires_grad}
        if self.config.weights == "bf16":
            self.model.bfloat16()
        elif trained - {torch.float32, torch.float64}:  # small updates would be lost in the rounding of such weights
            named = ", ".join(sorted(str(kind) for kind in trained if kind not in (torch.float32, torch.float64)))
            self.watch.note(f"train: {named} weights are trained as float32")
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def go(self, out: Path) -> TrainResult:
        config, state = self.config, self.state
        torch.manual_seed(config.seed)
        self.model.train()
        with recomputed(self.model, config.checkpointing):
            self._begin()
            self.begun -= state.seconds  # earlier sittings count
            cpu = state.device.type == "cpu"
            with probe.threads(self.facts["threads"]) if cpu else nullcontext():
                with compiled(self.model, bool(self.facts.get("compile"))):
                    self._steps()
                if config.best and state.best.weights:
                    self._put(state.best.weights)
                else:
                    state.average.put()
                held_out = self._evaluate()
        self.model.eval()
        loss, metrics = last_tenth(state.log)
        spent = sum(row["train_seconds"] for row in state.log)
        return TrainResult(
            out=out,
            steps=state.step,
            loss=loss,
            bits_per_byte=state.log[-1]["bits_per_byte"],
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=state.tokens / max(spent, 1e-9),
            threads=self.facts["threads"],
            precision=self.updater.precision,
            log=state.log,
            metrics=metrics,
            held_out=held_out,
            best_step=state.best.step if config.best else None,
        )

    def _begin(self) -> None:
        """Goes on from a checkpoint, or measures how to compute; all processes with the weights of the first."""
        state, world = self.state, self.world
        newest = None
        description = json.loads(json.dumps(self.objective.describe()))
        if world.size > 1 and any(other != description for other in world.gather(description)):
            raise TrainingError("train: the processes of this run do not read the same data; give each the same files")
        if self.journal is not None:
            start = {"model": weights_digest(self.model), **describe(self.model)}
            wanted = {"config": self.config.decisive(), **start, **description}
            self.facts = self.journal.earlier(json.loads(json.dumps(wanted))) or {}
            newest = self.journal.newest() if self.facts else None
            for warning in self.journal.warnings:
                self.watch.note(f"train: {warning}")
        if world.from_lead(not self.facts):
            measured = self._measure()
            if self.journal is not None:
                self.facts = {"wanted": json.loads(json.dumps(wanted)), **measured}
                self.journal.begin(self.facts)
        self.facts = world.from_lead(self.facts)
        self.updater.precision = str(self.facts["precision"])
        state.optimizers.set_precision(self.updater.precision)
        if newest:
            restore(state, newest)
            self.watch.note(f"train: going on from {newest}")
        if world.size > 1:
            self._follow()

    def _follow(self) -> None:
        """Takes over the first process' weights, optimizer and place."""
        state, world = self.state, self.world
        world.spread(dict(self.model.state_dict()), state.device)
        held = world.spread(state.optimizers.tensors(), state.device)
        kept = world.spread(kept_by_objective(state), state.device)
        numbers = [state.step, state.cursor, state.seconds, state.tokens, asdict(state.schedule), state.log]
        state.step, state.cursor, state.seconds, state.tokens, shape, state.log = world.from_lead(numbers)
        if not world.leads:
            state.schedule = Schedule(**shape)
            state.optimizers.restore(held)
            if kept:
                self.objective.restore_tensors(kept)  # type: ignore[attr-defined]

    def _steps(self) -> None:
        state, config = self.state, self.config
        batches = self.objective.batches(state)
        saved = sampled = time.monotonic()
        while state.schedule.total is None or state.step < state.schedule.total:
            start = time.perf_counter()
            if not self._step(batches):  # asked to stop: the weights are those of the last whole step
                self._stop()
            state.seconds = time.monotonic() - self.begun
            self.window.seconds += time.perf_counter() - start
            self.window.steps += 1
            self._plan()
            self._hear()
            done = state.step == state.schedule.total
            if done or state.step % config.log_every == 0:
                self._log()
            if config.eval_every and state.step % config.eval_every == 0 and not done and self._judge():
                return
            if (self.updater.stop or getattr(self.objective, "halt", "")) and not done:
                self._stop()
            now = time.monotonic()
            due = state.step % config.save_every == 0 if config.save_every else now - saved > _SAVE_SECONDS
            if due and not done and self.journal is not None:
                if self.window.steps:
                    self._log()  # a checkpoint holds the whole curve so far
                self.journal.write(state, self.facts, self.objective.tokenizer, config.keep)
                saved = now
            if config.sample_every and now - sampled > config.sample_every and not done and self.world.leads:
                self._sample()
                sampled = now

    def _step(self, batches: Batches) -> bool:
        """One update; False where a stop was asked for before it was whole."""
        state = self.state
        if not self.world.leads:
            parallel.seed_step(state.seed, state.step, self.world.rank)
        scale = state.schedule.scale(state.step)
        sums = self.updater.update(batches, scale, self.journal.last_good() if self.journal else "")
        if sums is None:
            return False
        state.step, state.cursor = state.step + 1, sums.cursor
        state.average.update(state.step)
        self.window.add(sums.loss, sums.count, sums.norm, sums.metrics, sums.parts)
        self.window.scale = scale
        return True

    def _measure(self) -> dict[str, Any]:
        """Threads, precision and compiling: as configured, or as measured on the first micro-batch."""
        config, state = self.config, self.state
        batch, _ = next(self.objective.batches(state))

        def compute() -> Tensor:
            with torch.no_grad():
                prepared = self.objective.prepare(self.model, batch)
            return self.objective.loss(self.model, prepared)[0]

        with memory_told():
            require_room(state, self.objective, config, "float32" if config.precision == "float32" else "bf16")
            threads, precision = probe.fastest(self.model, compute, config.precision, config.threads)
            seconds = probe.timer(self.model, compute, threads, precision)
            parts = (state.schedule.total or 0) * config.accumulate
            budget = config.minutes * 60 if config.minutes else None
            wish = config.compile if getattr(self.objective, "compiles", True) else "off"
            on, why = pays(self.model, wish, seconds, parts, budget, state.device.type)
        if why:
            self.watch.note(f"train: compile is {'on' if on else 'off'}: {why}")
        state.optimizers.clear()
        return {"threads": threads, "precision": precision, "compile": on}

    def _schedule(self) -> Schedule:
        config = self.config
        if config.minutes is not None:
            return Schedule(config.warmup, 0, None, kind=config.schedule)
        steps = config.steps or max(1, math.ceil((config.epochs or 0) * self.objective.rows / config.batch))
        return Schedule(min(config.warmup, steps // 10), round(config.decay * steps), steps, kind=config.schedule)

    def _plan(self) -> None:
        """With a budget of time: fix the warm-up after three steps, and the length where the decay must begin.

        From then on the run is a run of so many steps, and goes on exactly as such. A shape that depends on the length
        from the start has it after three steps, so that its end is an estimate.
        """
        state, config = self.state, self.config
        if config.minutes is None or state.schedule.total is not None:
            return
        budget, pace = config.minutes * 60, self.window.pace
        if state.step == 3:
            state.schedule.warmup = min(config.warmup, int(budget / pace / 10))
        tail = config.decay if config.schedule == "wsd" else 0.0
        if state.seconds + pace > budget * (1 - tail) or (state.step >= 3 and state.schedule.needs_total):
            left = max(0, int((budget - state.seconds) / pace))
            state.schedule.decay, state.schedule.total = left, state.step + left
        if self.world.size > 1:
            state.schedule = Schedule(**self.world.from_lead(asdict(state.schedule)))

    def _log(self) -> None:
        state, window = self.state, self.window
        state.tokens += int(window.sums.get("tokens", 0))
        row = window.row(state, self.config)
        state.log.append(row)
        self.watch.row(row)
        self.window = Window(window.pace, window.means)

    def _hear(self) -> None:
        """Says what the objective has to say."""
        notes: list[str] = getattr(self.objective, "notes", [])
        for note in notes:
            self.watch.note(f"train: {note}")
        notes.clear()

    def _judge(self) -> bool:
        """One evaluation within the run; True where the watched figure has not improved for long enough."""
        state, config = self.state, self.config
        with state.average.in_place():
            figures = self._evaluate()
            if not figures:
                raise TrainingError("train: eval_every is set, but the objective has no held-out data; give it some")
            name = watched(figures, config.watch_metric)
            judge(state.best, state.step, name, figures[name], self.model, config.best and self.world.leads)
        if self.window.steps:
            self._log()
        state.log[-1]["held_out"] = figures
        said = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        self.watch.note(f"  step {state.step}: held-out {said}")
        if config.early_stop and state.best.stale >= config.early_stop:
            self.watch.note(f"train: {name} was best at step {state.best.step} ({state.best.value:.4g}); stopped early")
            return True
        return False

    def _evaluate(self) -> dict[str, float]:
        """The objective's held-out figures for the weights as they are, or none; the first process computes them."""
        evaluate = getattr(self.objective, "evaluate", None)
        figures: dict[str, float] = {}
        if evaluate is not None and self.world.leads:
            with self._aside(), torch.no_grad():
                figures = {name: float(value) for name, value in (evaluate(self.model) or {}).items()}
        return dict(self.world.from_lead(figures))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Something that must not change the run: no dropout, and random generators put back."""
        self.model.eval()
        with torch.random.fork_rng(devices=[self.state.device] if self.state.device.type == "cuda" else []):
            yield
        self.model.train()

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])

    def _sample(self) -> None:
        sample = getattr(self.objective, "sample", None)
        if sample is None:
            return
        with self._aside():
            text = sample(self.model)
        if text:
            self.watch.note(f"  step {self.state.step}: {' '.join(text.split())}")

    def _stop(self) -> None:
        state = self.state
        if self.window.steps:
            self._log()
        if self.journal is None:
            parallel.leave()
        place = self.journal.write(state, self.facts, self.objective.tokenizer, self.config.keep)
        of = f" of {state.schedule.total}" if state.schedule.total else ""
        raise TrainingError(
            f"train: stopped by {self.updater.stop or self.objective.halt} after step {state.step}{of}; "  # type: ignore[attr-defined]
            f"saved in {place}. Run the same command again to go on"
        )
