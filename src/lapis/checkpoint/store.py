"""A model folder as named tensors, and the adapter on top of it. A tensor is read into memory of its own when needed.

Nothing is mapped into memory, so a file that shrinks while it is read is an error and not a crash. Leaves out: how a
folder is opened and checked (opening.py, adapter.py), what the names mean to a model (families/, model/load.py) and how
anything is written (commit.py).

Shapes: R rank, I inputs, O outputs.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lapis.checkpoint.files import contained, read_at, read_json, stamp
from lapis.checkpoint.tensor_file import Header, TensorInfo, finite, torch_dtype
from lapis.checkpoint.towers import Towers, find_towers, language_config, language_levels
from lapis.errors import CheckpointError
from lapis.families import find
from lapis.families.base import Family, Part, fallback_part
from lapis.families.fields import TOKENS
from lapis.parsing import ParseError, parse_json

if TYPE_CHECKING:
    import torch

    from lapis.checkpoint.remote.model import RemoteModel
    from lapis.checkpoint.remote.ranges import RemoteFile

# init_lora_weights that take the first adapter out of the base, by a rule that can be repeated
CHANGED_BASE = ("pissa", "olora")
_COMPARED = 1 << 24  # bytes at a time


class Computed(Protocol):
    """Where the tensors of a checkpoint come from that lie in no file as they are. digest: of what they are made of."""

    digest: str

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """As `Checkpoint.read_into`."""
        ...


@dataclass
class Checkpoint:
    """A folder that was opened and checked; made by `open_checkpoint`.

    source: what the user typed. root: the folder. config: config.json as it stands (families/ reads what it allows).
    index: name on disk -> TensorInfo. notes: what a reader should know (files ignored, tensors not indexed).
    adapter: what goes on top of the weights, where an adapter was opened; its files stand before the model's.
    snapshot: where a model on a server was opened; weights that are not here are then read by ranges.
    computed: what gives the tensors, where they are made as they are read (an adapter on its base).
    front: a folder whose files stand before the model's.
    """

    source: str
    root: Path
    config: dict[str, Any]
    family: Family | None
    index: dict[str, TensorInfo]
    headers: dict[str, Header]
    notes: list[str] = field(default_factory=list)
    _stats: dict[Path, tuple[int, ...]] = field(default_factory=dict, repr=False)
    adapter: "Adapter | None" = None
    snapshot: "RemoteModel | None" = None
    computed: Computed | None = None
    front: Path | None = None

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

    @cached_property
    def runs(self) -> Family | None:
        """The family that lapis runs the language model as, of a multimodal folder, too; None where it runs none."""
        nested = self._language
        whole = self.config.get("model_type")
        return self.family or (nested if nested is not None and whole in nested.wrappers else None)

    @property
    def text_config(self) -> dict[str, Any]:
        """The fields of config.json that the language model is run by."""
        if self.family is not None or self.runs is None:
            return self.config
        (inner, *_), outer = language_levels(dict(self.config)), self.config
        shared = {name: outer[name] for name in (*TOKENS, "tie_word_embeddings") if name in outer}
        return {**inner, **shared}

    def text_name(self, name: str) -> str | None:
        """A tensor's name within the language model that is run; None for another tower's."""
        return name if self.family is not None else self.towers.inner(name)

    def part(self, name: str) -> Part:
        """Where a tensor belongs; for an unknown family, or a name its table lacks, read from the name itself.

        Layers are the language model's. What belongs to another tower lies outside of them.
        """
        if tower := self.towers.others.get(name):
            part = fallback_part(name)  # its embedding is no table of tokens either
            return Part(None, f"{tower}.{part.component}", part.kind)
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
        if self.computed is not None:
            self.computed.read_into(name, offset, buffer)
            return
        if (remote := self.remote(name)) is not None:
            remote.read_into(info.start + offset, buffer)
            return
        if not read_at(info.file, info.start + offset, buffer, self._stats[info.file]):
            raise CheckpointError(f"{info.file}: changed while it was being read; run again when it is at rest")

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape, dtype and bytes. Memory does not grow with their size."""
        one, other = self.info(first), self.info(second)
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        for start in range(0, one.nbytes, _COMPARED):
            buffers = [bytearray(min(_COMPARED, one.nbytes - start)) for _ in range(2)]
            for name, buffer in zip((first, second), buffers, strict=True):
                self.read_into(name, start, memoryview(buffer))
            if buffers[0] != buffers[1]:
                return False
        return True

    def prefetch(self, name: str, offset: int, size: int) -> None:
        """Asks the system to have `size` bytes from `offset` bytes into the tensor at hand soon; returns at once."""
        info = self.info(name)
        size = min(size, info.nbytes - offset) if self.computed is None else 0
        if size > 0 and (remote := self.remote(name)) is not None:
            remote.prefetch(info.start + offset, size)
        elif size > 0 and hasattr(os, "posix_fadvise"):
            handle = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(handle, info.start + offset, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def remote(self, name: str) -> "RemoteFile | None":
        """The file on a server that a tensor is read from in ranges; None where it lies here, or is computed."""
        if self.snapshot is None or self.computed is not None:
            return None
        file = self.info(name).file
        return None if file in self._stats else self.snapshot.remote(file.name)

    @property
    def by_ranges(self) -> bool:
        """Whether any tensor comes from a server."""
        return self.snapshot is not None and any(info.file not in self._stats for info in self.index.values())

    def info(self, name: str) -> TensorInfo:
        try:
            return self.index[name]
        except KeyError:
            raise CheckpointError(f"{self.source}: has no tensor {name}") from None

    def file(self, name: str) -> Path | None:
        """A file beside the weights (tokenizer.json, ...), or None where there is none. Contained like all others."""
        if self.front is not None and os.path.lexists(self.front / name):
            return contained(self.front, name)
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
        if (
            self.snapshot is None
            or self.computed is not None
            or all(info.file in self._stats for info in self.index.values())
        ):
            return self
        self.snapshot.fetch_weights(list(self.headers))
        stats = {info.file: stamp(info.file.stat()) for info in self.index.values()}
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
        if self.computed is not None:
            total.update(self.computed.digest.encode())
        return total.hexdigest()


@dataclass
class Adapter:
    """A checked adapter.

    Attributes:
        root: The folder.
        base: The model that it belongs to, as adapter_config.json names it.
        config: adapter_config.json.
        weights: Its tensors, to read from.
        pairs: Module on disk ("model.layers.0.self_attn.q_proj") -> kind ("A", "B", "magnitude") -> name in the file.
        rows: Module -> (ids, name) of trained rows of tokens.
        whole: Tensor on disk -> name, of what was saved in full.
        bases: Module -> name of the base's own weight, where the folder holds a copy of it.
        alphas, ranks: lora_alpha and r of each module.
        stacked: The keys of `pairs` that are no modules, but tensors with the matrices of all experts.
    """

    root: Path
    base: str
    config: dict[str, Any]
    weights: Checkpoint
    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)

    def read(self, name: str) -> "torch.Tensor":
        """One of its tensors. Raises CheckpointError for NaN and Inf."""
        tensor = self.weights.read(name)
        if tensor.is_floating_point() and not finite(tensor):
            raise CheckpointError(f"{self.root}: {name} holds NaN or Inf; the adapter is damaged, fetch it again")
        return tensor

    def tensor(self, module: str) -> str:
        """The tensor on disk that an adapter of `pairs` adds to."""
        return module if module in self.stacked else f"{module}.weight"

    def scale(self, module: str) -> float:
        """The factor on B A."""
        rank = self.ranks[module]
        return self.alphas[module] / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def class_names(self, count: int) -> list[str]:
        """The names of a classifier's `count` classes, by number; empty where the folder has none.

        adapter_config.json has no place for them, so they lie in the metadata of the weights.
        """
        (header,) = self.weights.headers.values()
        try:
            names = parse_json(header.metadata.get("id2label", "null"))
        except ParseError:
            return []
        if not isinstance(names, dict) or set(names) != set(map(str, range(count))):
            return []
        ordered = [names[str(number)] for number in range(count)]
        return ordered if all(isinstance(name, str) for name in ordered) else []

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    @property
    def ties(self) -> bool:
        """Whether what is done to a tied embedding is done to the head, too."""
        return bool(self.config.get("ensure_weight_tying"))

    def stacks(self, module: str) -> tuple["torch.Tensor", "torch.Tensor"]:
        """A [X, R, I] and B [X, O, R] of all experts, float32; in the file the columns of B lie rank by rank."""
        a, b_O = (self.read(self.pairs[module][kind]).float() for kind in "AB")
        rank = self.ranks[module]
        return a.view(-1, rank, a.shape[1]), b_O.view(len(b_O), rank, -1).permute(2, 0, 1).contiguous()

    def low_rank(self, module: str, weight_OI: Callable[[], "torch.Tensor"]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """A [R, I] and B [O, R], float32, so that scale * B A is what the adapter adds to the base's weight.

        PiSSA (Meng et al. 2024, arXiv:2404.02948, section 3) and OLoRA (Bueyuekakyuez 2024, arXiv:2406.01775) begin by
        taking the first adapter out of the base; that is computed anew from the base and stands beside the trained one,
        so the rank doubles.

        Args:
            module: A key of `pairs`.
            weight_OI: The base's weight; called only where it is needed.
        """
        import torch

        a_RI, b_OR = (self.read(self.pairs[module][kind]).float() for kind in "AB")
        kind = self.config.get("init_lora_weights")
        if kind not in CHANGED_BASE:
            return a_RI, b_OR
        weight, rank = weight_OI().float(), len(a_RI)
        if kind == "pissa":
            left_OK, values_K, right_KI = torch.linalg.svd(weight, full_matrices=False)
            roots_R = (values_K[:rank] / self.scale(module)).sqrt()
            first_OR, first_RI = left_OK[:, :rank] * roots_R, roots_R[:, None] * right_KI[:rank]
        else:
            q_OK, r_KI = torch.linalg.qr(weight)
            first_OR, first_RI = q_OK[:, :rank], r_KI[:rank]
        return torch.cat([a_RI, first_RI]), torch.cat([b_OR, -first_OR], dim=1)
