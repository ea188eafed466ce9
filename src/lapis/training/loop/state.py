"""What a run is at a step boundary, on disk and back: TrainState, its checkpoints, and the choice of one to go on from.

A checkpoint is a model folder that everything loads, with optimizer.safetensors, rng.safetensors, state.json and
log.jsonl beside it; no pickle. Checkpoints lie in `.OUT.lapis/.journal/step-N` until the run is done. Those of a state
that is shared out over processes are written and read by distributed/sharded_state.py.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lapis.checkpoint.commit import MANIFEST, commit, commit_file, verify
from lapis.checkpoint.files import read_json
from lapis.checkpoint.staging import JOURNAL, Staging, staging_of
from lapis.checkpoint.tensor_file import read_tensors, write_tensors
from lapis.errors import LapisError, OutputError, TrainingError
from lapis.model.transformer import Transformer
from lapis.training.distributed.sharding import Sharding
from lapis.training.loop.changes import SETTLED, completed, differences, refuse_newer
from lapis.training.loop.guards import StepGuard
from lapis.training.objectives.objective import Objective
from lapis.training.optim.optimizers import Average, Optimizers, Schedule
from lapis.training.result import Window, read_curve, write_curve
from lapis.training.setup import lora

STATE, _OPTIMIZER, _RNG, _LOG = "state.json", "optimizer.safetensors", "rng.safetensors", "log.jsonl"
_BEST, _AVERAGE, _OBJECTIVE, _WITHIN = (f"{name}.safetensors" for name in ("best", "average", "objective", "within"))
_FORMAT = 1  # of a checkpoint, in state.json; higher where an older lapis would read it wrongly
SHARDS = "shards"  # the folder of pieces, in a checkpoint that has them in place of whole tensors


class Saves(Protocol):
    """What a tokenizer does here: it writes its files into a folder."""

    def save(self, folder: Path) -> None: ...


@dataclass
class Best:
    """The best evaluation so far.

    Attributes:
        step: When it was.
        value: Of the watched metric.
        stale: Evaluations since.
        weights: What was trained, as it was then; empty where the run does not end with the best weights.
    """

    step: int | None = None
    value: float = 0.0
    stale: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float | int | None]:
        """All but the weights, as JSON."""
        return {"step": self.step, "value": self.value, "stale": self.stale}


@dataclass
class TrainState:
    """A run between two steps.

    Attributes:
        objective: What is learned; a checkpoint holds its `state_tensors`.
        rows: Rows of one micro-batch.
        parts: Micro-batches of one step, over all processes.
        seed: Of the data's order.
        average: Of the weights.
        guard: Of steps that are not finite, or that jump.
        step: Updates done.
        cursor: The objective's place in its data, as JSON.
        seconds: Time spent, over all restarts.
        tokens: Positions computed.
        log: The learning curve, one mapping per entry; `window` has the sums for the next.
        best: The best evaluation so far.
        within: The last evaluation within the limits.
        start: Held-out metrics before the first step, where there are limits.
        ended: Why the run ends otherwise than with its last step; "" while it does not.
        left: Whether it ends since a metric went beyond its limit.
        predicted: What the run will take, by its first steps (`TrainResult.predicted`).
        sharding: How weights and optimizer are shared out; None where every process holds all.
    """

    model: Transformer
    objective: Objective
    optimizers: Optimizers
    schedule: Schedule
    average: Average
    guard: StepGuard
    rows: int
    parts: int = 1
    seed: int = 0
    step: int = 0
    cursor: dict[str, Any] | None = None
    seconds: float = 0.0
    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    window: Window = field(default_factory=Window)
    best: Best = field(default_factory=Best)
    within: Best = field(default_factory=Best)
    start: dict[str, float] = field(default_factory=dict)
    ended: str = ""
    left: bool = False
    predicted: dict[str, float] = field(default_factory=dict)
    sharding: Sharding | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, what has no gradient can be computed: on whole weights, where replies grow token by token."""
        alone = self.sharding is not None and not self.objective.compiles
        return self.sharding.gathered() if self.sharding is not None and alone else nullcontext()

    def settle(self) -> None:
        """After passes without gradients."""
        if self.sharding is not None:
            self.sharding.settle()

    def evaluations(self) -> dict[str, Any]:
        """What evaluations have shown, without weights, as JSON."""
        numbers = {"best": self.best.numbers(), "within": self.within.numbers()}
        return {**numbers, "start": self.start, "ended": self.ended, "left": self.left}

    def take_evaluations(self, numbers: Mapping[str, Any]) -> None:
        """The reverse of `evaluations`."""
        self.best, self.within = Best(**numbers["best"]), Best(**numbers["within"])
        self.start, self.ended, self.left = dict(numbers["start"]), numbers["ended"], numbers["left"]


