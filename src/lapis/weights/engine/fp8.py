"""FP8 weights with known scales: read as the float32 numbers that they stand for.

Two layouts are known. Block scales (DeepSeek, Qwen3-FP8): `NAME_scale_inv` holds one factor for each block of
quantization_config.weight_block_size (128 x 128) elements. Tensor or row scales (compressed-tensors): `NAME_scale`
holds one factor, or one per row. Both multiply. Whole-number formats (GPTQ, AWQ, bitsandbytes) are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.tensor_file import torch_dtype

FP8 = ("F8_E4M3", "F8_E5M2")
COMPUTABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ENDINGS = ("_scale_inv", "_scale")
_UNUSED = (".input_scale", ".activation_scale", ".output_scale")


@dataclass(frozen=True)
class Scales:
    """Factors of a matrix. values: float32 [R', C']; rows, columns: how many elements of each dimension share one."""

    values: torch.Tensor
    rows: int
    columns: int

    def apply(self, values: torch.Tensor, first: int, width: int) -> None:
        """Multiplies elements [first, first + len(values)) of a flattened matrix of `width` columns, in place."""
        done = 0
        while done < len(values):
            row, column = divmod(first + done, width)
            if column or len(values) - done < width:  # a piece of one row
                count = min(width - column, len(values) - done)
                values[done : done + count] *= self._row(row, width)[column : column + count]
            else:
                rows = min((len(values) - done) // width, self.rows - row % self.rows)
                count = rows * width
                values[done : done + count].view(rows, width).mul_(self._row(row, width))
            done += count

    def _row(self, row: int, width: int) -> torch.Tensor:
        return self.values[row // self.rows].repeat_interleave(self.columns)[:width]


def scale_name(checkpoint: Checkpoint, name: str) -> str | None:
    """The tensor that holds the scales of an FP8 tensor, where there is one that fits."""
    for ending in _ENDINGS:
        if name + ending in checkpoint.index:
            return name + ending if _grain(checkpoint, name, name + ending) else None
    return None


def is_scale(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor only holds scales of an FP8 tensor of the same model."""
    for ending in _ENDINGS:
        stem = name.removesuffix(ending)
        if stem != name and stem in checkpoint.index and checkpoint.info(stem).dtype in FP8:
            return True
    weights = [name.removesuffix(ending) + ".weight" for ending in _UNUSED if name.endswith(ending)]
    return any(weight in checkpoint.index and checkpoint.info(weight).dtype in FP8 for weight in weights)


def is_number(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor's numbers mean something: floating point, or FP8 with its scales."""
    dtype = checkpoint.info(name).dtype
    return torch_dtype(dtype) in COMPUTABLE or (dtype in FP8 and scale_name(checkpoint, name) is not None)


def read_scales(checkpoint: Checkpoint, name: str) -> Scales:
    """The scales of an FP8 tensor; `scale_name` has found them."""
    scales = scale_name(checkpoint, name)
    assert scales is not None
    grain = _grain(checkpoint, name, scales)
    assert grain is not None
    values = checkpoint.read(scales).float()
    return Scales(values.reshape(values.shape[0] if values.dim() else 1, -1), *grain)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for weights that were dequantized."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _grain(checkpoint: Checkpoint, name: str, scales: str) -> tuple[int, int] | None:
    """How many rows and columns share a factor; None where the shapes do not fit together."""
    shape, grid = checkpoint.info(name).shape, checkpoint.info(scales).shape
    if torch_dtype(checkpoint.info(scales).dtype) not in COMPUTABLE or len(shape) != 2:
        return None
    if grid in ((), (1,), (1, 1)):
        return shape
    if grid in ((shape[0],), (shape[0], 1)):
        return 1, shape[1]
    settings = checkpoint.config.get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        block = [128, 128]
    return (block[0], block[1]) if grid == tuple(ceil(n / b) for n, b in zip(shape, block, strict=True)) else None
