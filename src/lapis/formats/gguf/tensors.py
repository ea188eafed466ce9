"""Which tensor of a folder is which in a GGUF file, and how its numbers lie there.

The names are the gguf library's table. The numbers differ in four ways, each undone when a file is read: rows of q and
k of Llama (families/gguf.py, `permuted`); matrices of GPT-2, which folders hold transposed; norms of Gemma, which
folders keep around 0; and vectors, which are float32 whatever the file's type is. What each expert has is stacked. A
family may say more (`FileTensor`): heads of a delta net in another order. Rows come in pieces of whole heads, so that
no matrix is held twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families import Family, ModelConfig, Rule
from lapis.families.gguf import FileTensor, Gguf, Runs
from lapis.formats.gguf.header import GgufFile
from lapis.formats.gguf.library import Array, dequantized, gguf_library

PIECE = 1 << 22  # numbers that are held as float32 at a time
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor in both places.

    Attributes:
        names: On disk, as transformers writes them; several where the file stacks what each expert has.
        file_name: In the GGUF file.
        shape: In the file, rows first.
        heads: For q and k whose rows are reordered within each head: how many heads; else 0.
        transposed: The folder has its inputs first.
        offset: Added in the file.
        by_head: For a matrix that holds q, k and v of one head after those of another: how many heads. The file has all
            of q first.
        component: Of the family's table.
        stacked: For one matrix of each expert, of a tensor that stacks them with inputs first and interleaves several:
            (experts, which of them, how many are interleaved).
        before: Rows of the folder's tensor that come before those of the file (RoBERTa's positions of padding).
        row_runs: The folder's rows in the order of the file; () = as they are.
        column_runs: The same of columns.
        parameter: Which of the parameters that the folder's tensor holds it is; None = all that there is.
        negative_exp: The file has -exp(x).
    """

    names: tuple[str, ...]
    file_name: str
    shape: tuple[int, ...]
    heads: int
    transposed: bool
    offset: float
    component: str
    by_head: int = 0
    stacked: tuple[int, int, int] = (0, 0, 1)
    before: int = 0
    row_runs: Runs = ()
    column_runs: Runs = ()
    parameter: int | None = None
    negative_exp: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    def pieces(self) -> Iterator[tuple[int, int]]:
        """[first, last) of rows that are worked on together: whole heads, or as many as PIECE holds."""
        unit = self.rows // self.heads if self.heads and len(self.shape) > 1 else 1
        whole = self.rows // max(len(self.names), self.stacked[0] if len(self.shape) > 2 else 1)  # one expert's
        step = self.rows if self.transposed or self.by_head else max(1, PIECE // (self.columns * unit)) * unit
        for start in range(0, self.rows, whole):
            for first in range(start, start + whole, step):
                yield first, min(first + step, start + whole)


def place_tensors(family: Family, layout: Gguf, config: ModelConfig) -> list[PlacedTensor]:
    """Every tensor of a model of this shape, in the order of the family's table, layer by layer."""
    library = gguf_library()
    arch = next(arch for arch, name in library.MODEL_ARCH_NAMES.items() if name == layout.arch)
    names = library.get_tensor_name_map(arch, config.layers)
    placed: list[PlacedTensor] = []
    experts: dict[str, list[str]] = {}
    for name, shape in family.required(config).items():
        matched = family.match(name)
        assert matched is not None
        rule = matched[0]
        if rule.component in layout.lists:
            continue
        if rule.component in layout.interleaved:
            placed += _of_stack(names, name, rule, layout.interleaved[rule.component], shape, matched[1])
            continue
        common = name if rule.expert is None else name.replace(f".experts.{rule.expert}.", ".experts.")
        file_name = names.get_name(common, try_suffixes=(".weight", ".bias")) or names.get_name(
            common.removeprefix(family.prefix), try_suffixes=(".weight", ".bias")
        )
        if file_name is not None and not file_name.endswith((".weight", ".bias")):
            file_name += ".weight"
        if rule.component in layout.files:
            file_name = layout.files[rule.component].replace("{layer}", str(matched[1]))
        if (several := layout.tensors.get(rule.component)) is not None:
            placed += [_of_file_tensor(one, name, file_name, rule, shape, config, matched[1]) for one in several]
            continue
        if file_name is None:
            raise CheckpointError(f"{name} has no place in a GGUF file of {layout.arch}")
        if rule.expert is not None:
            experts.setdefault(file_name, []).append(name)
            if rule.expert + 1 < (config.experts.count if config.experts else 0):
                continue
            shape = (rule.expert + 1, *shape)
        heads = {"attn.q": config.heads, "attn.k": config.kv_heads}.get(rule.component, 0) if layout.permuted else 0
        before = config.first_position if rule.component == "embed.position" else 0
        shape = (shape[0] - before, *shape[1:])
        flipped = rule.transform.transposed and len(shape) == 2
        placed.append(
            PlacedTensor(
                tuple(experts.get(file_name, [name])), file_name, shape[::-1] if flipped else shape, heads, flipped,
                layout.norm_offset if _is_norm(rule) else 0.0, rule.component,
                config.heads if rule.transform.by_head else 0, before=before,
            )
        )  # fmt: skip
    return placed


def _of_stack(
    names: Any, name: str, rule: Rule, parts: tuple[str, ...], shape: tuple[int, ...], layer: int | None
) -> list[PlacedTensor]:
    """The matrices that one tensor of the folder stacks, for each expert; or their biases."""
    stem = f"model.layers.{layer}.mlp.experts."
    experts, (*inputs, outputs) = shape[0], shape[1:]
    return [
        PlacedTensor(
            (name,), f"{names.get_name(stem + part)}.{rule.kind}", (experts, outputs // len(parts), *inputs), 0, False,
            0.0, rule.component, stacked=(experts, number, len(parts)),
        )
        for number, part in enumerate(parts)
    ]  # fmt: skip


def _of_file_tensor(
    one: FileTensor, name: str, file_name: str | None, rule: Rule, shape: tuple[int, ...], config: ModelConfig,
    layer: int | None,
) -> PlacedTensor:  # fmt: skip
    """One of the tensors that a family says how to make. A dimension of 1 between others is left out."""
    rows, columns = (() if runs is None else runs(config) for runs in (one.rows, one.columns))
    shape = (shape[0], *(n for n in shape[1:-1] if n > 1), *shape[1:][-1:])
    if rows:
        shape = (sum(last - first for first, last in rows), *shape[1:])
    return PlacedTensor(
        (name,), one.file.replace("{layer}", str(layer)) or str(file_name), shape, 0, False, 0.0, rule.component,
        row_runs=rows, column_runs=columns, parameter=one.parameter, negative_exp=one.negative_exp,
    )  # fmt: skip


def _is_norm(rule: Rule) -> bool:
    return rule.kind == "weight" and ("norm" in rule.component)


def rows_of_folder(
    checkpoint: Checkpoint, places: Sequence[tuple[str, int]], placed: PlacedTensor, first: int, last: int
) -> Array:
    """Rows [first, last) as the file has them, float32 [rows, columns].

    Args:
        checkpoint: The folder.
        places: For each name of `placed`, the tensor that has it as the folder spells it, and the number there at which
            it begins (folders may stack experts).
        placed: The tensor.
        first, last: Of the file's rows.
    """
    names = [name for name, _ in places]
    count, which, step = placed.stacked
    if count and len(placed.shape) == 2:  # a bias of each expert
        flat = checkpoint.read_range(names[0], 0, count * placed.columns * step).float().numpy()
        return np.ascontiguousarray(flat.reshape(count, -1)[first:last, which::step])
    if count:
        outputs = placed.shape[1]
        expert, first = divmod(first, outputs)
        size = placed.columns * outputs * step
        flat = checkpoint.read_range(names[0], expert * size, (expert + 1) * size).float().numpy()
        matrix = flat.reshape(placed.columns, -1)[:, which::step].T
        return np.ascontiguousarray(matrix[first : last - expert * outputs])
    expert, first = divmod(first, placed.rows // len(names))
    name, last = names[expert], last - expert * (placed.rows // len(names))
    if placed.by_head:
        values = checkpoint.read(name).float().numpy()
        swapped = values.reshape(placed.by_head, 3, -1).swapaxes(0, 1)
        return np.ascontiguousarray(swapped).reshape(placed.rows, placed.columns)
    if placed.transposed:
        return np.ascontiguousarray(checkpoint.read(name).float().numpy().T[first:last])
    width, start = placed.columns, places[expert][1]
    spans = _within(placed.row_runs, first, last) or [(first + placed.before, last + placed.before)]
    parts = [checkpoint.read_range(name, start + f * width, start + t * width).float().numpy() for f, t in spans]
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if placed.heads and len(placed.shape) == 1:  # a bias of q or k: one number for each row
        return _interleaved(flat.reshape(-1, 1), placed.heads).reshape(1, -1)
    values = flat.reshape(last - first, width)
    if placed.heads:
        values = _interleaved(values, placed.heads * (last - first) // placed.rows)
    if placed.column_runs:
        values = np.ascontiguousarray(values[:, _indices(placed.column_runs)])
    if placed.negative_exp:
        values = -np.exp(values)
    return values + np.float32(placed.offset) if placed.offset else values


def _within(runs: Runs, first: int, last: int) -> list[tuple[int, int]]:
    """The parts of runs that [first, last) of what they are together covers."""
    spans, before = [], 0
    for begin, end in runs:
        left, right = max(first - before, 0), min(last - before, end - begin)
        if left < right:
            spans.append((begin + left, begin + right))
        before += end - begin
    return spans


def _indices(runs: Runs) -> Array:
    return np.concatenate([np.arange(first, last) for first, last in runs])


def _inverse(runs: Runs) -> Runs:
    """For runs that are all of a tensor in another order: those that give the first order again."""
    places, before = [], 0
    for first, last in runs:
        places.append((first, before, before + last - first))
        before += last - first
    return tuple((begin, end) for _, begin, end in sorted(places))


def rows_of_file(file: GgufFile, placed: PlacedTensor, first: int, last: int) -> Array:
    """Rows [first, last) of a tensor of the file, float32 [rows, columns], in the folder's order but not transposed."""
    tensor = file.tensors[placed.file_name]
    runs = () if placed.parameter is not None else _inverse(placed.row_runs)
    spans = _within(runs, first, last) or [(first, last)]
    values = dequantized(np.concatenate([file.read(tensor, *span) for span in spans]), tensor.type)
    if placed.column_runs:
        values = values[:, _indices(_inverse(placed.column_runs))]
    if placed.negative_exp:
        values = np.log(-values)
    if placed.heads and len(placed.shape) == 1:
        return _halved(values.reshape(-1, 1), placed.heads).reshape(1, -1)
    if placed.heads:
        values = _halved(values, placed.heads * (last - first) // placed.rows)
    if placed.by_head:
        values = values.reshape(3, placed.by_head, -1).swapaxes(0, 1).reshape(values.shape)
    return values - np.float32(placed.offset) if placed.offset else values


def _interleaved(rows_RC: Array, heads: int) -> Array:
    """Within each head, row i of the first half and row i of the second become neighbors."""
    width = rows_RC.shape[1]
    return rows_RC.reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(-1, width)


def _halved(rows_RC: Array, heads: int) -> Array:
    """The reverse of `_interleaved`."""
    width = rows_RC.shape[1]
    return rows_RC.reshape(heads, -1, 2, width).swapaxes(1, 2).reshape(-1, width)
