"""Proof, before weights are computed with, that models fit together; every problem is named, not only the first.

All but `check_parents` is read from headers, configs and tokenizers.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from statistics import median
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import sha256_of
from lapis.checkpoint.towers import language_config
from lapis.errors import CheckpointError
from lapis.families import Family, find
from lapis.families.config import ModelConfig
from lapis.families.fields import GENERIC, TOKENS
from lapis.parsing import quoted
from lapis.text.tokenizer.vocabulary import Vocabulary
from lapis.weights.engine.fp8 import is_number
from lapis.weights.engine.sources import Stored, as_bytes
from lapis.weights.engine.tiles import one_thread_each
from lapis.weights.matching import counterparts, embedding_rows
from lapis.wording import format_count

# fields that make the same shapes mean another computation
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_DECISIVE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", *_ACTIVATIONS)
# fields of a parsed config that `_DECISIVE` covers, that shapes show, or that change no arithmetic
_COVERED = {"family", "heads", "kv_heads", "head_dim", "layers", "dim", "ffn_dim", "vocab", "context", "extra", "head",
            "classes", "image"}  # fmt: skip
# fields of config.json of a family that is not known, which change no arithmetic or which shapes show
_NO_ARITHMETIC = GENERIC | set(TOKENS) | set(_DECISIVE) | {
    "vocab_size", "max_position_embeddings", "n_positions", "initializer_range", "quantization_config", "auto_map",
    "_name_or_path", "attention_dropout", "id2label", "label2id", "num_hidden_layers", "hidden_size",
    "intermediate_size", "_attn_implementation", "_attn_implementation_autoset", "text_config", "vision_config",
    "audio_config", "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
_PARSED = {"mlp", "window", "window_layers"}  # decisive as well, and spelled in several ways
_QUANTIZED = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "bitsandbytes", "gptq", "awq")
_EXPERTS = ("mlp.router", "mlp.experts.")
_NUMBERS = ("F64", "F32", "BF16", "F16")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTH, _FFN = ("hidden_size", "n_embd"), ("intermediate_size", "n_inner")
_UNREAD = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tokenizer.tiktoken")
UNRELATED, FAR = 0.1, 0.3  # cosines of the weights of two models; a fine-tune and its parent are near 1
_MATRICES, _ELEMENTS = 12, 1 << 16  # how many are read to see whether models are related, and how much of each
_AT_ONCE = 8  # pairs of models whose samples are asked for together: 3 MB each, of bfloat16

_Pair = tuple[str, Checkpoint, str, Checkpoint]
"""A role and a model, twice."""


def check_configs(inputs: Mapping[str, Checkpoint], owner: str = "onto") -> tuple[list[str], list[str]]:
    """Problems and notes from each model's own config.json, and from comparing them with that of the owner."""
    problems, notes = [], []
    onto = inputs[owner]
    problems += missing_tensors(inputs, owner)
    for role, checkpoint in inputs.items():
        problems += [f"{role}: {line}" for line in check_sizes(checkpoint)]
        if checkpoint is not onto:
            more, differences = compare_configs(owner, onto, role, checkpoint)
            problems += [f"{line}; both must be fine-tunes of one model" for line in more]
            notes += [f"{line}; {owner}'s is kept" for line in differences]
    notes += family_notes(onto) + quantization_notes(inputs.values())
    dtypes = {role: sorted({info.dtype for info in c.index.values()}) for role, c in inputs.items()}
    if len({tuple(names) for names in dtypes.values()}) > 1:
        spelled = ", ".join(f"{role} {'/'.join(names)}" for role, names in dtypes.items())
        notes.append(f"dtypes differ ({spelled}); computed in float32, rounded once")
    return problems, notes


