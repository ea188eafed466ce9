"""A model folder as one GGUF file, tensor by tensor: what llama.cpp, Ollama and all that is built on them load.

The tokenizer is proved before a weight is read, and once more on the file as it lies on the disk. The file appears
whole or not at all. Memory is that of the tokenizer and of one piece of one tensor. Leaves out models that llama.cpp
does not have, and classifiers.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import check_file, check_space, commit_file
from lapis.errors import CheckpointError, ConfigError
from lapis.families import Family, ModelConfig
from lapis.families.gguf import Gguf
from lapis.formats.gguf.header import TENSOR_TYPES, read_gguf
from lapis.formats.gguf.keys import layout_of, rope_factors, write_keys
from lapis.formats.gguf.library import Array, TensorType, gguf_library, quantized
from lapis.formats.gguf.tensors import ROPE_FACTORS, PlacedTensor, place_tensors, rows_of_folder
from lapis.formats.ollama import modelfile
from lapis.formats.rounding import Tell, check_text, measure_rounding
from lapis.formats.vocabulary.proof import Proof, choose_fields, prove
from lapis.formats.vocabulary.reading import FileTokenizer, read_file_vocabulary
from lapis.formats.vocabulary.writing import vocabulary_fields
from lapis.model.check import plan_load
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.fuse.opening import open_model
from lapis.wording import format_count

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0",
              "q5_1": "MOSTLY_Q5_1", "q4_0": "MOSTLY_Q4_0", "tq2_0": "MOSTLY_TQ2_0"}  # fmt: skip
BLOCKS = {name: (block, width) for name, block, width in TENSOR_TYPES.values()}
VOCABULARY = ("embed", "head")  # matrices with a row for each token, on which few bits show most
WHOLE = ("embed.position", "embed.types", "mlp.router", "mlp.shared_gate", "delta.conv")  # added to others, or few
HALF_MOST = 65504.0  # the largest float16


@dataclass
class ExportResult:
    """What an export did.

    Attributes:
        out: The file.
        type: Of most of its matrices.
        bytes: Of the file.
        seconds: That it took.
        tokenizer: The proof.
        types: Tensor type -> how many tensors have it.
        modelfile: Where Ollama's file is, if one was asked for.
        notes: What a reader should know.
        bits_per_byte: Of the model before and after, where a text was given.
    """

    out: str
    type: str
    bytes: int
    seconds: float
    tokenizer: Proof
    types: dict[str, int]
    modelfile: str | None = None
    notes: list[str] = field(default_factory=list)
    bits_per_byte: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tokenizer": self.tokenizer.to_json()}


def export_gguf(
    model: Checkpoint | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: TensorType = "bf16",
    ollama: bool = False,
    text: Path | str | None = None,
    overwrite: bool = False,
    progress: Tell | None = None,
) -> ExportResult:
    """Writes a model as a GGUF file.

    Args:
        model: A folder, or a model of the hub.
        out: The file.
        type: Of the matrices. Vectors are float32; with q5_1 and q4_0 embedding and head are q8_0, with tq2_0 (which is
            for weights of three values) float16.
        ollama: Also write a Modelfile beside it.
        text: Text on which bits per byte are measured, before and after.
        overwrite: Replace files that exist.
        progress: Called with what is done, what there is to do, and what it is.

    Raises:
        CheckpointError: For a folder that cannot be trusted, or a tokenizer that the format has no words for.
        ConfigError: For a model that llama.cpp does not have or computes otherwise, or a type that it cannot have.
        OutputError: Where the file cannot be written.
        MissingExtra: Where the gguf library is not installed.
    """
    started = time.perf_counter()
    gguf_library()
    if type not in FILE_TYPES:
        raise ConfigError(f'export: type is "{type}"; known: {", ".join(FILE_TYPES)}')
    place = Path(os.path.abspath(out))
    beside = place.with_name("Modelfile")
    for path in (place, beside) if ollama else (place,):
        check_file(path, overwrite=overwrite, option="--gguf")
    checkpoint = open_model(model)
    plan = plan_load(checkpoint)
    notes = [*checkpoint.notes, *plan.notes]
    config = _encoder(plan.config, checkpoint, notes)
    family = checkpoint.runs
    assert family is not None
    if text is not None:
        check_text(config)
    try:
        layout = layout_of(config, family)
        keys = write_keys(config, layout, notes)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.source}: {error}") from None
    tokenizer = Tokenizer.open(checkpoint)
    encode = lambda texts, special: tokenizer.encode_batch(texts, special)  # noqa: E731
    candidates = list(vocabulary_fields(tokenizer, config.vocab, notes))
    fields, _ = choose_fields(candidates, encode, tokenizer.source)
    del candidates
    placed = place_tensors(family, layout, config)
    kinds = _types_of(placed, type, checkpoint.source, notes)
    head_dim = config.head_dim if config.uneven is None else config.uneven.head_dim
    factors = rope_factors(config.rope, head_dim, config.context) if config.positions == "rotary" else None
    total = sum(_nbytes(tensor, kinds[tensor.file_name]) for tensor in placed)
    if layout.arch == "bert":  # which has one where there are none
        fields = {**fields, "tokenizer.ggml.token_type_count": max(config.types, 1)}
    if tokenizer.chat_template:
        fields = {**fields, "tokenizer.chat_template": tokenizer.chat_template}
    checkpoint = checkpoint.fetched()
    places = _places(checkpoint, family, config)
    lists = list_keys(family, layout, config, lambda name: float(checkpoint.read(places[name][0]).float()))
    fields = {**fields, **lists}
    check_space(place, total)
    with ExitStack() as stack:
        temporary = stack.enter_context(commit_file(place, overwrite=overwrite))
        writer = _begin(temporary, layout, checkpoint, {**_general(type), **_prefixed(layout, keys), **fields})
        for tensor in placed:
            _announce(writer, tensor, kinds[tensor.file_name])
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        _write(writer, temporary, placed, kinds, factors,
               lambda tensor: _packed(checkpoint, [places[n] for n in tensor.names], tensor, kinds[tensor.file_name]),
               lambda done: progress(done, total, "writing") if progress else None)  # fmt: skip
        file = read_gguf(temporary)
        proof = prove(encode, FileTokenizer(read_file_vocabulary(file.fields)), tokenizer.source)
        if ollama:
            settings = checkpoint.json("generation_config.json")
            recipe = modelfile(place.name, tokenizer, config, settings, notes)
            stack.enter_context(commit_file(beside, overwrite=overwrite)).write_text(recipe, encoding="utf-8")
        bits = None if text is None else measure_rounding(checkpoint, temporary, placed, text, progress)
    counts: dict[str, int] = {}
    for info in file.tensors.values():
        counts[info.type] = counts.get(info.type, 0) + 1
    return ExportResult(
        str(out), type, file.size, time.perf_counter() - started, proof, counts, str(beside) if ollama else None, notes,
        bits,
    )  # fmt: skip


def rule_name(checkpoint: Checkpoint, name: str) -> str | None:
    """The name that transformers gives to a tensor of the folder, as `Family.required` lists it."""
    inner = checkpoint.text_name(name)
    return None if inner is None or checkpoint.runs is None else checkpoint.runs.canonical(inner)


def _places(checkpoint: Checkpoint, family: Family, config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Each tensor's name as transformers gives it -> that in the folder, and at which of its numbers it begins there.

    It begins elsewhere than at 0 where the folder has one tensor for what all experts have.
    """
    spelled = {known: name for name in checkpoint.names if (known := rule_name(checkpoint, name)) is not None}
    places = {name: (own, 0) for name, own in spelled.items()}
    experts, shapes = config.experts.count if config.experts else 0, family.parameter_shapes(config)
    for rule in family.rules:
        stacked = rule.of_all(experts)
        for layer, kind in enumerate(config.kinds if stacked is not rule and experts else ()):
            begin = 0
            for name in stacked.names if family.disk_name(rule, layer) in spelled else ():
                disk_name = family.disk_name(*family.rule_for(name.replace("{layer}", str(layer))))
                places[disk_name] = spelled[family.disk_name(rule, layer)], begin
                begin += math.prod(shapes[name.replace("{layer}", str(kind))])
    return places


