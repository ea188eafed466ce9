"""A model, or an adapter on its base, in; a checkpoint whose tensors are those of the two fused out.

Nothing is written: each tile is computed when it is read, as `lapis fuse` computes it and on the same grid, so that
whatever is made of base + adapter has the very numbers of what is made of the fused model.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.checkpoint.adapter import WEIGHTS
from lapis.checkpoint.commit import sha256_of
from lapis.checkpoint.files import contained
from lapis.checkpoint.store import Adapter
from lapis.checkpoint.tensor_file import Header, TensorInfo, dtype_name
from lapis.errors import CheckpointError
from lapis.weights.engine.outputs import Output
from lapis.weights.engine.sources import as_bytes
from lapis.weights.engine.tiles import Reader, spans
from lapis.weights.fuse.layout import FuseLayout, refuse_quantized

_AT_ONCE = 8  # models

Model = str | os.PathLike[str] | Checkpoint
"""A folder, a model of the hub, an adapter, `MODEL+ADAPTER`, or one of them that was opened."""


def open_model(model: Model) -> Checkpoint:
    """A checkpoint to read tensors from; an adapter is fused with its base as they are read.

    Raises:
        CheckpointError: For what `open_checkpoint` refuses, and for an adapter that does not fit its base.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, adapters=True)
    return checkpoint if checkpoint.adapter is None else _fused(checkpoint, checkpoint.adapter)


def open_each(models: Mapping[str, Model]) -> tuple[dict[str, Checkpoint], dict[str, CheckpointError]]:
    """Opens models by name, several at a time, for each takes a few round trips where it lies on a server.

    Returns:
        Those that could be opened, and why others could not; both in the order of `models`.
    """

    def attempt(model: Model) -> Checkpoint | CheckpointError:
        try:
            return open_model(model)
        except CheckpointError as error:
            return error

    apart = len({str(model) for model in models.values()}) == len(models)  # one is not fetched by two at a time
    with ThreadPoolExecutor(_AT_ONCE if apart else 1) as pool:
        seen = dict(zip(models, pool.map(attempt, models.values()), strict=True))
    opened = {name: each for name, each in seen.items() if isinstance(each, Checkpoint)}
    return opened, {name: each for name, each in seen.items() if isinstance(each, CheckpointError)}