def compare_configs(
    role: str, model: Checkpoint, other_role: str, other: Checkpoint
) -> tuple[list[str], list[str]]:  # fmt: skip
    """Fields that change the arithmetic and differ between two models, as lines: decisive ones, and all others.

    Where both families are known, what config.json means is compared, not how it is spelled.
    """
    raw = language_config(model.config), language_config(other.config)
    shapes = [_shape(config) for config in raw]
    decisive = {key: (raw[0].get(key), raw[1].get(key)) for key in _DECISIVE}
    decisive = {key: pair for key, pair in decisive.items() if pair[0] != pair[1] and None not in pair}
    if shapes[0] is not None and shapes[1] is not None:
        one, two = shapes[0], shapes[1]
        decisive = {key: pair for key, pair in decisive.items() if key not in ("sliding_window", *_ACTIVATIONS)}
        decisive |= _differing(one, two, _PARSED)
        rest = _differing(one, two, {f.name for f in dataclasses.fields(one)} - _COVERED - _PARSED)
    else:
        fields = [_rope_fields(config) | {k: v for k, v in config.items() if k not in _NO_ARITHMETIC} for config in raw]
        keys = [key for key in fields[0] if key in fields[1] or key.startswith("rope")]
        keys += [key for key in fields[1] if key.startswith("rope") and key not in fields[0]]
        rest = {key: (fields[0].get(key), fields[1].get(key)) for key in keys}
        rest = {key: pair for key, pair in rest.items() if pair[0] != pair[1]}

    def lines(fields: Mapping[str, tuple[Any, Any]]) -> list[str]:
        return [f"{key} is {_plain(a)} in {role} and {_plain(b)} in {other_role}" for key, (a, b) in fields.items()]

    return lines(decisive), lines(rest)


def missing_tensors(inputs: Mapping[str, Checkpoint], owner: str | None = None) -> list[str]:
    """A line for each tensor of a model that its config.json asks for, and that is not there, or of another shape.

    owner: the model with which the others are compared, for the wording.
    """
    problems = []
    for role, checkpoint in inputs.items():
        config = language_config(checkpoint.config)
        family, types, layers = find(config), config.get("layer_types"), config.get("num_hidden_layers")
        if isinstance(types, list) and isinstance(layers, int) and len(types) != layers:
            problems.append(f"{role}: config.json: layer_types has {len(types):,} entries, num_hidden_layers is "
                            f"{layers:,}; fetch config.json again")  # fmt: skip
        if family is None:
            continue
        try:
            names = family.required(family.read_config(config))
        except CheckpointError:
            continue  # its own commands refuse it; shapes are compared all the same
        spellings = {name for full in checkpoint.names for name in (full, checkpoint.towers.inner(full)) if name}
        there = {family.canonical(name) for name in spellings}
        if odd := _of_another_shape(checkpoint, family, names):
            more = f", and {len(odd) - 1:,} more differ" if len(odd) > 1 else ""
            problems.append(f"{role}: {odd[0]} by config.json{more}; fetch both again")
        for name in names:
            if name in there or family.stacked(name) in there:
                continue
            if owner is not None and role != owner and name in inputs[owner].index:
                problems.append(f"{name} is in {owner} and not in {role} ({checkpoint.source}); is it a whole model?")
            else:
                problems.append(f"{role}: {name} is missing in {checkpoint.source}; config.json asks for it")
    return problems