def save(state: TrainState, folder: Path, facts: Mapping[str, Any], tokenizer: Saves | None) -> None:
    """Write a checkpoint, whole or not at all. facts: what a rerun must agree with (see `CheckpointJournal`)."""
    with commit(folder, kind="checkpoint", overwrite=True) as staging:
        lora.save(state.model, staging.path)
        write_tensors(staging.path / _OPTIMIZER, state.optimizers.tensors())
        if state.average.tensors:
            write_tensors(staging.path / _AVERAGE, state.average.tensors)
        for name, best in ((_BEST, state.best), (_WITHIN, state.within)):
            if best.weights:
                write_tensors(staging.path / name, best.weights)
        write_numbers(state, staging.path, facts, tokenizer)


def write_numbers(state: TrainState, folder: Path, facts: Mapping[str, Any], tokenizer: Saves | None) -> None:
    """What a checkpoint holds beside weights and optimizer."""
    if tokenizer is not None:
        tokenizer.save(folder)
    write_tensors(folder / _RNG, rng_state(state.device))
    write_curve(folder / _LOG, state.log)
    if tensors := state.objective.state_tensors():
        write_tensors(folder / _OBJECTIVE, tensors)
    numbers = {"format": _FORMAT, "step": state.step, "cursor": state.cursor, "seconds": state.seconds,
               "tokens": state.tokens, "predicted": state.predicted, "guard": state.guard.to_json(),
               "window": state.window.to_json(), **state.evaluations()}  # fmt: skip
    text = json.dumps({**numbers, "schedule": asdict(state.schedule), "facts": facts}, indent=1, ensure_ascii=False)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def restore(state: TrainState, folder: Path) -> None:
    """Put a verified checkpoint's numbers into `state`, its model and torch's random generators."""
    lora.restore(state.model, folder)
    state.optimizers.restore(read_tensors(folder / _OPTIMIZER))
    if state.average.tensors:
        state.average.restore(read_tensors(folder / _AVERAGE))
    restore_numbers(state, folder)
    for name, best in ((_BEST, state.best), (_WITHIN, state.within)):
        if (folder / name).exists():
            best.weights = read_tensors(folder / name)


