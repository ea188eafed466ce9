"""The one training loop. It never looks inside a batch: what is learned is the objective's business.

    result = train(model, Causal(tokenizer, ["corpus.jsonl"], context=256), TrainConfig(minutes=3), "runs/base")

A run can be killed at any moment; the same call goes on from its newest whole checkpoint and gives the same bytes.
Leaves out: more than one process.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapis.checkpoint.commit import JOURNAL, Staging, commit
from lapis.errors import TrainingError
from lapis.model.transformer import Transformer
from lapis.train import probe
from lapis.train.config import TrainConfig
from lapis.train.curve import Window
from lapis.train.held_out import judge, watched
from lapis.train.interrupt import Wish, interruptible
from lapis.train.objectives import Objective
from lapis.train.optim import Optimizers, Schedule
from lapis.train.result import TrainResult, last_tenth, write_result
from lapis.train.state import Journal, TrainState, restore
from lapis.train.watch import Watch, watcher

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
    Raises TrainingError for a loss that is not finite, nothing supervised, another run's checkpoints, or a stop by
    Ctrl-C or SIGTERM (after saving); OutputError where `out` cannot be written.
    """
    out = Path(out)
    watch = watch or watcher(out.name)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        with (
            commit(out, overwrite=overwrite, resumable=True, needs_bytes=(3 * config.keep + 4) * weights) as staging,
            _left_clean(staging, fresh) as journal,
            interruptible() as wish,
        ):
            result = _Run(model, objective, config, journal, watch, wish).go(out)
            write_result(model, objective, config, staging.path, result)
    finally:
        watch.close()
    return result


