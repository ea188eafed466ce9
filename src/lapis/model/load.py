"""Checkpoint <-> Transformer. The family's table says what goes where; this file holds the tensors.

Everything is checked from headers before anything is allocated: names, shapes, layers, vocabulary. Weights are then
read one tensor at a time into the memory that they will live in, so there is no second copy. Leaves out: the commit
(checkpoint/commit.py): `save` writes into a folder that the caller commits.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.checkpoint.files import header_bytes
from lapis.checkpoint.store import dtype_name, torch_dtype
from lapis.errors import CheckpointError, ConfigError
from lapis.families import FAMILIES, Family, Rule, part_of
from lapis.families.base import layers_of
from lapis.model.config import Head, ModelConfig
from lapis.model.transformer import Transformer

CHUNK = 4 << 20  # elements converted at a time
SHARD_BYTES = 5_000_000_000
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a tensor on disk becomes parameters here, and back. `shape`: the shape on disk, from those here."""

    here: Callable[[Tensor, int], tuple[Tensor, ...]]
    disk: Callable[[tuple[Tensor, ...]], Tensor]
    shape: Callable[[list[tuple[int, ...]]], tuple[int, ...]]


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


TRANSFORMS = {
    "same": Transform(lambda t, n: (t,), lambda ts: ts[0], lambda shapes: shapes[0]),
    "transpose": Transform(lambda t, n: (t.t().contiguous(),), lambda ts: ts[0].t(), lambda shapes: shapes[0][::-1]),
    "split": Transform(lambda t, n: t.chunk(n), torch.cat, _stacked),
    "split_transpose": Transform(
        lambda t, n: t.t().contiguous().chunk(n), lambda ts: torch.cat(ts).t(), lambda shapes: _stacked(shapes)[::-1]
    ),
    "first": Transform(lambda t, n: (t[0],), lambda ts: ts[0][None], lambda shapes: (1, *shapes[0])),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What loading will do: which tensor on disk fills which parameters, and which parameters are drawn anew."""

    config: ModelConfig
    steps: tuple[tuple[str, Rule, tuple[str, ...]], ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...]


def load(
    source: Checkpoint | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    head: Head | None = None,
    classes: int = 0,
) -> Transformer:
    """The model of a folder, with the weights in `dtype` (default: that of the folder).

    head, classes: put another head on top; one that the folder lacks is drawn at random, and `model.notes` says so.
    Raises CheckpointError, before anything is allocated, listing all tensors that are missing, unknown or of a wrong
    shape. Peak memory is that of the weights in the target dtype, and one chunk.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    plan = plan_load(checkpoint, head=head, classes=classes)
    dtype = dtype or _dtype_of(checkpoint, plan)
    with torch.device("meta"):
        model = Transformer(plan.config)
    for name, rule, targets in plan.steps:
        tensor = _read(checkpoint, name, dtype)
        for target, piece in zip(targets, TRANSFORMS[rule.transform].here(tensor, len(targets)), strict=True):
            _assign(model, target, piece.to(device))
    if plan.fresh:
        _draw(model, plan.fresh, dtype, device)
    model.notes = [*checkpoint.notes, *plan.notes]
    return model.eval()


def read_config(checkpoint: Checkpoint, notes: list[str] | None = None) -> ModelConfig:
    """The shape that config.json gives. Raises CheckpointError for an unknown family or a field that is wrong."""
    if checkpoint.family is None:
        known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
        kind = str(checkpoint.config.get("model_type"))
        raise CheckpointError(f"{checkpoint.source}: config.json: model_type is {kind:.40}; lapis builds {known}")
    try:
        return ModelConfig.of(checkpoint.family.read_config(checkpoint.config, notes))
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from None


def plan_load(checkpoint: Checkpoint, *, head: Head | None = None, classes: int = 0) -> Plan:
    """Everything about loading that headers and config can show. Reads weights only to compare a tied head."""
    notes: list[str] = []
    config = read_config(checkpoint, notes)
    family = checkpoint.family
    assert family is not None
    found, problems = _find(checkpoint, family, notes)
    layers = layers_of(found, family)
    if layers != config.layers:
        raise CheckpointError(
            f"{checkpoint.source}: config.json says {config.layers} layers, the tensors have {layers}; fetch both again"
        )
    if config.head == "none" and config.pooler and not any("pooler" in name for name in found):
        config = dataclasses.replace(config, pooler=False)
    if head is not None and head != config.head:
        pooler = head in ("classes", "scalar") and not config.causal and config.image is None
        try:
            config = dataclasses.replace(config, head=head, classes=classes, pooler=pooler)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.source}: {error}") from None
    config = _settle_tie(checkpoint, config, found, notes)
    shapes = _shapes(checkpoint.source, config)
    steps: list[tuple[str, Rule, tuple[str, ...]]] = []
    used: set[str] = set()
    aside: list[str] = []
    twins = {rule.names[0] for _, rule, _ in found.values() if rule.twin}
    for name, rule, layer in found.values():
        targets = tuple(target.replace("{layer}", str(layer)) for target in rule.names)
        template = [target.replace("{layer}", "0") for target in rule.names]
        if any(target not in shapes for target in template):
            if rule.component.startswith("head"):
                if not (config.tied and rule.component == "head"):
                    aside.append(name)
            else:
                problems.append(f"{name} has no place by config.json")
            continue
        expected = TRANSFORMS[rule.transform].shape([shapes[target] for target in template])
        actual = checkpoint.index[name].shape
        if actual != expected:
            field = " (vocab_size)" if rule.component in ("embed", "head") and actual[1:] == expected[1:] else ""
            problems.append(f"{name} is {_spelled(actual)} but {_spelled(expected)} by config.json{field}")
        used.update(targets)
        if rule.twin or targets[0] not in twins:
            steps.append((name, rule, targets))
    wanted = {name.replace("blocks.0.", f"blocks.{i}.") for name in shapes for i in range(layers)}
    lacking = sorted(wanted - used)
    fresh = tuple(name for name in lacking if head is not None and name.startswith("head"))
    missing = sorted({family.disk_name(*family.rule_for(name)) for name in lacking if name not in fresh})
    problems += [f"{name} is missing" for name in missing]
    if problems:
        more = f" ... and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{checkpoint.source}: {'; '.join(problems[:6])}{more}")
    if aside:
        notes.append(f"left out, for another head than {config.head}: {', '.join(aside[:4])}")
    if fresh:
        notes.append(f"a new head ({config.head}) was drawn at random: {', '.join(fresh)}")
    return Plan(config, tuple(steps), fresh, tuple(notes))


