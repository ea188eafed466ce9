"""The gguf library, which the extra of that name brings: its writer, its names of tensors, its quantizers.

Leaves out its reader, which trusts what it reads; header.py stands for it.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np

from lapis.errors import MissingExtra

TensorType = Literal["bf16", "f16", "f32", "q8_0", "q5_1", "q4_0", "tq2_0"]
Array = np.ndarray[Any, np.dtype[Any]]
WHOLE = {"F32", "F16", "BF16"}


def gguf_library() -> ModuleType:
    """The library. Raises MissingExtra where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError:
        raise MissingExtra("gguf, which writes and reads GGUF files,", "gguf") from None


def quantized(values_RC: Array, kind: str) -> Array:
    """float32 rows as a GGUF file holds them: bytes, shape [rows, bytes of a row].

    Args:
        values_RC: float32; columns a multiple of the type's block.
        kind: "Q8_0", "F16", ...
    """
    if kind == "F32":
        return np.ascontiguousarray(values_RC, np.float32).view(np.uint8)
    if kind == "F16":
        return np.ascontiguousarray(values_RC, np.float16).view(np.uint8)
    library = gguf_library()
    packed: Array = library.quants.quantize(np.ascontiguousarray(values_RC), library.GGMLQuantizationType[kind])
    return packed


def dequantized(raw_RB: Array, kind: str) -> Array:
    """Bytes of rows as float32, shape [rows, columns]; the reverse of `quantized`."""
    if kind == "F32":
        return raw_RB.view(np.float32)
    library = gguf_library()
    values: Array = library.quants.dequantize(raw_RB, library.GGMLQuantizationType[kind])
    return values
