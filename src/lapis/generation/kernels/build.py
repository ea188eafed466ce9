"""kernels.c compiled for this processor, in a fraction of a second, and called.

Nothing is kept on the disk: the library is made in a folder of its own, loaded and deleted. It is used only where its
sums are those of torch. OpenMP is torch's own, already in the process, so both share one set of threads. Leaves out
compilers other than gcc and clang, and processors whose compiler has no OpenMP: there torch's own products serve.
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.model.threads import processor_fields

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O2", "-march=native", "-ffp-contract=fast", "-fPIC", "-fopenmp")
SECONDS = 30  # after which a compiler is given up
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of dtypes, as kernels.c has them

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "product": [_POINTER] * 5 + [_LONG] * 3 + [_INT],
    "rms_norm": [_POINTER] * 2 + [_FLOAT, _POINTER] + [_LONG] * 2,
    "attend": [_POINTER] * 3 + [_FLOAT] + [_POINTER] * 2 + [_LONG] + [_POINTER] * 2 + [_LONG] + [_POINTER] * 3
    + [_LONG, _FLOAT, _POINTER] + [_LONG] * 4 + [_INT],
}  # fmt: skip


class Kernels:
    """The functions of kernels.c for one dtype of weights and one of all else. Pointers are those of tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _ARGUMENTS.items():
            function = getattr(library, f"lapis_{name}")
            function.argtypes, function.restype = types, ctypes.c_int
        self.product = library.lapis_product
        self.rms_norm = library.lapis_rms_norm
        self.attend = library.lapis_attend


@cache
def compiled(weights: torch.dtype, others: torch.dtype) -> Kernels | None:
    """The kernels for these dtypes; None where there is no compiler that makes right ones.

    Args:
        weights: float32, bfloat16 or int8.
        others: float32 or bfloat16, of what is multiplied and of keys and values.
    """
    if os.name != "posix" or weights not in CODES or others not in (torch.float32, torch.bfloat16):
        return None
    try:
        kernels = Kernels(_compile((f"-DWEIGHT={CODES[weights]}", f"-DOTHER={CODES[others]}")))
        return kernels if _agrees(kernels, weights, others) else None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None


@cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by instructions of its own."""
    try:
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & processor_flags())
    except OSError:
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(supported and supported())


def processor_flags() -> set[str]:
    """What the processor can do; x86 calls it flags, ARM Features."""
    fields = processor_fields()
    return set((fields.get("flags") or fields.get("Features", "")).split())


def _compile(defines: tuple[str, ...]) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(prefix="lapis-") as folder:
        unlinked, library = f"{folder}/kernels.o", f"{folder}/kernels.so"
        # Linked without OpenMP: its functions are found in the process, where torch has brought them
        for command in (
            [*FLAGS, *defines, "-c", str(SOURCE), "-o", unlinked],
            ["-shared", unlinked, "-lm", "-o", library],
        ):
            subprocess.run([*compiler, *command], check=True, capture_output=True, timeout=SECONDS)
        return ctypes.CDLL(library)


def _agrees(kernels: Kernels, weights: torch.dtype, others: torch.dtype) -> bool:
    """Whether a small product is torch's within rounding, for a row alone and for several, on several threads too."""
    generator = torch.Generator().manual_seed(0)
    weight_NI = (torch.randn(19, 128, generator=generator) * 9).to(weights)
    x_BI = torch.randn(7, 128, generator=generator).to(others)
    y_BN = torch.full((7, 19), torch.nan, dtype=others)
    for rows in (1, 7):
        if kernels.product(weight_NI.data_ptr(), None, None, x_BI.data_ptr(), y_BN.data_ptr(), 19, 128, rows, 2):
            return False
    expected_BN = F.linear(x_BI.double(), weight_NI.double())
    return close(y_BN, expected_BN)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same but for the rounding of the first one's dtype."""
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))
    return error <= 4 * torch.finfo(actual.dtype).eps