def save(
    model: Transformer,
    folder: Path | str,
    dtype: torch.dtype | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config.json and safetensors, as transformers would, into a folder (made if it is not there).

    dtype: of the weights on disk (default: the model's). state: parameters by name, in place of the model's own (for
    weights gathered from several devices). Raises ConfigError where no published family has the model's shape.
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


def disk_layout(config: ModelConfig, names: Mapping[str, object]) -> dict[str, tuple[tuple[str, ...], Rule]]:
    """Name on disk -> the parameters that it holds, for parameters by name here."""
    family = family_of(config)
    layout: dict[str, tuple[tuple[str, ...], Rule]] = {}
    for name in names:
        rule, layer = family.rule_for(name)
        sources = tuple(source.replace("{layer}", str(layer)) for source in rule.names)
        layout[family.disk_name(rule, layer, bare=config.head == "none")] = sources, rule
    for rule in family.rules:
        if rule.twin and not config.tied and rule.names[0] in names:
            layout[family.disk_name(rule, None)] = rule.names, rule
    return layout


def family_of(config: ModelConfig) -> Family:
    for family in FAMILIES:
        if config.family in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise ConfigError(f'model: family is "{config.family}"; known: {known}')


def _find(
    checkpoint: Checkpoint, family: Family, notes: list[str]
) -> tuple[dict[str, tuple[str, Rule, int | None]], list[str]]:
    """Canonical name -> (name on disk, rule, layer), and what is wrong with the names."""
    found: dict[str, tuple[str, Rule, int | None]] = {}
    problems = []
    ignored = 0
    for name in checkpoint.names:
        matched = family.match(name)
        if matched is None:
            if family.is_ignored(name):
                ignored += 1
            else:
                problems.append(f"{name} is not a tensor of {family.name}")
            continue
        canonical = family.disk_name(*matched)
        if canonical in found:
            problems.append(f"{name} and {found[canonical][0]} are the same tensor twice")
        found[canonical] = (name, *matched)
    if ignored:
        notes.append(f"{ignored} tensors are buffers or unused heads; left out")
    return found, problems


def _settle_tie(
    checkpoint: Checkpoint, config: ModelConfig, found: Mapping[str, tuple[str, Rule, int | None]], notes: list[str]
) -> ModelConfig:
    """A tied model whose folder holds a head that differs from the embedding is untied, and said to be."""
    if not config.tied or config.head not in ("lm", "masked"):
        return config
    by_target = {rule.names[0]: name for name, rule, _ in found.values()}
    head, embed = by_target.get("head.weight"), by_target.get("embed.weight")
    if head is None or embed is None or _equal(checkpoint, head, embed):
        return config
    notes.append(f"config.json ties the head to the embedding, but {head} differs from {embed}; both are kept")
    return dataclasses.replace(config, tied=False)


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    one, other = checkpoint.index[first], checkpoint.index[second]
    if one.shape != other.shape:
        return False
    spans = ((start, min(start + CHUNK, one.elements)) for start in range(0, one.elements, CHUNK))
    return all(torch.equal(checkpoint.read_range(first, *s), checkpoint.read_range(second, *s)) for s in spans)


def _shapes(source: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, of the first block only; nothing is allocated, whatever config.json claims."""
    try:
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(config, layers=1))
    except (RuntimeError, OverflowError):
        raise CheckpointError(f"{source}: config.json: its sizes are too large for any tensor") from None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _dtype_of(checkpoint: Checkpoint, plan: Plan) -> torch.dtype:
    """The dtype that most of the weights have."""
    sizes: dict[str, int] = {}
    for name, _, _ in plan.steps:
        info = checkpoint.index[name]
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.elements
    dtype = torch_dtype(max(sizes, key=lambda kind: sizes[kind]))
    return dtype if dtype in FLOATS else torch.float32  # _read refuses what is no number to compute with


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    info = checkpoint.index[name]
    kind = torch_dtype(info.dtype)
    if kind not in FLOATS:
        raise CheckpointError(f"{checkpoint.source}: {name} is {info.dtype}; quantized weights cannot be run here")
    if kind == dtype or info.elements <= CHUNK:
        return checkpoint.read(name).to(dtype)
    result = torch.empty(info.elements, dtype=dtype)
    for first in range(0, info.elements, CHUNK):
        last = min(first + CHUNK, info.elements)
        result[first:last] = checkpoint.read_range(name, first, last)
    return result.view(info.shape)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, nn.Parameter(tensor))


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
    kind = dtype_name(dtype)
    shapes = {
        name: (kind, TRANSFORMS[rule.transform].shape([tuple(tensors[source].shape) for source in sources]))
        for name, (sources, rule) in shard.items()
    }
    with path.open("wb") as file:
        file.write(header_bytes(shapes, {"format": "pt"}))
        for sources, rule in shard.values():
            pieces = tuple(tensors[source].detach().to("cpu", dtype) for source in sources)
            tensor = TRANSFORMS[rule.transform].disk(pieces).contiguous()
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def _spelled(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