def _of_another_shape(checkpoint: Checkpoint, family: Family, names: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What config.json gives another shape than it has, of routers and experts that lie as numbers.

    Other sizes are compared between models, and by `check_sizes`.
    """
    odd = []
    for name in (n for n in checkpoint.names if checkpoint.part(n).component.startswith(_EXPERTS)):
        own, info = family.canonical(checkpoint.towers.inner(name) or name), checkpoint.info(name)
        expected = names.get(own or "", info.shape)
        if info.dtype in _NUMBERS and info.shape != expected:
            odd.append(f"{name} is {_x(info.shape)} but {_x(expected)}")
    return odd


def family_notes(checkpoint: Checkpoint) -> list[str]:
    """Lines where the architecture is not known, and where a folder holds more than a language model."""
    notes = []
    if find(language_config(checkpoint.config)) is None:
        kind = checkpoint.config.get("model_type")
        notes.append(f"model_type {kind} is not known here: layers and components are read from the tensors' names")
    return notes


def quantization_notes(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """Lines where config.json says that weights are quantized in a way that is not known."""
    notes = []
    for checkpoint in checkpoints:
        settings = checkpoint.config.get("quantization_config")
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        if settings is not None and method not in _QUANTIZED:
            notes.append(f"quantization_config of {checkpoint.source} is {quoted(method)}, which is not known: its "
                         "tensors are taken for the numbers that they hold")  # fmt: skip
    return notes


def check_sizes(checkpoint: Checkpoint) -> list[str]:
    """Where config.json and the tensors of one model disagree on layers and widths."""
    problems = []
    config = language_config(checkpoint.config)
    parts = {name: checkpoint.part(name) for name in checkpoint.names}
    layers = {part.layer for part in parts.values() if part.layer is not None}
    count = next((n for key in _LAYERS if isinstance(n := config.get(key), int)), None)
    if layers and count is not None and count != len(layers):
        problems.append(f"config.json says {format_count(count, 'layer')}, the tensors have {len(layers):,}")
    for keys, component in ((_WIDTH, "embed"), (_FFN, "mlp.up")):
        size = next((n for key in keys if isinstance(n := config.get(key), int)), None)
        names = [n for n, part in parts.items() if part.component == component and part.kind == "weight"]
        if size is not None and names and not any(size in checkpoint.info(name).shape for name in names):
            problems.append(f"config.json says {size:,}, but {names[0]} is {_x(checkpoint.info(names[0]).shape)}")
    return problems


def check_tensors(inputs: Mapping[str, Checkpoint], fates: Mapping[str, str], owner: str = "onto") -> list[str]:
    """Problems with names, shapes and dtypes. fates: what becomes of each tensor of the owner (graft/layout.py)."""
    problems = []
    onto, what = inputs[owner], "a graft" if owner == "onto" else "a difference"
    names = {role: counterparts(onto, checkpoint) for role, checkpoint in inputs.items()}
    for name, fate in fates.items():
        if fate not in ("merge", "rows"):
            continue
        info = onto.info(name)
        infos = {owner: info}
        for role, checkpoint in inputs.items():
            if checkpoint is onto:
                continue
            other = names[role].get(name)
            if other is None:
                problems.append(f"{name} is in {owner} and not in {role} ({checkpoint.source}); is it a whole model?")
                continue
            infos[role] = checkpoint.info(other)
            ours, theirs = info.shape, infos[role].shape
            if (ours[1:] if fate == "rows" else ours) != (theirs[1:] if fate == "rows" else theirs):
                problems.append(
                    f"{name} is {_x(ours)} in {owner} and {_x(theirs)} in {role}; {what} needs equal shapes"
                )
        for role, each in infos.items():
            stored = name if role == owner else names[role][name]
            if not is_number(inputs[role], stored):
                problems.append(
                    f"{name} is {each.dtype} in {role}: numbers without a known scale; give the unquantized model"
                )
    return problems


def check_vocabularies(inputs: Mapping[str, Checkpoint], words: Mapping[str, Vocabulary | None]) -> list[str]:
    """Problems of configs and tokenizers against embedding rows."""
    problems = []
    for role, checkpoint in inputs.items():
        vocabulary, rows = words[role], embedding_rows(checkpoint)
        size = language_config(checkpoint.config).get("vocab_size")
        if rows is not None and isinstance(size, int) and size != rows:
            problems.append(f"{role}: config.json says vocab_size {size:,}, the embedding has {rows:,} rows")
        if vocabulary and rows is not None and vocabulary.size > rows:
            last = max(vocabulary.ids, key=lambda token: vocabulary.ids[token])
            problems.append(
                f'{role}: the token "{last}" has id {vocabulary.size - 1:,}, the embedding has {rows:,} rows'
            )
    return problems


def check_same_tokens(
    inputs: Mapping[str, Checkpoint], words: Mapping[str, Vocabulary | None], same_tokens: bool
) -> tuple[list[str], list[str]]:
    """Problems and notes where a tokenizer cannot be read as text, so that tokens cannot be matched.

    Files that are equal byte by byte hold the same tokens. same_tokens: somebody who knows says that rows agree.
    """
    unread: dict[str, str] = {}
    for role, checkpoint in inputs.items():
        name = next((name for name in _UNREAD if words[role] is None and checkpoint.file(name)), None)
        if name is not None and (path := checkpoint.file(name)) is not None:
            unread[role] = f"{name} {sha256_of(path)}"
    if not unread or (len(unread) == len(inputs) and len(set(unread.values())) == 1):
        return [], []
    lines = [
        f"{role} has only {text.split()[0]}, which cannot be compared with the other tokenizers"
        for role, text in unread.items()
    ]
    if same_tokens:
        return [], [f"{line}; rows are taken to stand for the same tokens (--same-tokens)" for line in lines]
    remedy = "save its tokenizer with tokenizer.json, or give --same-tokens where the rows are known to agree"
    return [f"{line}; {remedy}" for line in lines], []


def check_parents(pairs: Iterable[_Pair], allow_unrelated: bool) -> tuple[list[str], list[str]]:
    """Problems and notes where two models whose difference is taken have nothing to do with each other.

    Reads a sample of their matrices, at most `_MATRICES` x `_ELEMENTS` numbers of each model.

    Args:
        pairs: (role, model, role, model), each with its difference taken.
        allow_unrelated: Whether to go on all the same, with a note.
    """
    problems, notes = [], []
    for (role, _, other_role, _), (cosine, count) in _kinships(list(pairs)):
        if cosine is None or cosine >= FAR:
            continue
        line = f"{other_role} is no fine-tune of {role}: the cosine of their weights is {cosine:.2f}"
        if cosine >= max(UNRELATED, 3 / count**0.5):
            notes.append(f"{role} and {other_role} are far apart: the cosine of their weights is {cosine:.2f}")
        elif allow_unrelated:
            notes.append(f"{line}; their difference was taken all the same (--allow-unrelated)")
        else:
            problems.append(f"{line}; is it another release? --allow-unrelated takes the difference all the same")
    return problems, notes


def kinship(one: Checkpoint, two: Checkpoint) -> tuple[float | None, int]:
    """The median cosine between matrices in the blocks of two models, and how many numbers were compared.

    A sample of each of a few matrices is read. The median, so that a few outliers do not decide. None where there is
    nothing to compare, or only NaN and Inf, which the work itself refuses.
    """
    return _compare(*_samples_of(one, two))


def _kinships(pairs: Sequence[_Pair]) -> Iterator[tuple[_Pair, tuple[float | None, int]]]:
    """Each pair with its `kinship`; a server is asked for the samples of several before the first is waited for."""
    for first in range(0, len(pairs), _AT_ONCE):
        some = pairs[first : first + _AT_ONCE]
        every = [_samples_of(one, two) for _, one, _, two in some]
        yield from ((pair, _compare(*samples)) for pair, samples in zip(some, every, strict=True))


def _samples_of(one: Checkpoint, two: Checkpoint) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
    """Samples of matrices that meet, of each model; all are asked for."""
    names = counterparts(one, two)
    matrices = [
        (name, other)
        for name, other in names.items()
        if one.part(name).layer is not None and len(one.info(name).shape) > 1
        and one.info(name).shape == two.info(other).shape and is_number(one, name) and is_number(two, other)
    ]  # fmt: skip
    chosen = matrices[:: -(-len(matrices) // _MATRICES) or 1]
    return _samples(one, [name for name, _ in chosen]), _samples(two, [name for _, name in chosen])


def _compare(some: Iterator[torch.Tensor], others: Iterator[torch.Tensor]) -> tuple[float | None, int]:
    cosines, count = [], 0
    with one_thread_each():  # short products: threads would wait for each other longer than they compute
        for a, b in zip(some, others, strict=True):
            cosines.append(float(a @ b / ((a @ a) * (b @ b)).sqrt()))
            count += len(a)
    cosines = [cosine for cosine in cosines if isfinite(cosine)]
    return (median(cosines) if cosines else None), count


def _samples(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[torch.Tensor]:
    """The first numbers of some tensors, in float64; all are asked for before the first is waited for."""
    sources = [(Stored("", checkpoint, name), min(checkpoint.info(name).elements, _ELEMENTS)) for name in names]
    for source, count in sources:
        if source.remote is not None:
            source.prefetch(0, count)
    for file in {id(file): file for source, _ in sources if (file := source.remote) is not None}.values():
        file.send()
    return (_first(source, count) for source, count in sources)


def _first(source: Stored, count: int) -> torch.Tensor:
    values = torch.empty(count, dtype=source.dtype)
    source.read(0, count, as_bytes(values))
    return values.double()


def _shape(config: Mapping[str, Any]) -> ModelConfig | None:
    """What config.json means; None where its family is not known, or does not read it."""
    try:
        family = find(config)
        return family.read_config(config) if family else None
    except CheckpointError:
        return None


def _differing(one: ModelConfig, two: ModelConfig, names: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ; those of rotary positions, experts and the like by themselves."""
    result: dict[str, tuple[Any, Any]] = {}
    for name in sorted(names):
        a, b = getattr(one, name), getattr(two, name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            pairs = {f"{name}_{f.name}": (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)}
            result |= {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        elif a != b:
            result[name] = (a, b)
    return result


def _rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions of a family that is not known, in one spelling: `rope_theta`, `rope_factor`, ..."""
    nested = config.get("rope_scaling") or config.get("rope_parameters") or {}  # where both stand, the former counts
    fields: dict[str, Any] = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    for key, value in nested.items() if isinstance(nested, Mapping) else ():
        if isinstance(value, Mapping):  # one set for each kind of layer
            fields |= {f"rope_{key}_{name}": number for name, number in value.items()}
        elif value is not None and (key, value) not in (("rope_type", "default"), ("type", "default")):
            name = "type" if key == "rope_type" else key.removeprefix("rope_")
            fields[f"rope_{name}"] = value
    return fields


def _plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:,.0f}"
    return "not there" if value is None else str(value)


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