def _fused(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    base = replace(checkpoint, adapter=None, front=None)
    refuse_quantized(base, adapter)
    layout = FuseLayout(adapter, base)
    outputs = layout.outputs()
    files: dict[str, dict[str, TensorInfo]] = {}
    last = next(iter(base.headers))
    for output in outputs:
        stored = layout.names.get(output.name, output.name)
        last = next((file for file, header in base.headers.items() if stored in header.tensors), last)
        tensors = files.setdefault(last, {})
        start = max((info.end for info in tensors.values()), default=0)
        plain = output.kernel is None and output.patch is None and output.sources[0].role == "base"
        place = base.info(stored).file if plain else adapter.root / WEIGHTS
        tensors[output.name] = TensorInfo(place, dtype_name(output.dtype), output.shape, start, start + output.nbytes)
    computed = FusedTensors(outputs, [adapter.config, sha256_of(contained(adapter.root, WEIGHTS)), base.digest()])
    fused = _computed(base, files, computed, adapter.root)
    return replace(fused, config=layout.config, notes=[*base.notes, *layout.notes])


def computed_checkpoint(
    base: Checkpoint, files: Mapping[str, Sequence[Output]], front: Path, identity: Any = None
) -> Checkpoint:
    """A model whose tensors are outputs of the engine, computed as they are read.

    Args:
        base: Whose config the model has.
        files: The outputs by file.
        front: A folder whose files stand before the base's.
        identity: What they are made of besides their names, as JSON.
    """
    place = next(iter(base.index.values())).file
    listed: dict[str, dict[str, TensorInfo]] = {}
    for file, outputs in files.items():
        at, tensors = 0, listed.setdefault(file, {})
        for output in outputs:
            tensors[output.name] = TensorInfo(place, dtype_name(output.dtype), output.shape, at, at + output.nbytes)
            at += output.nbytes
    every = [output for outputs in files.values() for output in outputs]
    return _computed(base, listed, FusedTensors(every, [[o.name for o in every], identity]), front)


def _computed(
    base: Checkpoint, files: Mapping[str, dict[str, TensorInfo]], computed: "FusedTensors", front: Path
) -> Checkpoint:  # fmt: skip
    headers = {}
    for file, tensors in files.items():
        raw = json.dumps([[name, info.dtype, info.shape] for name, info in tensors.items()]).encode()
        headers[file] = Header(tensors, {"format": "pt"}, 0, raw)
    index = {name: info for tensors in files.values() for name, info in tensors.items()}
    return replace(base, index=index, headers=headers, computed=computed, front=front)


class FusedTensors:
    """Outputs of a fuse, computed as they are read (checkpoint/store.py: Computed).

    Args:
        outputs: The tensors.
        identity: What they are made of, as JSON.
    """

    def __init__(self, outputs: Sequence[Output], identity: Any) -> None:
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self._outputs = {output.name: output for output in outputs}
        self._states: dict[str, Any] = {}
        self._wholes: dict[str, memoryview] = {}
        self._lock = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._own = threading.local()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        output = self._outputs[name]
        if output.kernel is None and output.patch is None:
            item = output.dtype.itemsize
            output.sources[0].read(offset // item, (offset + len(buffer)) // item, buffer)
            return
        done = 0
        while done < len(buffer):
            first, raw = self._tile(output, (offset + done) // output.dtype.itemsize)
            skip = offset + done - first * output.dtype.itemsize
            size = min(len(raw) - skip, len(buffer) - done)
            buffer[done : done + size] = raw[skip : skip + size]
            done += size

    def _tile(self, output: Output, element: int) -> tuple[int, memoryview]:
        """Where the tile with an element begins, and its bytes; a thread keeps its last one."""
        last = getattr(self._own, "last", None)
        if last is not None and last[0] == output.name and last[1] <= element < last[2]:
            return last[1], last[3]
        kernel = output.kernel
        every = spans(output.shape, rows=bool(kernel and kernel.rows), whole=bool(kernel and kernel.whole))
        first, end = every[element // (every[0][1] - every[0][0])]
        if kernel is not None and kernel.whole:
            with self._lock_of(output.name):  # the first thread to come here computes it for all
                raw = self._wholes.get(output.name)
                if raw is None:
                    raw = self._wholes[output.name] = self._compute(output, first, end, every)
                    self._forget(self._wholes)
        else:
            raw = self._compute(output, first, end, every)
        self._own.last = output.name, first, end, raw
        return first, raw

    def _compute(self, output: Output, first: int, end: int, every: list[tuple[int, int]]) -> memoryview:
        reader, kernel = self._own.__dict__.setdefault("reader", Reader()), output.kernel
        if kernel is None:
            values = torch.empty(end - first, dtype=output.dtype)
            output.sources[0].read(first, end, as_bytes(values))
        else:
            state = self._state(output, reader, every)
            tile = reader.read(output.name, output.sources, first, end, output.shape)
            values = kernel.apply(tile, state)[0].to(output.dtype, copy=True)
        if output.patch is not None:
            output.patch(first, end, values)
        return as_bytes(values.contiguous())

    def _lock_of(self, name: str) -> threading.RLock:
        with self._lock:
            return self._locks.setdefault(name, threading.RLock())

    def _forget(self, results: dict[str, Any]) -> None:
        """Tensors are read one after the other: what is behind is not needed again."""
        with self._lock:
            while len(results) > 2:
                del results[next(iter(results))]

    def _state(self, output: Output, reader: Reader, every: list[tuple[int, int]]) -> Any:
        """What the kernel's passes give, once for each tensor."""
        kernel = output.kernel
        if kernel is None or not kernel.passes:
            return None
        with self._lock_of(output.name):
            state = self._states.get(output.name)
            if state is None:
                for number, sweep in enumerate(kernel.passes):
                    partials = [
                        sweep(reader.read(output.name, output.sources, *span, output.shape), state) for span in every
                    ]
                    state = kernel.fold(number, partials, state) if kernel.fold else state
                self._states[output.name] = state
                self._forget(self._states)
            return state
