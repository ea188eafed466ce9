"""A GGUF file as a model folder: config, tokenizer, template, settings, and weights that were rounded once.

The header is checked before anything is believed (gguf/header.py), every tensor is accounted for before one is read,
and the tokenizer is proved to give llama.cpp's ids. The library dequantizes, piece by piece. Leaves out files of
several parts, mixtures of experts, and architectures that lapis does not run.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lapis.checkpoint.commit import commit
from lapis.checkpoint.tensor_file import dtype_name, header_bytes
from lapis.errors import CheckpointError, ConfigError
from lapis.families import Family, ModelConfig
from lapis.families.config import CLASS_FIELDS
from lapis.formats.gguf.header import GgufFile, read_gguf
from lapis.formats.gguf.keys import read_shape
from lapis.formats.gguf.library import WHOLE, gguf_library
from lapis.formats.gguf.tensors import ROPE_FACTORS, PlacedTensor, place_tensors, rows_of_file
from lapis.formats.vocabulary.proof import Proof, prove
from lapis.formats.vocabulary.reading import FileTokenizer, FileVocabulary, read_file_vocabulary
from lapis.formats.vocabulary.rebuilding import rebuild_tokenizer
from lapis.model.load import SHARD_BYTES, config_json
from lapis.text.tokenizer.folder import write_json

ACCOUNT = "lapis-import.json"
IGNORED = ("rope_freqs.weight", "pooler.weight", "pooler.bias")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
Progress = Callable[[int, int], None]


@dataclass
class ImportResult:
    """What an import did.

    Attributes:
        out: The folder.
        type: Tensor types of the file, the one of most bytes first.
        dtype: Of the weights in the folder.
        bytes: Of these.
        seconds: That it took.
        tokenizer: The proof.
        notes: What a reader should know.
    """

    out: str
    type: str
    dtype: str
    bytes: int
    seconds: float
    tokenizer: Proof
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tokenizer": self.tokenizer.to_json()}


def import_gguf(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Literal["bf16", "f16", "f32"] = "bf16",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImportResult:
    """Writes what a GGUF file holds as a model folder that everything here, and transformers, loads.

    Args:
        file: A .gguf file.
        out: A new folder.
        dtype: Of the weights that are written. f32 keeps exactly what the file says.
        overwrite: Swap an existing folder for the new one, whole.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: For a file that is damaged, holds an architecture that lapis does not run, lacks a tensor, or
            whose tokenizer cannot be rebuilt with the same ids.
        OutputError: Where the folder cannot be written.
        MissingExtra: Where the gguf library is not installed.
    """
    started = time.perf_counter()
    opened = read_gguf(file)
    gguf_library()
    if dtype not in DTYPES:
        raise ConfigError(f'import: dtype is "{dtype}"; known: {", ".join(DTYPES)}')
    config, family, layout = read_shape(opened)
    placed = place_tensors(family, layout, config)
    _check_tensors(opened, placed, config)
    notes: list[str] = []
    try:
        vocabulary = read_file_vocabulary(opened.fields)
        reader = FileTokenizer(vocabulary)
        tokenizer = rebuild_tokenizer(vocabulary, opened.fields, str(file), notes)
        tokenizer.check_rows(config.vocab)
        proof = prove(tokenizer.encode_batch, reader, str(file))
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None
    config = replace(config, extra=_token_ids(vocabulary))
    kind, kinds = DTYPES[dtype], _types(opened)
    notes += _roundings(kinds, dtype)
    if config.experts is not None:
        notes.append("the file says no coefficient of a balance loss; router_aux_loss_coef is 0")
    nbytes = sum(tensor.rows * tensor.columns for tensor in placed) * kind.itemsize
    with commit(os.fspath(out), kind="import", overwrite=overwrite, needs_bytes=nbytes, inputs=[Path(file)]) as staging:
        folder = staging.path
        write_json(folder / "config.json", _config_json(config, family, kind))
        write_json(folder / "generation_config.json", _generation(vocabulary))
        tokenizer.save(folder)
        account = {"from": Path(file).name, "bytes": opened.size, "types": kinds, "dtype": dtype,
                   "tokenizer": proof.to_json(), "notes": notes}  # fmt: skip
        write_json(folder / ACCOUNT, account)
        done = 0
        for written in _write_weights(folder, opened, placed, kind):
            done += written
            if progress:
                progress(done, nbytes)
    return ImportResult(str(out), ", ".join(kinds), dtype, nbytes, time.perf_counter() - started, proof, notes)


def _check_tensors(file: GgufFile, placed: list[PlacedTensor], config: ModelConfig) -> None:
    """Every tensor is there, has the shape that the keys say, and none is left over."""
    problems = []
    for tensor in placed:
        actual = file.tensors.get(tensor.file_name)
        if actual is None:
            problems.append(f"{tensor.file_name} is missing")
        elif actual.shape != tensor.shape:
            shapes = ["x".join(map(str, shape)) for shape in (actual.shape, tensor.shape)]
            problems.append(f"{tensor.file_name} is {shapes[0]} but {shapes[1]} by the file's keys")
    known = {tensor.file_name for tensor in placed} | {ROPE_FACTORS, *IGNORED}
    problems += [f"{name} is not a tensor of {config.family}" for name in file.tensors if name not in known]
    if problems:
        more = f" ... and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{file.path}: {'; '.join(problems[:6])}{more}")


def _types(file: GgufFile) -> dict[str, int]:
    """Tensor type -> how many tensors, the type of most bytes first."""
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
        counts[tensor.type] = counts.get(tensor.type, 0) + 1
    return {kind: counts[kind] for kind in sorted(sizes, key=lambda kind: -sizes[kind])}


def _roundings(kinds: dict[str, int], dtype: str) -> list[str]:
    rounded = [kind for kind in kinds if kind not in WHOLE]
    if not rounded:
        return []
    again = "" if dtype == "f32" else f", and once more to {dtype} here (--dtype f32 does not)"
    return [f"these weights were rounded to {', '.join(rounded)} when the file was made{again}"]


def _token_ids(vocabulary: FileVocabulary) -> dict[str, Any]:
    roles = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {name: vocabulary.named[role] for role, name in roles.items() if role in vocabulary.named}


def _config_json(config: ModelConfig, family: Family, kind: torch.dtype) -> dict[str, Any]:
    try:
        written = config_json(config, kind)
    except ConfigError as error:
        raise CheckpointError(f"a folder of {family.name} cannot say this model: {error}") from None
    return {name: value for name, value in written.items() if name not in CLASS_FIELDS}


def _generation(vocabulary: FileVocabulary) -> dict[str, Any]:
    """What ends a reply, and the other ids that generation asks for."""
    named = vocabulary.named
    ends = list(dict.fromkeys(named[role] for role in ("eos", "eot", "eom") if role in named))
    settings: dict[str, Any] = {}
    if "bos" in named:
        settings["bos_token_id"] = named["bos"]
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if "padding" in named:
        settings["pad_token_id"] = named["padding"]
    return settings


def _write_weights(folder: Path, file: GgufFile, placed: list[PlacedTensor], kind: torch.dtype) -> Iterator[int]:
    """The weights as safetensors, in several files where they are large; yields bytes as they are written."""
    shards: list[list[PlacedTensor]] = [[]]
    room = SHARD_BYTES
    for tensor in placed:
        nbytes = tensor.rows * tensor.columns * kind.itemsize
        if nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= nbytes
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        shapes = {name: (dtype_name(kind), shape) for t in shard for name, shape in _on_disk(t).items()}
        with (folder / name).open("wb") as target:
            target.write(header_bytes(shapes, {"format": "pt"}))
            for tensor in shard:
                for first, last in tensor.pieces():
                    raw = _piece(file, tensor, first, last, kind)
                    target.write(raw)
                    yield len(raw)
    if len(shards) > 1:
        weight_map = {own: name for name, shard in zip(names, shards, strict=True) for t in shard for own in t.names}
        total = sum(t.rows * t.columns for t in placed) * kind.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _on_disk(tensor: PlacedTensor) -> dict[str, tuple[int, ...]]:
    """The tensors of the folder that one of the file is, with their shapes: one of each expert where it stacks them."""
    shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
    return {tensor.name: shape} if len(tensor.names) == 1 else dict.fromkeys(tensor.names, shape[1:])


def _piece(file: GgufFile, tensor: PlacedTensor, first: int, last: int, kind: torch.dtype) -> memoryview:
    """Rows [first, last) in the folder's dtype and order, as bytes."""
    values = torch.from_numpy(rows_of_file(file, tensor, first, last).copy())
    largest = float(values.abs().max())
    if not math.isfinite(largest):
        raise CheckpointError(f"{file.path}: {tensor.file_name} holds NaN or Inf; fetch the file again")
    if kind == torch.float16 and largest > torch.finfo(torch.float16).max:
        raise ConfigError(f"{file.path}: {tensor.file_name} holds {largest:g}, beyond float16; take --dtype bf16")
    values = values.t() if tensor.transposed else values
    return values.to(kind).contiguous().view(-1).view(torch.uint8).numpy().data
