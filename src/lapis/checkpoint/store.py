"""A model folder as named tensors. Opening reads headers only; a tensor is read into memory of its own when asked for.

Nothing is mapped into memory, so a file that shrinks while it is read is an error and not a crash. Leaves out: what
the names mean to a model (families/, model/load.py) and how anything is written (commit.py).
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapis.checkpoint.files import contained, read_json
from lapis.checkpoint.tensor_file import SHARD_NAME, Header, TensorInfo, holds_adapter, read_header, torch_dtype
from lapis.checkpoint.towers import Towers, find_towers, language_config
from lapis.errors import CheckpointError
from lapis.families import find
from lapis.families.base import Family, Part, fallback_part

if TYPE_CHECKING:
    import torch

    from lapis.checkpoint.adapter import Adapter
    from lapis.checkpoint.hub import Snapshot

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass
class Checkpoint:
    """A folder that was opened and checked; made by `open_checkpoint`.

    source: what the user typed. root: the folder. config: config.json as it stands (families/ reads what it allows).
    index: name on disk -> TensorInfo. notes: what a reader should be told once (files ignored, tensors not indexed).
    adapter: what goes on top of the weights, where an adapter was opened; its files stand before the model's.
    snapshot: where a model of the hub was opened; weights that are not in the cache are then read by ranges.
    """

    source: str
    root: Path
    config: dict[str, Any]
    family: Family | None
    index: dict[str, TensorInfo]
    headers: dict[str, Header]
    notes: list[str] = field(default_factory=list)
    _stats: dict[Path, tuple[int, int, int]] = field(default_factory=dict, repr=False)
    adapter: "Adapter | None" = None
    snapshot: "Snapshot | None" = None

    @property
    def names(self) -> list[str]:
        return list(self.index)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.index.values())

    @cached_property
    def towers(self) -> Towers:
        """Which tensors are the language model's, and which belong to another tower of a multimodal folder."""
        return find_towers(self.index)

    @cached_property
    def _language(self) -> Family | None:
        """The family of the language model; of a multimodal folder that of its nested config."""
        return self.family or find(language_config(self.config))

    def part(self, name: str) -> Part:
        """Where a tensor belongs; for an unknown family, or a name its table lacks, read from the name itself.

        Layers are the language model's. What belongs to another tower lies outside of them.
        """
        if tower := self.towers.others.get(name):
            part = fallback_part(name)
            return part if part.layer is None else Part(None, f"{tower}.{part.component}", part.kind)
        inner = name if self.family else self.towers.inner(name) or name
        return (self._language.part(inner) if self._language else None) or fallback_part(name)

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor, in its own dtype and memory."""
        info = self.info(name)
        return self.read_range(name, 0, info.elements).view(info.shape)

    def read_rows(self, name: str, first: int, last: int) -> "torch.Tensor":
        """Rows [first, last) of a tensor of two or more dimensions."""
        shape = self.info(name).shape
        if len(shape) < 2 or not 0 <= first <= last <= shape[0]:
            raise CheckpointError(f"{self.source}: {name} is {list(shape)}; it has no rows {first} to {last}")
        row = self.info(name).elements // max(shape[0], 1)
        return self.read_range(name, first * row, last * row).view(last - first, *shape[1:])

    def read_range(self, name: str, first: int, last: int) -> "torch.Tensor":
        """Elements [first, last) of the flattened tensor, shape [last - first]. Thread-safe."""
        import torch

        info = self.info(name)
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.source}: {name} is {info.dtype}, which cannot be computed with here")
        result = torch.empty(last - first, dtype=dtype)
        self.read_into(name, first * dtype.itemsize, result.view(torch.uint8).numpy().data)
        return result

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` (bytes) from `offset` bytes into the tensor. Raises if the file changed since opening."""
        info = self.info(name)
        if offset + len(buffer) > info.nbytes:
            raise CheckpointError(f"{self.source}: {name} has {info.nbytes:,} bytes, not {offset + len(buffer):,}")
        if self.snapshot is not None and info.file not in self._stats:
            self.snapshot.remote(info.file.name).read_into(info.start + offset, buffer)
            return
        handle = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(buffer):
                got = os.preadv(handle, [buffer[done:]], info.start + offset + done)
                if got == 0:
                    break
                done += got
            if done < len(buffer) or _stamp(os.fstat(handle)) != self._stats[info.file]:
                raise CheckpointError(f"{info.file}: changed while it was being read; run again when it is at rest")
        finally:
            os.close(handle)

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Asks the system to have `size` bytes from `offset` bytes into the tensor at hand soon; returns at once."""
        info = self.info(name)
        size = min(size, info.nbytes - offset)
        if size > 0 and self.snapshot is not None and info.file not in self._stats:
            self.snapshot.remote(info.file.name).prefetch(info.start + offset, size)
        elif size > 0 and hasattr(os, "posix_fadvise"):
            handle = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(handle, info.start + offset, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def info(self, name: str) -> TensorInfo:
        try:
            return self.index[name]
        except KeyError:
            raise CheckpointError(f"{self.source}: has no tensor {name}") from None

    def file(self, name: str) -> Path | None:
        """A file beside the weights (tokenizer.json, ...), or None where there is none. Contained like all others."""
        if self.adapter is not None and os.path.lexists(self.adapter.root / name):
            return contained(self.adapter.root, name)
        if self.snapshot is not None and name in self.snapshot.sizes:
            return self.snapshot.fetch(name)
        return contained(self.root, name) if os.path.lexists(self.root / name) else None

    def beside(self) -> Path:
        """The folder, with all that lies beside the weights in it; of a model of the hub it is fetched first."""
        if self.snapshot is not None:
            self.snapshot.fetch_beside()
        return self.root

    def fetched(self) -> "Checkpoint":
        """The same with all weights at hand: those of a model of the hub are downloaded into its cache."""
        if self.snapshot is None or all(info.file in self._stats for info in self.index.values()):
            return self
        self.snapshot.fetch_weights(list(self.headers))
        stats = {info.file: _stamp(info.file.stat()) for info in self.index.values()}
        return replace(self, _stats=stats)

    def json(self, name: str) -> Any:
        """A JSON file beside the weights, or None where there is none."""
        path = self.file(name)
        return None if path is None else read_json(path)

    def digest(self) -> str:
        """sha256 over the names and headers of all weight files: which tensors, where; not their values."""
        total = hashlib.sha256()
        for name, header in sorted(self.headers.items()):
            total.update(f"{name}\0{header.size}\0".encode() + header.raw)
        return total.hexdigest()


def open_checkpoint(source: str | os.PathLike[str], *, adapters: bool = False) -> Checkpoint:
    """Opens a model folder, or a model of the hub: config and headers are read and checked, no weight is.

    source: a folder, or `owner/name` or `owner/name@revision` where no such folder is here (hub.py).

    adapters: a folder that holds an adapter opens the model that it belongs to, with `adapter` set; otherwise it is
    refused. Raises CheckpointError for every damage that headers, index and config can show, before anything is
    allocated.
    """
    root, snapshot = Path(source), None
    if not root.is_dir():
        from lapis.checkpoint.hub import find_model

        snapshot = find_model(source, INDEX)
        root = snapshot.root
    listed = [name for name in snapshot.sizes if "/" not in name] if snapshot else []
    present = sorted({*listed, *os.listdir(root)})
    if holds_adapter(present):
        from lapis.checkpoint.adapter import base_of, open_adapter

        if not adapters:
            raise CheckpointError(f"{source}: holds an adapter; make it a model with: lapis fuse {source} --out DIR")
        adapter = open_adapter(root)
        return replace(base_of(adapter), source=str(source), adapter=adapter)
    config_path = contained(root, "config.json")
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_path}: holds a {type(config).__name__}, not an object")
    notes: list[str] = []

    def header_of(name: str) -> Header:
        if snapshot is not None and not snapshot.here(name) and name in snapshot.sizes:
            return snapshot.header(name)
        return read_header(contained(root, name))

    headers = {name: header_of(name) for name in _weight_files(root, present, header_of, notes)}
    index: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in index:
                raise CheckpointError(f"{root}: {name} stands in both {index[name].file.name} and {file}")
            index[name] = info
    _check_against_index(root, headers, notes)
    stats = {info.file: _stamp(info.file.stat()) for info in index.values() if os.path.lexists(info.file)}
    if len(stats) < len({info.file for info in index.values()}):
        notes.append("weights are read from the hub in ranges, which no checksum covers; loading covers them")
    return Checkpoint(str(source), root, config, find(config), index, headers, notes, stats, snapshot=snapshot)


def _weight_files(
    root: Path, present: list[str], header_of: Callable[[str], Header], notes: list[str]
) -> list[str]:  # fmt: skip
    """Names of the safetensors files that make up the model; says what lies beside them and is not read."""
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and "train" not in name]
    if INDEX in present:
        files = sorted(set(_weight_map(root).values()))
        missing = [name for name in files if name not in present and not os.path.lexists(root / name)]
        if missing:
            raise CheckpointError(
                f"{root}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}"
            )
        if SINGLE in present and SINGLE not in files:
            _refuse_ambiguous(root, files, header_of)
            notes.append(f"{SINGLE} stands beside {INDEX} and lists the same tensors; the index was followed")
    elif SINGLE in present:
        files = [SINGLE]
    else:
        files = [name for name in present if SHARD_NAME.fullmatch(name)]
        if files and len(files) != int(SHARD_NAME.fullmatch(files[0])[2]):  # type: ignore[index]
            raise CheckpointError(f"{root}: {len(files)} shards, but {files[0]} says otherwise; fetch the others")
    if not files:
        if pickles:
            raise CheckpointError(
                f"{root}: {pickles[0]} is a pickle, which can run code and is never read; convert it to safetensors"
            )
        raise CheckpointError(f"{root}: there is no {SINGLE} and no {INDEX}")
    aside = [n for n in present if n.endswith(".safetensors") and n not in files and n != SINGLE]
    for names, why in ((pickles, "pickles are never read"), (aside, "not part of the index")):
        if names:
            notes.append(f"ignored {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: {why}")
    return files


def _weight_map(root: Path) -> dict[str, str]:
    path = contained(root, INDEX)
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{path}: weight_map must map each tensor to a file")
    return names


def _check_against_index(root: Path, headers: dict[str, Header], notes: list[str]) -> None:
    if not os.path.lexists(root / INDEX):
        return
    names = _weight_map(root)
    lacking = [n for n, file in names.items() if n not in headers[file].tensors]
    if lacking:
        file = names[lacking[0]]
        raise CheckpointError(
            f"{root}: {INDEX} puts {lacking[0]} in {file}, which lacks it ({len(lacking)} such in all)"
        )
    extra = [n for header in headers.values() for n in header.tensors if n not in names]
    if extra:
        notes.append(f"{len(extra)} tensors are in the shards but not in {INDEX}: {', '.join(extra[:3])}")


def _refuse_ambiguous(root: Path, shards: list[str], header_of: Callable[[str], Header]) -> None:
    def table(names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        headers = [header_of(name) for name in names]
        return {n: (info.dtype, info.shape) for header in headers for n, info in header.tensors.items()}

    if table([SINGLE]) != table(shards):
        raise CheckpointError(f"{root}: {SINGLE} and {INDEX} are both there and differ; remove the one that is stale")


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