def list_keys(
    family: Family, layout: Gguf, config: ModelConfig, read: Callable[[str], float]
) -> dict[str, list[float]]:
    """Keys that hold a number of each layer, which a folder has as tensors; none begins with the architecture's name.

    Args:
        family: Of the model.
        layout: Of the file.
        config: Of the model.
        read: The number in a tensor, by the name that transformers gives it.
    """
    rules = {rule.component: rule for rule in family.rules if rule.component in layout.lists}
    return {
        key: [read(family.disk_name(rules[component], layer)) for layer in range(config.layers)]
        for component, key in layout.lists.items()
    }


def _encoder(config: ModelConfig, checkpoint: Checkpoint, notes: list[str]) -> ModelConfig:
    """The model without a head that a GGUF file has no place for, which is said."""
    layout = checkpoint.runs.gguf.get(config.family) if checkpoint.runs else None
    if layout is None:
        return config
    if config.head in layout.inner:
        notes.append(f"the {config.head} head is left out: llama.cpp runs {config.family} for embeddings")
        return replace(config, head="none", pooler=False)
    if config.pooler:
        notes.append("the pooler is left out: llama.cpp pools by itself")
        return replace(config, pooler=False)
    return config


def _types_of(placed: list[PlacedTensor], type: TensorType, source: str, notes: list[str]) -> dict[str, str]:
    """File name -> tensor type. What cannot have the type that was asked for has the nearest that it can."""
    own = type.upper()
    matrices = [
        tensor for tensor in placed
        if len(tensor.shape) > 1 and tensor.component not in WHOLE and not tensor.file_name.endswith(".bias")
    ]  # fmt: skip
    for_words = {"Q5_1": "Q8_0", "Q4_0": "Q8_0", "TQ2_0": "F16"}.get(own, own)
    kinds = {tensor.file_name: "F32" for tensor in placed}
    fallen: dict[str, int] = {}
    for tensor in matrices:
        kind = for_words if tensor.component in VOCABULARY else own
        if tensor.columns % BLOCKS[kind][0]:
            kind = "Q8_0" if tensor.columns % 32 == 0 else "F16"
            fallen[kind] = fallen.get(kind, 0) + 1
        kinds[tensor.file_name] = kind
    if not any(kind == own for kind in kinds.values()):
        columns = ", ".join(sorted({str(tensor.columns) for tensor in matrices}))
        raise ConfigError(
            f"{source}: no matrix can be {type}, whose blocks hold {BLOCKS[own][0]} numbers: rows have {columns}; "
            "take another --type"
        )
    for kind, count in fallen.items():
        what = format_count(count, f"matrix is {kind.lower()}: its", f"matrices are {kind.lower()}: their")
        notes.append(f"{what} rows are no multiple of {BLOCKS[own][0]} numbers")
    return kinds


