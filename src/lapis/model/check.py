"""What loading a folder would do, from config.json and headers alone: all problems in one message.

No torch is imported and nothing is allocated, whatever sizes config.json gives. Leaves out: reading the tensors
(load.py).
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.errors import CheckpointError, ConfigError
from lapis.families import Family, Rule, Shape, family_of, known_types, part_of
from lapis.families.base import experts_of, layers_of
from lapis.families.config import CLASS_FIELDS, Head, ModelConfig
from lapis.parsing import quoted
from lapis.wording import format_count

DiskTensors = dict[str, tuple[str, Rule, int | None]]  # canonical name on disk -> as it is spelled, its rule, its layer

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
SMALL = {"F8_E4M3": "float8", "F8_E5M2": "float8", "I8": "int8", "U8": "uint8"}  # counted, not run
SCALES = ("_scale", "_scale_inv")  # how the names of quantized weights' factors end
MOST_LISTED = 6


@dataclasses.dataclass(frozen=True)
class Plan:
    """steps: which tensor on disk fills which parameters. fresh: parameters of a new head, to be drawn at random.

    dtype: that of most of the weights on disk, by torch's name.
    """

    config: ModelConfig
    steps: tuple[tuple[str, Rule, tuple[str, ...]], ...]
    fresh: tuple[str, ...]
    dtype: str
    notes: tuple[str, ...]


def read_config(source: Checkpoint | str | Path, notes: list[str] | None = None) -> ModelConfig:
    """The shape that config.json gives. Raises CheckpointError for an unknown family or a field that is wrong."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, adapters=True)
    if checkpoint.runs is None:
        kind = str(checkpoint.config.get("model_type"))
        raise CheckpointError(
            f"{checkpoint.source}: config.json: model_type is {kind:.40}; lapis builds {known_types()}"
        )
    try:
        return checkpoint.runs.read_config(checkpoint.text_config, notes)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from None


def plan_load(checkpoint: Checkpoint, *, head: Head | None = None, classes: int = 0, to_run: bool = True) -> Plan:
    """Everything about loading that headers and config can show.

    Args:
        checkpoint: Opened.
        head: Another head to put on top.
        classes: Of that head.
        to_run: False only counts: quantized weights pass, and no weight is read. To run, the head is compared with the
            embedding where config.json ties them and both are there.

    Raises:
        CheckpointError: With all tensors that are missing, unknown or of a wrong shape.
    """
    notes: list[str] = []
    config = read_config(checkpoint, notes)
    family = checkpoint.runs
    assert family is not None
    tensors, problems = _find(checkpoint, family, notes, to_run)
    layers = layers_of(tensors, family)
    if layers != config.layers:
        raise CheckpointError(
            f"{checkpoint.source}: config.json says {format_count(config.layers, 'layer')}, the tensors have "
            f"{layers}; fetch both again"
        )
    stacked = {count for name, rule, _ in tensors.values() for count in checkpoint.index[name].shape[:1]
               if rule.component.startswith("mlp.experts.") and rule.expert is None}  # fmt: skip
    experts = max(stacked, default=experts_of(rule for _, rule, _ in tensors.values()))
    if config.experts is not None and experts not in (0, config.experts.count):
        raise CheckpointError(
            f"{checkpoint.source}: config.json says {format_count(config.experts.count, 'expert')}, the tensors "
            f"have {experts}; fetch both again"
        )
    config = _with_head(checkpoint, config, tensors, head, classes)
    if to_run:
        config = _settle_tie(checkpoint, config, tensors, notes)
    shapes, kinds = family.parameter_shapes(config), config.kinds
    steps: list[tuple[str, Rule, tuple[str, ...]]] = []
    used: set[str] = set()
    aside: list[str] = []
    unread: list[str] = []
    quantized: list[str] = []
    twins = {rule.names[0] for _, rule, _ in tensors.values() if rule.twin}
    for name, rule, layer in tensors.values():
        rule = rule.of_all(config.experts.count if config.experts is not None else 0)
        targets = tuple(target.replace("{layer}", str(layer)) for target in rule.names)
        template = [target.replace("{layer}", str(kinds[layer or 0])) for target in rule.names]
        if any(target not in shapes for target in template):
            if layer is not None and config.borrows(layer) and rule.component in ("attn.k", "attn.v", "attn.k_norm"):
                unread.append(name)
            elif not rule.component.startswith("head"):
                problems.append(f"{name} has no place by config.json")
            elif not (config.tied and rule.component == "head"):
                aside.append(name)
            continue
        expected = rule.transform.disk_shape([shapes[target] for target in template])
        actual = checkpoint.index[name].shape
        if actual != expected:
            rows = rule.component in ("embed", "head") and len(actual) == 2 and actual[1:] == expected[1:]
            field = f" (vocab_size {config.vocab})" if rows else ""
            problems.append(f"{name} is {_spelled(actual)} but {_spelled(expected)} by config.json{field}")
        if checkpoint.index[name].dtype not in (FLOATS if to_run else FLOATS | SMALL):
            quantized.append(f"{name} is {checkpoint.index[name].dtype}")
        used.update(targets)
        if rule.twin or targets[0] not in twins:
            steps.append((name, rule, targets))
    parameters = {
        name.replace(f"blocks.{part_of(name).layer}.", f"blocks.{layer}.")
        for name in shapes for layer, first in enumerate(kinds) if part_of(name).layer in (None, first)
    }  # fmt: skip
    lacking = sorted(parameters - used)
    fresh = tuple(name for name in lacking if head is not None and name.startswith("head"))
    missing = sorted({family.disk_name(*family.rule_for(name)) for name in lacking if name not in fresh})
    problems += [f"{name} is missing" for name in missing]
    if quantized:
        others = f" and {len(quantized) - 1} more are quantized" if len(quantized) > 1 else ""
        problems.insert(0, f"{quantized[0]}{others}: such weights cannot be run here; convert them to bfloat16")
    elif method := _quantization(checkpoint):
        line = (f"config.json: quantization_config is {method}; lapis runs 16-bit weights and wider: give the "
                "unquantized model, or take the field out where the tensors are it")  # fmt: skip
        if to_run:
            problems.insert(0, line)
        else:
            notes.append(line)
    if problems:
        more = f" ... and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        raise CheckpointError(f"{checkpoint.source}: {'; '.join(problems[:MOST_LISTED])}{more}")
    if aside:
        notes.append(f"left out, for another head than {config.head}: {', '.join(aside[:4])}")
    if unread:
        what = format_count(len(unread), "tensor is", "tensors are")
        notes.append(f"{what} keys and values of layers that read those of another; left out")
    if fresh:
        notes.append(f"a new head ({config.head}) was drawn at random: {', '.join(fresh)}")
    return Plan(config, tuple(steps), fresh, dtype_of(checkpoint, (name for name, _, _ in steps)), tuple(notes))


