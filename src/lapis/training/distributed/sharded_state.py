"""Checkpoints of a run whose state is shared out: each process writes its pieces, while the next steps are computed.

torch.distributed.checkpoint writes them, as safetensors under `shards/` beside state.json, rng and curve, and cuts them
anew for another number of processes, or joins them for one. A checkpoint holds what is trained, and not what is frozen.
Leaves out: disks that not all machines see.
"""

import json
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lapis.checkpoint.commit import commit
from lapis.errors import LapisError, OutputError, TrainingError
from lapis.training.distributed.forward import waiting
from lapis.training.distributed.parallel import Processes
from lapis.training.distributed.pieces import is_piece, own, piece_like
from lapis.training.loop.changes import refuse_newer
from lapis.training.loop.state import SHARDS, CheckpointJournal, Saves, TrainState, plain_tensors, write_numbers

_FACTS, _FORMAT = "shards.json", 1


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint holds pieces. Raises TrainingError where a newer lapis wrote it."""
    if not (folder / SHARDS).is_dir():
        return False
    refuse_newer(folder, _FACTS, _FORMAT)
    return True


class ShardedSaves:
    """Writes checkpoints in a thread beside the training, one at a time: a save that comes before the one before it is
    written waits for that, so that which checkpoints there are does not depend on the disk."""

    def __init__(self, world: Processes) -> None:
        self.world = world
        self._group = dist.new_group(backend="gloo")  # its messages come between those of the training
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last_good = ""

    def begin(
        self, state: TrainState, journal: CheckpointJournal | None, facts: Mapping[str, Any], tokenizer: Saves | None,
        keep: int,
    ) -> Path:  # fmt: skip
        """Copies the state, and has it written as step-N; all but the newest `keep` are deleted then.

        Args:
            state: Between two steps; every process calls this at the same one.
            journal: Of the first process.
            facts: What a rerun must agree with.
            tokenizer: Written with it.
            keep: Checkpoints that stay.

        Returns:
            Where it will be, in the first process.

        Raises:
            OutputError: Where it, or the one before it, could not be written.
        """
        self.finish()
        opened, folder = ExitStack(), Path() if journal is None else journal.place(state.step)

        def open_folder() -> str:
            if journal is None:
                return ""
            self._last_good = journal.last_good()
            try:
                staging = opened.enter_context(commit(folder, kind="checkpoint", overwrite=True))
                write_numbers(state, staging.path, facts, tokenizer)
                (staging.path / SHARDS).mkdir()
                (staging.path / _FACTS).write_text(json.dumps({"format": _FORMAT, "processes": self.world.size}) + "\n")
            except OutputError as error:
                raise OutputError(f"{error}; {self._last_good}") from None
            return str(staging.path / SHARDS)

        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        path = self.world.from_lead(self.world.together(open_folder))
        writer = HuggingFaceStorageWriter(path, save_distributed=True)
        written: Any = async_save(_tensors(state), storage_writer=writer, process_group=self._group)
        self._thread = threading.Thread(target=self._commit, args=(written, opened, journal, keep))
        self._thread.start()
        return folder

    def _commit(self, written: Future[Any], opened: ExitStack, journal: CheckpointJournal | None, keep: int) -> None:
        try:
            with opened:
                written.result()  # in the first process after all others are done
            if journal is not None:
                journal.prune(keep)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Waits for what is being written, so that it counts as the last checkpoint, too; asks no other process."""
        if self._thread is not None:
            with waiting():
                self._thread.join()

    def finish(self) -> None:
        """Waits for what is being written. Raises OutputError in one process where it failed in any."""
        if self._thread is None:
            return
        self.wait()
        error, self._thread, self._error = self._error, None, None
        shown = None
        if error is not None:
            why = error if isinstance(error, LapisError) else _first_reason(error)
            shown = OutputError(f"train: a checkpoint could not be written ({why}); {self._last_good}")
        self.world.raise_once(self.world.gather(error is not None), shown)


def _first_reason(error: BaseException) -> str:
    """What happened in the process where it happened."""
    failures = getattr(error, "failures", None) or {}
    first = next(iter(failures.values()), (error,))[0]
    return f"{type(first).__name__}: {first}".splitlines()[0][:200]


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """What is written in pieces, as `kind/name`; numbers as vectors of one."""
    kinds: dict[str, Mapping[str, Tensor]] = {
        "model": {name: p for name, p in state.model.named_parameters() if p.requires_grad},
        "optimizer": state.optimizers.tensors(),
        "average": state.average.tensors,
        "best": state.best.weights,
        "within": state.within.weights,
    }
    named = {f"{kind}/{name}": t.detach() for kind, tensors in kinds.items() for name, t in tensors.items()}
    return {name: tensor if tensor.dim() else tensor.reshape(1) for name, tensor in named.items()}


def read_shards(state: TrainState, folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, as `kind/name`: pieces as this process holds them, or whole ones.

    Raises TrainingError where this process does not see the folder.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    place = folder / SHARDS
    if not place.is_dir():
        raise TrainingError(f"train: {place} is not here; checkpoints must lie on a disk that all machines share")
    parameters, tensors = _parameters(state), dict[str, Tensor]()
    metadata: Any = HuggingFaceStorageReader(str(place)).read_metadata()
    for name, entry in metadata.state_dict_metadata.items():
        like, kind = parameters.get(_parameter(name)), entry.properties.dtype
        if like is not None and is_piece(like) and like.shape == entry.size:
            tensors[name] = torch.empty_like(like, dtype=kind)
        else:
            tensors[name] = torch.empty(entry.size, dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each process reads on its own, on purpose
        load(tensors, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=True)
    return tensors


def cut_checkpoint(state: TrainState, world: Processes, folder: Path | None) -> dict[str, Tensor]:
    """The same from a checkpoint of whole tensors, without the weights; every process calls this.

    folder: In the first process.
    """
    known = {} if folder is None else plain_tensors(folder)
    parameters, tensors = _parameters(state), dict[str, Tensor]()
    for name in world.from_lead(list(known)):
        given = {name: known.pop(name).to(state.device)} if known else {}
        tensor = world.spread(given, state.device)[name]
        like = parameters.get(_parameter(name))
        tensors[name] = tensor if like is None or like.shape != tensor.shape else piece_like(tensor, like)
    return tensors


@torch.no_grad()
def put_tensors(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Puts what `read_shards` gives into the state."""
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}, "best": {}, "within": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        kinds[kind][rest] = tensor.reshape(()) if kind == "optimizer" and rest.endswith("/step") else tensor
    for name, tensor in kinds["model"].items():
        own(state.model.get_parameter(name)).copy_(own(tensor))
    state.optimizers.restore(kinds["optimizer"])
    if state.average.tensors:
        state.average.restore(kinds["average"])
    state.best.weights, state.within.weights = kinds["best"], kinds["within"]


def _parameter(name: str) -> str:
    """The parameter that a tensor belongs to."""
    kind, _, rest = name.partition("/")
    return rest.rpartition("/")[0] if kind == "optimizer" else rest


def _parameters(state: TrainState) -> dict[str, Tensor]:
    return {name: parameter for parameter, name in state.optimizers.names.items()}