def _nbytes(tensor: PlacedTensor, kind: str) -> int:
    block, width = BLOCKS[kind]
    return tensor.rows * tensor.columns // block * width


def _general(type: TensorType) -> dict[str, Any]:
    library = gguf_library()
    return {"general.type": "model", "general.file_type": int(library.LlamaFileType[FILE_TYPES[type]]),
            "general.quantization_version": int(library.GGML_QUANT_VERSION)}  # fmt: skip


def _prefixed(layout: Gguf, keys: dict[str, Any]) -> dict[str, Any]:
    return {f"{layout.arch}.{key}": value for key, value in keys.items()}


def _begin(path: Path, layout: Gguf, checkpoint: Checkpoint, fields: dict[str, Any]) -> Any:
    """The library's writer with all fields in it."""
    writer = gguf_library().GGUFWriter(path, layout.arch)
    writer.add_name(Path(os.path.abspath(checkpoint.source)).name if checkpoint.snapshot is None else checkpoint.source)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, value)
    return writer


def _announce(writer: Any, tensor: PlacedTensor, kind: str) -> None:
    library = gguf_library()
    writer.add_tensor_info(
        tensor.file_name, tensor.shape, library.quants.np.dtype("float32"), _nbytes(tensor, kind),
        raw_dtype=library.GGMLQuantizationType[kind],
    )  # fmt: skip


def _write(
    writer: Any,
    path: Path,
    placed: list[PlacedTensor],
    kinds: dict[str, str],
    factors: Array | None,
    packed: Callable[[PlacedTensor], Iterator[Array]],
    tell: Callable[[int], None],
) -> None:
    """Header by the library; then the data, piece by piece, which it would want whole."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    done = 0
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % writer.data_alignment))
        for tensor in placed:
            for piece in packed(tensor):
                file.write(piece.data)
                done += piece.nbytes
                tell(done)
            file.write(bytes(-_nbytes(tensor, kinds[tensor.file_name]) % writer.data_alignment))
        if factors is not None:
            file.write(factors.data)
            file.write(bytes(-factors.nbytes % writer.data_alignment))


def _packed(checkpoint: Checkpoint, places: list[tuple[str, int]], tensor: PlacedTensor, kind: str) -> Iterator[Array]:
    """A tensor's rows as the file holds them, piece by piece."""
    for first, last in tensor.pieces():
        values = rows_of_folder(checkpoint, places, tensor, first, last)
        name = places[first * len(places) // tensor.rows][0]
        largest = float(max(values.max(), -values.min()))
        if not math.isfinite(largest):
            raise CheckpointError(f"{checkpoint.source}: {name} holds NaN or Inf; look at how the model was trained")
        if kind in ("F16", "Q8_0", "Q5_1", "Q4_0", "TQ2_0") and largest > HALF_MOST:
            raise ConfigError(
                f"{checkpoint.source}: {name} holds {largest:g}, beyond what {kind.lower()} can; take --type bf16"
            )
        if kind == "BF16":  # as the library rounds, and without its tables
            yield torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()
        else:
            yield quantized(values.reshape(-1, tensor.columns), kind)