class _Run:
    def __init__(
        self, model: Transformer, objective: Objective, config: TrainConfig, journal: Journal, watch: Watch, wish: Wish
    ) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.journal, self.watch, self.wish = journal, watch, wish
        self.begun = time.monotonic()
        kinds = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if kinds:  # small updates would be lost in the rounding of such weights
            watch.note(f"train: {', '.join(sorted(map(str, kinds)))} weights are trained as float32")
            model.float()
        wanted = {"config": config.decisive(), "model": _digest(model), **objective.describe()}
        self.wanted: dict[str, Any] = json.loads(json.dumps(wanted))
        self.state = TrainState(
            model,
            Optimizers(model, config.optimizer, config.lr, config.weight_decay),
            self._schedule(),
            rows=config.batch // config.accumulate,
            seed=config.seed,
        )
        if not self.state.optimizers.parameters:
            raise TrainingError("train: every weight is frozen; leave some to train")
        self.window = Window(means=getattr(objective, "means", frozenset()))

    def go(self, out: Path) -> TrainResult:
        config, state = self.config, self.state
        torch.manual_seed(config.seed)
        self.model.train()
        facts = self.journal.earlier(self.wanted)
        newest = self.journal.newest() if facts else None
        for warning in self.journal.warnings:
            self.watch.note(f"train: {warning}")
        begin = getattr(self.objective, "begin", None)
        if begin is not None:  # also where the run goes on: these are the weights that it started from
            begin(self.model, self.journal.folder)
        if facts is None:
            count, precision = self._measure()
            facts = {"wanted": self.wanted, "threads": count, "precision": precision}
            self.journal.begin(facts)
        self.facts, self.precision = facts, str(facts["precision"])
        if newest:
            restore(state, newest)
            self.watch.note(f"train: going on from {newest}")
        self.begun -= state.seconds  # earlier sittings count
        cpu = state.device.type == "cpu"
        with probe.threads(facts["threads"]) if cpu else nullcontext():
            self._steps()
            if config.best and state.best.weights:
                self._put(state.best.weights)
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
            threads=facts["threads"],
            precision=self.precision,
            log=state.log,
            metrics=metrics,
            held_out=held_out,
            best_step=state.best.step if config.best else None,
        )

    def _steps(self) -> None:
        state, config = self.state, self.config
        batches = self.objective.batches(state)
        saved = sampled = time.monotonic()
        while state.schedule.total is None or state.step < state.schedule.total:
            start = time.perf_counter()
            cursor = self._step(batches)
            if cursor is None:  # asked to stop: the weights are those of the last whole step
                self._stop()
            state.step, state.cursor = state.step + 1, cursor
            state.seconds = time.monotonic() - self.begun
            self.window.seconds += time.perf_counter() - start
            self.window.steps += 1
            self._plan()
            done = state.step == state.schedule.total
            if done or state.step % config.log_every == 0:
                self._log()
            if config.eval_every and state.step % config.eval_every == 0 and not done and self._judge():
                return
            if self.wish.stop and not done:
                self._stop()
            now = time.monotonic()
            due = state.step % config.save_every == 0 if config.save_every else now - saved > _SAVE_SECONDS
            if due and not done:
                if self.window.steps:
                    self._log()  # a checkpoint holds the whole curve so far
                self.journal.write(state, self.facts, self.objective.tokenizer, config.keep)
                saved = now
            if config.sample_every and now - sampled > config.sample_every and not done:
                self._sample()
                sampled = now

    def _step(self, batches: Iterator[tuple[Any, dict[str, Any]]]) -> dict[str, Any] | None:
        """One update; the cursor behind its data, or None where a stop was asked for before it was whole."""
        state, config = self.state, self.config
        total, count, cursor = 0.0, 0, None
        sums: dict[str, float] = {}
        parts = 0
        for _ in range(config.accumulate):
            if self.wish.stop:
                state.optimizers.clear()
                return None
            batch, cursor = next(batches)
            with _memory_told():
                loss, supervised = self._loss(batch, self.precision, sums)
                if supervised:
                    parts += 1
                    total, count = total + loss.item(), count + supervised
                    self._require_finite(total, "loss")
                    loss.backward()  # type: ignore[no-untyped-call]
        if count == 0:
            raise TrainingError(
                f"train: no token of step {state.step + 1} is supervised; look at the rows with: lapis data show"
            )
        gradients = [p.grad for p in state.optimizers.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() / count
        self._require_finite(norm, "norm of the gradient")
        clipped = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
        torch._foreach_mul_(gradients, clipped / count)  # the one division, over all micro-batches
        self.window.scale = state.schedule.scale(state.step)
        state.optimizers.step(self.window.scale)
        state.optimizers.clear()
        self.window.add(total, count, norm, sums, parts)
        return cursor

    def _loss(self, batch: Any, precision: str, sums: dict[str, float]) -> tuple[Tensor, int]:
        with probe.autocast(self.state.device, precision):
            with torch.no_grad():
                batch = self.objective.prepare(self.model, batch)
            loss, count, metrics = self.objective.loss(self.model, batch)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        return loss, count

    def _measure(self) -> tuple[int, str]:
        """Threads and precision: as configured, or as measured on the first micro-batch."""
        batch, _ = next(self.objective.batches(self.state))

        def compute() -> Tensor:
            with torch.no_grad():
                prepared = self.objective.prepare(self.model, batch)
            return self.objective.loss(self.model, prepared)[0]

        with _memory_told():
            return probe.fastest(self.model, compute, self.config.precision, self.config.threads)

    def _schedule(self) -> Schedule:
        config = self.config
        if config.minutes is not None:
            return Schedule(config.warmup, 0, None)
        steps = config.steps or max(1, math.ceil((config.epochs or 0) * self.objective.rows / config.batch))
        return Schedule(min(config.warmup, steps // 10), round(config.decay * steps), steps)

    def _plan(self) -> None:
        """With a budget of time: fix the warm-up after three steps, and the length where the decay must begin.

        From then on the run is a run of so many steps, and goes on exactly as such.
        """
        state, config = self.state, self.config
        if config.minutes is None or state.schedule.total is not None:
            return
        budget, pace = config.minutes * 60, self.window.pace
        if state.step == 3:
            state.schedule.warmup = min(config.warmup, int(budget / pace / 10))
        if state.seconds + pace > budget * (1 - config.decay):
            left = max(0, int((budget - state.seconds) / pace))
            state.schedule.decay, state.schedule.total = left, state.step + left

    def _log(self) -> None:
        state, window = self.state, self.window
        state.tokens += int(window.sums.get("tokens", 0))
        row = window.row(state, self.config)
        state.log.append(row)
        self.watch.row(row)
        self.window = Window(window.pace, window.means)

    def _judge(self) -> bool:
        """One evaluation within the run; True where the watched figure has not improved for long enough."""
        state, config = self.state, self.config
        figures = self._evaluate()
        if not figures:
            raise TrainingError("train: eval_every is set, but the objective has no held-out data; give it some")
        name = watched(figures, config.watch_metric)
        judge(state.best, state.step, name, figures[name], self.model, config.best)
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
        """The objective's held-out figures for the weights as they are, or none."""
        evaluate = getattr(self.objective, "evaluate", None)
        if evaluate is None:
            return {}
        with self._aside(), torch.no_grad():
            return {name: float(value) for name, value in (evaluate(self.model) or {}).items()}

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
        place = self.journal.write(state, self.facts, self.objective.tokenizer, self.config.keep)
        of = f" of {state.schedule.total}" if state.schedule.total else ""
        raise TrainingError(
            f"train: stopped by {self.wish.stop} after step {state.step}{of}; saved in {place}. "
            "Run the same command again to go on"
        )

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"train: the {what} is {value} at step {self.state.step + 1}; {self.journal.last_good()}. "
                f"Lower lr (now {self.config.lr:g}) or look at the data"
            )


@contextmanager
def _left_clean(staging: Staging, fresh: bool) -> Iterator[Journal]:
    """The run's journal; a refusal before the first checkpoint leaves nothing behind."""
    folder = staging.path / JOURNAL
    for entry in staging.path.iterdir():
        if entry != folder or fresh:  # the rest of an output that was not finished
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    journal = Journal(folder)
    try:
        yield journal
    except BaseException:
        if not journal.checkpoints:
            shutil.rmtree(staging.path, ignore_errors=True)
        raise


@contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise TrainingError(
                "train: out of memory; raise accumulate (the result is the same), or lower batch or the context"
            ) from None
        raise


def _digest(model: Transformer) -> str:
    """sha256 of the weights to start from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
