"""Checkpoint <-> Transformer. The family's table says what goes where; this file holds the tensors.

Weights are read one tensor at a time into the memory that they will live in, so there is no second copy. Leaves out:
what can be wrong with a folder (check.py), and the commit (checkpoint/commit.py): `save` writes into a folder that the
caller commits.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.checkpoint.adapter import head_of
from lapis.checkpoint.tensor_file import finite, stream_tensors, torch_dtype
from lapis.errors import CheckpointError
from lapis.families import Rule, family_of, part_of
from lapis.families.config import Head, ModelConfig
from lapis.model.adapter import attach
from lapis.model.check import disk_layout, plan_load
from lapis.model.transformer import Transformer
from lapis.wording import format_count

CHUNK = 1 << 20  # elements converted at a time
AHEAD = 2  # tensors that are read while one is put in place
STEM = "model.language_model."  # of the language model's names within a multimodal model of transformers 5
SHARD_BYTES = 5_000_000_000


def load(
    source: Checkpoint | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    head: Head | None = None,
    classes: int = 0,
    placed: Callable[[nn.Module, str], None] | None = None,
) -> Transformer:
    """The model of a folder, in evaluating mode.

    A folder that holds an adapter gives its base with the adapter on it. Peak memory is that of the weights in the
    target dtype and of the few tensors under way.

    Args:
        source: A folder, a model of the hub, or one that was opened.
        dtype: Of the weights in memory; by default that of the folder.
        device: Where the weights go.
        head: Another head to put on top; one that the folder lacks is drawn at random, and `model.notes` says so.
        classes: Of that head.
        placed: Called with the model and the name of each module as soon as all of its parameters are there; what it
            does with them is done while the next ones are read.

    Raises:
        CheckpointError: Before anything is allocated, with all tensors that are missing, unknown or of a wrong shape.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, adapters=True)
    if checkpoint.adapter is not None and head is None:
        head, classes = head_of(checkpoint)
    plan = plan_load(checkpoint, head=head, classes=classes)
    checkpoint = checkpoint.fetched()
    dtype = dtype or getattr(torch, plan.dtype)
    with torch.device("meta"):
        model = Transformer(plan.config)
    reads = read_tensors(checkpoint, [name for name, _, _ in plan.steps], dtype)
    for (_, rule, targets), (_, tensor) in zip(plan.steps, reads, strict=True):
        shapes = [tuple(model.get_parameter(target).shape) for target in targets]
        for target, piece in zip(targets, rule.transform.apply(tensor, shapes), strict=True):
            module = _assign(model, target, piece.to(device))
            if placed and not any(p.is_meta for p in model.get_submodule(module).parameters(recurse=False)):
                placed(model, module)
    if plan.fresh:
        _draw(model, plan.fresh, dtype, device)
    model.stem = "" if checkpoint.family is not None else STEM
    model.notes, model.fresh = [*checkpoint.notes, *plan.notes], plan.fresh
    generation = checkpoint.json("generation_config.json")
    model.generation = dict(generation) if isinstance(generation, Mapping) else {}
    if checkpoint.adapter is not None:
        attach(model, checkpoint.adapter)
    return model.eval()