def plain_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint but for the weights, as `kind/name`; for a state that is shared out."""
    kinds = {"optimizer": _OPTIMIZER, "average": _AVERAGE, "best": _BEST, "within": _WITHIN}
    places = {kind: folder / name for kind, name in kinds.items() if (folder / name).exists()}
    return {f"{kind}/{name}": t for kind, place in places.items() for name, t in read_tensors(place).items()}


def restore_numbers(state: TrainState, folder: Path) -> None:
    """The reverse of `write_numbers`."""
    set_rng_state(read_tensors(folder / _RNG), state.device)
    numbers = read_json(folder / STATE)
    weights = state.best.weights, state.within.weights
    state.step, state.cursor = numbers["step"], numbers["cursor"]
    state.seconds, state.tokens, state.predicted = numbers["seconds"], numbers["tokens"], numbers.get("predicted", {})
    state.window.restore(numbers.get("window", {}))
    state.guard.restore(numbers.get("guard", {}))
    state.schedule = Schedule(**numbers["schedule"])
    state.log = read_curve(folder / _LOG)
    if (folder / _OBJECTIVE).exists():
        state.objective.restore_tensors(read_tensors(folder / _OBJECTIVE))
    state.take_evaluations(numbers)
    state.best.weights, state.within.weights = weights


class CheckpointJournal:
    """The checkpoints of one unfinished run, and `run.json`: what the run was started with and has chosen.

    Args:
        folder: Where they lie.
        allowed: Settings in which a rerun may differ.

    Attributes:
        warnings: Lines for a reader.
    """

    def __init__(self, folder: Path, allowed: Collection[str] = ()) -> None:
        self.folder, self.allowed = folder, allowed
        self.warnings: list[str] = []
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.lapis"):  # a save that was killed
            shutil.rmtree(leftover)

    @property
    def checkpoints(self) -> list[Path]:
        """step-N folders, the newest first."""
        return _checkpoints(self.folder)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Record what the run is, before its first step."""
        with commit_file(self.folder / "run.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def earlier(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """What an interrupted run recorded, or None where there is nothing to go on from.

        Raises TrainingError with the differences where `request` is another run than the one that was interrupted, but
        for what is allowed; `begin` records it.
        """
        path = self.folder / "run.json"
        if not path.exists() and not self.checkpoints:
            return None
        facts = self._recorded(path)
        facts |= {"wanted": completed(facts.get("wanted", {}), request, self.warnings)}
        changes = differences(facts["wanted"], request)
        if not changes or not self.checkpoints:
            return None if changes else facts
        if refused := [change for change in changes if change.name not in self.allowed]:
            names = sorted({change.name for change in refused})
            options = "" if {*SETTLED} & {*names} else "".join(f" --allow-change {name}" for name in names)
            raise TrainingError(
                f"train: the run that was interrupted at {self.checkpoints[0]} differs: "
                f"{'; '.join(change.line for change in refused)}. Undo the change to go on with it, "
                f"{f'allow it with{options}, ' if options else ''}or start anew with --fresh"
            )
        after = int(self.checkpoints[0].name.removeprefix("step-"))
        noted = [{"after_step": after, "what": change.line} for change in changes]
        self.warnings += [f"{entry['what']}, which was allowed, from step {after + 1} on" for entry in noted]
        return facts | {"wanted": dict(request), "changes": [*facts.get("changes", ()), *noted]}

    def _recorded(self, path: Path) -> dict[str, Any]:
        """What run.json holds, or, where that is lost or damaged, the newest checkpoint; nothing without one."""
        for place in (path, *(checkpoint / STATE for checkpoint in self.checkpoints)):
            with suppress(LapisError, KeyError, TypeError):
                facts: dict[str, Any] = read_json(place) if place == path else read_json(place)["facts"]
                if {"threads", "precision"} <= {*facts} and isinstance(facts["wanted"], dict):
                    break
        else:
            if self.checkpoints:
                raise TrainingError(f"train: {path} is lost or damaged, as is each checkpoint; start anew with --fresh")
            return {}
        if place != path:
            self.warnings.append(f"{path} is lost or damaged; {place} says what the run was begun with")
            self.begin(facts)
        return facts

    def newest(self, check: Callable[[Path], list[str]] = verify) -> Path | None:
        """The newest checkpoint that is whole. A damaged one is passed over, with a line in `warnings`, and put aside.

        Args:
            check: Names the files of a checkpoint that are damaged.

        Raises:
            TrainingError: Where a checkpoint lacks a file (a lost optimizer or rng must not start anew in silence), a
                newer lapis wrote it, or none is whole.
        """
        passed_over: dict[str, str] = {}
        for path in self.checkpoints:
            try:
                listed = set(read_json(path / MANIFEST)["files"])
                cut = any(name.startswith(f"{SHARDS}/") for name in listed)
                missing = {STATE, _RNG, _LOG, *([] if cut else [_OPTIMIZER]), *listed} - {
                    name for name in listed if (path / name).exists()
                }
                if missing:
                    raise TrainingError(
                        f"train: {path} lacks {', '.join(sorted(missing))}; going on without would change the result. "
                        "Put it back, delete this checkpoint to use the one before, or start anew with --fresh"
                    )
                damaged = check(path)
            except (LapisError, ValueError, KeyError, TypeError, OSError) as error:
                if isinstance(error, TrainingError):
                    raise
                damaged = [MANIFEST]
            if not damaged:
                refuse_newer(path, STATE, _FORMAT)
                for name in passed_over:
                    shutil.rmtree(self.folder / f"damaged-{name}", ignore_errors=True)
                    (self.folder / name).rename(self.folder / f"damaged-{name}")  # the newest is the last good one
                return path
            passed_over[path.name] = ", ".join(damaged)
            self.warnings.append(f"{path} is damaged ({', '.join(damaged)}); falling back to the checkpoint before it")
        if passed_over:
            which = "; ".join(f"{name}: {files}" for name, files in passed_over.items())
            raise TrainingError(
                f"train: no checkpoint in {self.folder} is whole ({which} damaged); start anew with --fresh"
            )
        return None

    def write(self, state: TrainState, facts: Mapping[str, Any], tokenizer: Saves | None, keep: int) -> Path:
        """Save the state as step-N, then delete all but the newest `keep`."""
        folder = self.place(state.step)
        try:
            save(state, folder, facts, tokenizer)
        except OutputError as error:
            raise OutputError(f"{error}; {self.last_good()}") from None
        self.prune(keep)
        return folder

    def place(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step}"

    def prune(self, keep: int) -> None:
        """Deletes all checkpoints but the newest `keep`, and what was put aside."""
        for old in [*self.checkpoints[keep:], *self.folder.glob("damaged-*")]:
            shutil.rmtree(old)
        shutil.rmtree(self.folder.with_name(f"{JOURNAL}-before"), ignore_errors=True)  # a fresh start has taken over

    def last_good(self) -> str:
        """Half a sentence that names the newest checkpoint."""
        checkpoints = self.checkpoints
        return f"the last good checkpoint is {checkpoints[0]}" if checkpoints else "no checkpoint was saved yet"


def _checkpoints(folder: Path) -> list[Path]:
    """step-N folders, the newest first."""
    folders = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def newest_of(out: Path) -> Path | None:
    """The newest checkpoint of the unfinished run that is to become `out`."""
    return next(iter(_checkpoints(staging_of(out.absolute()) / JOURNAL)), None)


@contextmanager
def clean_journal(staging: Staging, fresh: bool, allowed: Collection[str] = ()) -> Iterator[CheckpointJournal]:
    """The run's journal; a refusal before the first checkpoint leaves nothing behind. allowed: settings that may be
    others now."""
    folder, before = staging.root / JOURNAL, staging.root / f"{JOURNAL}-before"
    if before.exists() and not CheckpointJournal(folder).checkpoints:  # a fresh start that never came to a checkpoint
        shutil.rmtree(folder)
        before.rename(folder)
    for entry in staging.path.iterdir():  # the rest of an output that was not finished
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if fresh and folder.exists():
        folder.rename(before)
    journal = CheckpointJournal(folder, allowed)
    try:
        yield journal
    except BaseException:
        if not journal.checkpoints:
            shutil.rmtree(folder)
            if before.exists():  # a fresh start that was refused takes nothing away
                before.rename(folder)
        raise


def weights_digest(model: Transformer) -> str:
    """sha256 of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random generators, uint8, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """The reverse of `rng_state`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