def _quantization(checkpoint: Checkpoint) -> str:
    """How config.json says that weights are quantized, where nothing here takes it back; empty where it does not."""
    settings = checkpoint.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    return "" if settings is None or method == "mxfp4" else quoted(method)


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


def _find(checkpoint: Checkpoint, family: Family, notes: list[str], to_run: bool) -> tuple[DiskTensors, list[str]]:
    """Every tensor by its canonical name, and what is wrong with the names."""
    tensors: DiskTensors = {}
    problems = []
    ignored = scales = 0
    towers = Counter[str]()
    for name in checkpoint.names:
        inner = checkpoint.text_name(name)
        if inner is None:
            towers[checkpoint.towers.others[name]] += 1
            continue
        matched = family.match(inner)
        if matched is None:
            if family.is_ignored(name):
                ignored += 1
            elif name.endswith(SCALES) and not to_run:
                scales += 1
            else:
                problems.append(f"{name} is not a tensor of {family.name}")
            continue
        canonical = family.disk_name(*matched)
        if canonical in tensors:
            problems.append(f"{name} and {tensors[canonical][0]} are the same tensor twice")
        tensors[canonical] = (name, *matched)
    if ignored:
        what = format_count(ignored, "tensor is a buffer or an unused head", "tensors are buffers or unused heads")
        notes.append(f"{what}; left out")
    if towers:
        listed = ", ".join(f"{count:,} of {tower}" for tower, count in towers.items())
        notes.append(
            f"text alone is run here: {listed} are left out; lapis graft puts what is learned back beside them"
        )
    if scales:
        what = format_count(scales, "tensor is the scale", "tensors are the scales")
        notes.append(f"{what} of quantized weights; not counted")
    return tensors, problems


def _with_head(
    checkpoint: Checkpoint, config: ModelConfig, tensors: DiskTensors, head: Head | None, classes: int
) -> ModelConfig:
    """The head that was asked for in place of the folder's, and a pooler only where it has one."""
    if config.head == "none" and config.pooler and not any("pooler" in name for name in tensors):
        config = dataclasses.replace(config, pooler=False)
    if head is None or (head == config.head and classes in (0, config.classes)):
        return config
    pooler = head in ("classes", "scalar") and config.pools
    try:
        return dataclasses.replace(config, head=head, classes=classes, pooler=pooler, extra=_unlabeled(config))
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.source}: {error}") from None


def _unlabeled(config: ModelConfig) -> dict[str, object]:
    """What config.json hands on, without the names of another head's classes."""
    return {name: value for name, value in config.extra.items() if name not in CLASS_FIELDS}


def _settle_tie(checkpoint: Checkpoint, config: ModelConfig, tensors: DiskTensors, notes: list[str]) -> ModelConfig:
    """A tied model whose folder holds a head that differs from the embedding is untied, with a note."""
    if not config.tied or config.head not in ("lm", "masked"):
        return config
    by_target = {rule.names[0]: name for name, rule, _ in tensors.values()}
    head, embed = by_target.get("head.weight"), by_target.get("embed.weight")
    if head is None or embed is None or checkpoint.same_bytes(head, embed):
        return config
    notes.append(f"config.json ties the head to the embedding, but {head} differs from {embed}; both are kept")
    return dataclasses.replace(config, tied=False)


def dtype_of(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """The dtype of most of the numbers of some tensors, by torch's name.

    Args:
        checkpoint: Opened.
        names: Of tensors whose kind is known.
    """
    sizes: dict[str, int] = {}
    for name in names:
        info = checkpoint.index[name]
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.elements
    return (FLOATS | SMALL)[max(sizes, key=lambda kind: sizes[kind])]


def _spelled(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