def empty(source: Checkpoint | str | Path, *, head: Head | None = None, classes: int = 0) -> Transformer:
    """The model of a folder without its weights, on the meta device; headers alone are read. Not for an adapter.

    Args:
        source: A folder, a model of the hub, or one that was opened.
        head: Another head to put on top.
        classes: Of that head.

    Raises:
        CheckpointError: As `load`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    plan = plan_load(checkpoint, head=head, classes=classes)
    with torch.device("meta"):
        model = Transformer(plan.config)
    model.notes, model.fresh = [*checkpoint.notes, *plan.notes], plan.fresh
    return model.eval()


def save(
    model: Transformer,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config.json and safetensors, as transformers would, into a folder (made if it is not there).

    Args:
        model: Of a family that is published.
        folder: Files of the same names in it are replaced.
        dtype: Of the weights on disk; by default the model's.
        state: Parameters by name, in place of the model's own (for weights gathered from several devices).

    Raises:
        ConfigError: Where no published family has the model's shape.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = dict(model.named_parameters()) if state is None else dict(state)
    dtype = dtype or next(iter(tensors.values())).dtype
    written = json.dumps(config_json(config, dtype), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(written + "\n", encoding="utf-8")
    layout = disk_layout(config, tensors)
    shards: list[dict[str, tuple[tuple[str, ...], Rule]]] = [{}]
    room = SHARD_BYTES
    for name, (sources, rule) in layout.items():
        nbytes = sum(tensors[source].numel() for source in sources) * dtype.itemsize
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = (sources, rule)
        room -= nbytes
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    for file, shard in zip(files, shards, strict=True):
        _write_shard(folder / file, shard, tensors, dtype)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """config.json as transformers >= 4.51 and 5 read it."""
    name = str(dtype).removeprefix("torch.")
    return {**family_of(config).write_config(config), "dtype": name, "torch_dtype": name}


def read_tensors(checkpoint: Checkpoint, names: Sequence[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in this order, the next ones being read meanwhile.

    Args:
        checkpoint: With its files at hand.
        names: Of tensors on disk.
        dtype: What all floating-point ones are converted to.

    Raises:
        CheckpointError: A tensor holds NaN or Inf.
    """
    # One piece of memory for all that is converted: many that come and go leave holes between the weights
    piece_N = torch.empty(CHUNK * 8, dtype=torch.uint8)
    with ThreadPoolExecutor(1) as pool:
        reads = _ahead(pool, (partial(_read, checkpoint, name, dtype, piece_N) for name in names))
        yield from zip(names, reads, strict=True)


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype, piece_N: Tensor) -> Tensor:
    """A tensor in the target dtype; one that is converted goes through `piece_N`, bytes for a CHUNK of elements.

    Raises CheckpointError for NaN and Inf, which a model can turn into plausible numbers: a damaged query projection
    gives finite logits. Each chunk is looked at while it is in the cache.
    """
    info = checkpoint.index[name]
    kind = torch_dtype(info.dtype)
    if kind is None or not kind.is_floating_point:
        return checkpoint.read(name)
    result = torch.empty(info.elements, dtype=dtype)
    for first in range(0, info.elements, CHUNK):
        values_N = result[first : first + CHUNK]
        raw_N = values_N.view(torch.uint8) if kind == dtype else piece_N[: len(values_N) * kind.itemsize]
        checkpoint.read_into(name, first * kind.itemsize, raw_N.numpy().data)
        if kind != dtype:
            values_N.copy_(raw_N.view(kind))
        if not finite(values_N):
            count, own = int((~values_N.isfinite()).sum()), kind == dtype or not finite(raw_N.view(kind))
            what = f"{count:,} NaN or Inf" if own else f"{format_count(count, 'number')} too large for {str(dtype)[6:]}"
            where = f"elements {first:,} to {first + len(values_N):,}"
            remedy = "fetch it again" if own else "give another dtype"
            raise CheckpointError(f"{checkpoint.source}: {name} holds {what} ({where}); {remedy}")
    return result.view(info.shape)


def _ahead(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The results in order, with at most AHEAD jobs under way."""
    waiting: deque[Future[Tensor]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> str:
    """Puts the parameter in its place; the name of its module."""
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, nn.Parameter(tensor))
    return module


def _draw(model: Transformer, names: tuple[str, ...], dtype: torch.dtype, device: torch.device | str) -> None:
    """Random weights for a new head, from torch's generator."""
    for name in names:
        shape = model.get_parameter(name).shape
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        if part_of(name).kind == "weight":
            tensor = tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02)
        _assign(model, name, tensor)


def _write_shard(
    path: Path, shard: Mapping[str, tuple[tuple[str, ...], Rule]], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    shapes = {
        name: (dtype, rule.transform.disk_shape([tuple(tensors[source].shape) for source in sources]))
        for name, (sources, rule) in shard.items()
    }
    values = (
        rule.transform.invert(tuple(tensors[source].detach().to("cpu", dtype) for source in sources))
        for sources, rule in shard.values()
    )
    stream_tensors(path, shapes, values, {"format": "pt"})
