"""The one training loop. It never looks into a batch: what is learned is up to the objective.

    result = train(model, Causal(tokenizer, ["corpus.jsonl"], context=256), TrainConfig(minutes=3), "runs/base")

A run can be killed at any moment; the same call goes on from its newest whole checkpoint and gives the same bytes.
Under torchrun every process runs this loop, the first one writes, and the weights are those of one process
(distributed/parallel.py), which they may share out (distributed/sharding.py). The update itself is in update.py.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from lapis.checkpoint.commit import commit
from lapis.errors import TrainingError
from lapis.model.threads import threads
from lapis.model.transformer import Transformer
from lapis.training.certificate.certificate import Circumstances, write_certificate
from lapis.training.certificate.checks import SHARED, Check, run_checks, why_unchecked
from lapis.training.config import TrainConfig
from lapis.training.distributed import parallel
from lapis.training.distributed.resume import earlier_run, go_on, shared_out
from lapis.training.distributed.sharded_state import ShardedSaves
from lapis.training.forecast.memory import peak
from lapis.training.forecast.pauses import SAVE_SECONDS, Pauses
from lapis.training.loop.changes import rescheduled
from lapis.training.loop.estimate import PREDICTED_AFTER, predict, show_estimate
from lapis.training.loop.guards import StepGuard
from lapis.training.loop.held_out import Evaluator, overfitting
from lapis.training.loop.progress import Silent, Watch, live, show_share, watcher
from lapis.training.loop.state import STATE, CheckpointJournal, TrainState, clean_journal, newest_of
from lapis.training.loop.stop_request import StopRequest, StopSignal, stop_requests
from lapis.training.loop.tracking import TrackedWatch, check_installed
from lapis.training.loop.update import Batches, Updater
from lapis.training.objectives.objective import Objective
from lapis.training.optim.footprint import checkpoint_bytes, written_bytes
from lapis.training.optim.optimizers import FITTED_AFTER, Average, Optimizers, Schedule
from lapis.training.optim.rates import peak_rates
from lapis.training.result import TrainResult, Window, write_result
from lapis.training.setup.blocks import check_compiles, compiled, recomputed, set_dtype, stoppable
from lapis.training.setup.probe import measure_speed, settled, threads_of_begin

T = TypeVar("T")


def train(
    model: Transformer, objective: Objective, config: TrainConfig, out: Path | str, *,
    overwrite: bool = False, fresh: bool = False, allow_change: Collection[str] = (), watch: Watch | None = None,
    device: torch.device | None = None, origin: Mapping[str, Any] | None = None,
) -> TrainResult:  # fmt: skip
    """Train `model` in place and put the result at `out` as a model folder, with log.jsonl, training.json, times.json.

    Args:
        model: Trained in place.
        objective: What is learned, from which data.
        config: How.
        out: The folder of the result.
        overwrite: Replace a folder at `out`.
        fresh: Forget an interrupted run.
        allow_change: Settings ("lr", "data") in which this run may differ from the one that it goes on with.
        watch: What shows progress; by default a bar on a terminal, lines elsewhere.
        device: Where the pieces go of a model that is shared out over processes; by default where the model is.
        origin: Where the model comes from and which parts are to be trained, as the certificate says it.

    Returns:
        The figures of the run.

    Raises:
        TrainingError: For a loss that is not finite, nothing supervised, a step that does not fit into memory, another
            run's checkpoints, or a stop by Ctrl-C or SIGTERM (after saving).
        OutputError: Where `out` cannot be written.
    """
    out = Path(out)
    world, last_good = parallel.join(), partial(newest_of, out)
    if not world.leads:
        with parallel.errors_end_all(last_good), stop_requests(immediate=False) as request:
            run = TrainingRun(model, objective, config, world, None, Silent(), request, device)
            result = run.go(out)
            run.write(None, result)
            world.gather(None)  # until the first process has written
            return result
    check_installed(config.track)
    watch = TrackedWatch(watch or watcher(out.name))
    needed = checkpoint_bytes(model, config) * config.keep + 4 * written_bytes(model)
    try:
        with (
            parallel.errors_end_all(last_good),
            commit(out, kind="training", overwrite=overwrite, resumable=True, needs_bytes=needed) as staging,
            clean_journal(staging, fresh, allow_change) as journal,
            stop_requests(immediate=world.size == 1) as request,
        ):
            watch.keep_file(journal.folder)
            try:
                run = TrainingRun(model, objective, config, world, journal, watch, request, device)
                with request.at_once():  # a server may take its time
                    watch.open_trackers(config, out, journal.folder, run.newest)
                result = run.go(out)
            except StopSignal:
                raise TrainingError(
                    f"train: stopped by {request.signal} before a step was done; {journal.last_good()}. Run the same "
                    "command again"
                ) from None
            run.write(staging.path, result, origin)
        try:
            world.gather(None)
        except TrainingError:  # the result is there all the same
            watch.note(f"train: {out} is complete; another process of this run had ended before it could be told")
    finally:
        watch.close()
    return result


class TrainingRun:
    """One run from its start, or from a checkpoint, to its end. journal: where it can go on from; None without one."""

    def __init__(
        self, model: Transformer, objective: Objective, config: TrainConfig, world: parallel.Processes,
        journal: CheckpointJournal | None, watch: Watch, request: StopRequest, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.config, self.world = model, objective, config, world
        self.journal, self.watch = journal, watch
        self.started = time.monotonic()
        if changed := set_dtype(model, config.weights):
            watch.note(changed)
        parts = config.accumulate * world.size
        world.together(lambda: parallel.check_shares(config.batch, config.accumulate, world.size))
        world.together(lambda: check_compiles(model, objective, config.compile))
        self.request = request
        objective.heard = show_share(self.watch, "starting")
        with request.at_once(), threads_of_begin(model, objective, config):
            objective.begin(model, journal.folder if journal else None)
            self.identity, self.facts, self.newest = earlier_run(model, objective, config, world, journal, watch)
        self.device = device or next(model.parameters()).device
        sharding = shared_out(model, objective, config, world, self.facts, self.newest, self.device)
        if sharding is not None:
            self.watch.note(f"train: weights, gradients and optimizer are shared out over {world.size} processes")
            if config.certify == "on":
                remedy = "give shard=none where they fit"
                self.watch.note(f"train: certify is on, and nothing is checked: {SHARED}; {remedy}")
        elif config.shard in ("full", "hybrid"):
            self.watch.note(
                f"train: shard is {config.shard}, and one process holds everything; start more of them with torchrun "
                "--nproc-per-node N -m lapis train"
            )
        self.saves = ShardedSaves(world) if sharding is not None else None
        optimizers = Optimizers(
            model, config.optimizer, config.lr, config.weight_decay, config.seed, objective.extra_module,
            peak_rates(model, config.rates, config.lr), config.muon,
        )  # fmt: skip
        average = Average(model, config.ema if world.leads or sharding is not None else 0.0)
        self.state = TrainState(
            model, objective, optimizers, Schedule.of(config, objective.rows), average, StepGuard(config.guards),
            rows=config.batch // parts, parts=parts, seed=config.seed, sharding=sharding,
            window=Window(means=objective.means),
        )  # fmt: skip
        if not self.state.optimizers.parameters:
            raise TrainingError("train: every weight is frozen; leave some to train")
        self.updater = Updater(self.state, objective, config, world, request)
        self.updater.watch = live(watch)
        self.evaluator = Evaluator(self.state, config, world, watch, request)
        self.checks: list[Check] = []
        self.saving = 0.0  # seconds of the last checkpoint for which the steps waited
        self.took = deque[float](maxlen=PREDICTED_AFTER - 1)  # seconds of the last steps

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What holds while steps are computed."""
        config, state = self.config, self.state
        torch.manual_seed(config.seed)
        self.model.train()
        with recomputed(self.model, config.checkpointing), stoppable(self.model):
            with self.request.at_once():
                self._begin()
            self.started = time.monotonic() - state.seconds  # measuring is no part of a budget; an earlier run is
            cpu = state.device.type == "cpu"
            with threads(self.facts["threads"]) if cpu else nullcontext():
                self.evaluator.begin()
                try:
                    yield
                finally:  # whatever ends the run, a checkpoint that was begun is not lost
                    if self.saves is not None:
                        self.saves.wait()

    def go(self, out: Path) -> TrainResult:
        """All steps, and the held-out metrics of the result."""
        config, state = self.config, self.state
        with self.computing():
            with compiled(self.model, bool(self.facts.get("compile"))):
                self._steps()
            if self.saves is not None:
                self.saves.finish()
            elif self.journal and not why_unchecked(state, config, self.world.size):
                live(self.watch).stage("checking what ought not to matter")
                self.checks = run_checks(state, config, self.updater.precision, self.journal.folder)
            held_out = self._unless_stopped(self.evaluator.result)
        seconds = state.seconds + (self.evaluator.seconds if held_out else 0.0)
        self.model.eval()
        log = state.log
        if held_out and not config.best and not state.ended:  # so that both curves reach the end
            live(self.watch).evaluated(state.step, held_out)
            if config.eval_every:
                log = [*log[:-1], {**log[-1], "held_out": held_out}]
        best = state.within.step if state.left else state.best.step if config.best else None
        return TrainResult.of(
            log, out=out, steps=state.step, tokens=state.tokens, seconds=seconds, held_out=held_out,
            best_step=best, start=state.start, ended=state.ended or None, overfitting=overfitting(log),
            predicted=state.predicted, memory_bytes=peak(state.device), skipped=state.guard.skipped,
            changes=self.facts.get("changes", []), threads=self.facts["threads"], precision=self.updater.precision,
        )  # fmt: skip

    def write(self, folder: Path | None, result: TrainResult, origin: Mapping[str, Any] | None = None) -> None:
        """The result, into a folder that the caller commits. folder: None in processes that only give their pieces."""
        live(self.watch).stage("writing the result")
        sharding = self.state.sharding

        def act() -> None:
            with self.state.gathered(), self.request.at_once():
                if folder is not None:
                    self.objective.write(folder)
            whole = nullcontext() if sharding is None else sharding.whole_weights(folder is not None)
            with whole, self.request.at_once():
                if folder is not None:
                    run = self.model, self.objective, self.config, folder, result
                    write_result(*run)
                    start, size = self.facts["wanted"]["model"], self.world.size
                    why = why_unchecked(self.state, self.config, size)
                    write_certificate(*run, Circumstances(start, origin or {}, self.device, size, why), self.checks)

        self._unless_stopped(act)

    def _unless_stopped(self, act: Callable[[], T]) -> T:
        """`act()`; a stop on the way saves what the last whole step has left, and ends the run."""
        try:
            return act()
        except StopSignal:
            self.evaluator.put_back()
            self._save_and_stop()

    def _begin(self) -> None:
        """Goes on from a checkpoint, or measures how to compute; all processes with the weights of the first."""
        state, world = self.state, self.world
        if world.from_lead(not self.facts):
            if state.sharding is None:
                self.facts = measure_speed(state, self.config, self.watch)
            else:
                self.facts = settled(self.config, state.device)
            self.facts["dither"] = self.updater.needs_dither()
            if self.journal is not None:
                self.facts = {"wanted": self.identity, **self.facts}
                self.journal.begin(self.facts)
        self.facts = world.from_lead(self.facts)
        self.updater.begin(self.facts)
        anew = self.newest is not None and rescheduled(self.newest / STATE, self.identity)
        go_on(state, world, self.newest, state.schedule if anew else None)
        if self.newest is not None:
            self.watch.note(f"train: going on from {self.newest}")

    def _steps(self) -> None:
        state, config = self.state, self.config
        batches = self.objective.batches(state)
        saved = sampled = time.monotonic()
        if state.ended:
            return
        if self.evaluator.is_due and self._evaluate():
            return  # stopped while it evaluated
        show_estimate(state, self.facts, config.batch // self.world.size, self.watch)
        while state.schedule.total is None or state.step < state.schedule.total:
            start = time.perf_counter()
            self._unless_stopped(partial(self.step, batches))
            state.seconds = time.monotonic() - self.started
            self.took.append(time.perf_counter() - start)
            self.state.window.seconds += self.took[-1]
            self.state.window.steps += 1
            self._fit_budget()
            if state.step == PREDICTED_AFTER:
                self._predict()
            self._show_notes()
            done = state.step == state.schedule.total
            live(self.watch).step({**self._row(), "evaluated": self.evaluator.latest})
            if done or state.step % config.log_every == 0:
                self._log()
            if not done and self.evaluator.is_due and self._evaluate():
                return
            if (self.updater.stop or self.objective.halt) and not done:
                self._save_and_stop()
            now = time.monotonic()
            due = state.step % config.save_every == 0 if config.save_every else now - saved > SAVE_SECONDS
            if self.saves is not None and not config.save_every:
                due = self.world.from_lead(due)
            if due and not done and (self.journal is not None or self.saves is not None):
                self._save()
                saved = now
            sample = self.world.leads and self.saves is None  # the others would have to generate as well
            if sample and config.sample_every and now - sampled > config.sample_every and not done:
                self._unless_stopped(self.evaluator.sample)
                sampled = now

    def step(self, batches: Batches) -> None:
        """One update. Raises StopSignal where a stop was requested before it was whole; then it is as if not begun."""
        state = self.state
        if not self.world.leads:
            parallel.seed_step(state.seed, state.step, self.world.rank)
        scale = state.schedule.scale(state.step)
        sums = self.updater.update(batches, scale, self._last_good)
        if sums is None:
            raise StopSignal
        state.step, state.cursor = state.step + 1, sums.cursor
        state.average.update(state.step)
        self.state.window.add(sums.loss, sums.count, sums.norm, sums.metrics, sums.parts)
        self.state.window.scale = scale

    def _last_good(self) -> str:
        if self.saves is not None:
            self.saves.wait()
        return self.journal.last_good() if self.journal else ""

    def _fit_budget(self) -> None:
        state, config = self.state, self.config
        if config.minutes is None or state.schedule.total is not None:
            return
        if config.eval_every and state.step == FITTED_AFTER:
            self._measure_evaluation()
        state.schedule.fit_budget(config, state.step, state.seconds, state.window.pace + self._pauses.share(config))
        if self.world.size > 1:
            state.schedule = Schedule(**self.world.from_lead(asdict(state.schedule)))

    @property
    def _pauses(self) -> Pauses:
        return Pauses(self.evaluator.seconds, self.saving)

    def _measure_evaluation(self) -> None:
        self._unless_stopped(self.evaluator.measure)
        self.state.seconds = time.monotonic() - self.started

    def _predict(self) -> None:
        self._measure_evaluation()
        place = self.journal.folder if self.journal is not None and self.saves is None else None
        predict(self.state, self.config, statistics.median(self.took), self._pauses, place)

    def _log(self) -> None:
        state, window = self.state, self.state.window
        state.tokens += int(window.sums.get("tokens", 0))
        row = self._row()
        state.log.append(row)
        self.watch.row(row)
        state.window = Window(window.pace, window.means)

    def _row(self) -> dict[str, Any]:
        """The entry of the curve as it is now."""
        state = self.state
        row = self.state.window.row(
            self.config, step=state.step, total=state.schedule.total, tokens=state.tokens, seconds=state.seconds
        )
        more = self._pauses.to_come(self.config, state.step, state.schedule.total, state.window.pace)
        return {**row, "seconds_left": row["seconds_left"] + more}

    def _show_notes(self) -> None:
        for note in self.objective.notes:
            self.watch.note(f"train: {note}")
        self.objective.notes.clear()

    def _evaluate(self) -> bool:
        """One evaluation within the run; True where the run should stop early."""
        metrics, stop = self._unless_stopped(self.evaluator.step)
        if self.state.window.steps:
            self._log()
        self.state.log[-1]["held_out"] = metrics
        return stop

    def _save(self) -> Path:
        state, tokenizer, keep = self.state, self.objective.tokenizer, self.config.keep
        if self.saves is not None:
            return self.saves.begin(state, self.journal, self.facts, tokenizer, keep)
        assert self.journal is not None
        started = time.monotonic()
        folder = self.journal.write(state, self.facts, tokenizer, keep)
        self.saving = time.monotonic() - started
        return folder

    def _save_and_stop(self) -> NoReturn:
        state = self.state
        place = self._save() if self.saves is not None or self.journal is not None else None
        if self.saves is not None:
            self.saves.finish()
        if self.journal is None:
            parallel.leave()
        of = f" of {state.schedule.total}" if state.schedule.total else ""
        raise TrainingError(
            f"train: stopped by {self.updater.stop or self.objective.halt} after step {state.step}{of}; "
            f"saved in {place}. Run the same command again to go on"
        )
