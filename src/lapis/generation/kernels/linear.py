"""Linear layers with their weights laid out once: for the compiled kernels, or in oneDNN's blocked layout.

Shapes: B rows, N outputs, I inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.generation.kernels.build import Kernels, compiled, has_bfloat16

WIDENED = 1 << 22  # numbers of a weight that are float32 at a time while it is rounded
DIVISOR = 64  # of the inputs, which the compiled kernel takes apart in lines of the cache
FIRST = 1 << 12  # numbers of a weight that say soon whether bfloat16 holds it


def few(weights: torch.dtype, others: torch.dtype) -> float:
    """Rows up to which the compiled kernel is faster than torch's products, as measured on processors of both kinds.

    Args:
        weights: How the weight is held.
        others: What it is multiplied with.
    """
    if has_bfloat16():
        return 16 if others == torch.float32 and weights != torch.int8 else 8
    return 64 if others == torch.float32 else float("inf")  # torch would imitate products in bfloat16, at a fortieth


class ReadyLinear(nn.Module):
    """y = x W^T + b by the compiled kernel where rows are few, and by torch's products where they are many.

    The weight may be held in bfloat16 though x is float32: nothing but the weight's own bytes is less then.
    """

    def __init__(self, weight_NI: Tensor, bias_N: Tensor | None, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._held = weight_NI.detach().contiguous()
        self.bias = None if bias_N is None else bias_N.detach()
        self._wide_bias = None if bias_N is None else bias_N.detach().float()
        self._few = few(weight_NI.dtype, dtype)
        self._product = kernels.product
        self._shape = self._held.shape
        self._pointers = (
            self._held.data_ptr(), None, None if self._wide_bias is None else self._wide_bias.data_ptr()
        )  # fmt: skip

    @property
    def matrix(self) -> Tensor:
        """The weight, [N, I], in x's dtype; made anew at every call where it is held in another."""
        return self._held.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        outputs, inputs = self._shape
        rows = x.numel() // inputs
        if rows > self._few:
            return self._many(x)
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], outputs)
        threads = torch.get_num_threads()
        if self._product(*self._pointers, x.data_ptr(), y.data_ptr(), outputs, inputs, rows, threads):
            raise MemoryError
        return y

    def _many(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float32 and _packs(torch.float32):
            # torch's float32 product is MKL's, which some processors run at half the speed of oneDNN's
            y: Tensor = PackedLinear(self.matrix, self.bias)(x)
            return y
        return F.linear(x, self.matrix, self.bias)


class Int8Linear(nn.Module):
    """y = x (q s)^T + b: a weight as eight-bit numbers q and a float32 scale s for each of its rows.

    Only the weight is rounded; x and the sums are not. Where rows are many, q is widened to x's dtype, which holds all
    of its numbers, and the scale comes after the product.
    """

    def __init__(self, weight_NI: Tensor, bias_N: Tensor | None, kernels: Kernels | None) -> None:
        super().__init__()
        self.dtype = weight_NI.dtype
        self._q_NI, self._scale_N = rounded_rows(weight_NI.detach())
        self.bias = None if bias_N is None else bias_N.detach()
        self._wide_bias = None if bias_N is None else bias_N.detach().float()
        self._few = few(torch.int8, self.dtype)
        fits = kernels is not None and weight_NI.shape[1] % DIVISOR == 0
        self._product = kernels.product if kernels is not None and fits else None
        bias = None if self._wide_bias is None else self._wide_bias.data_ptr()
        self._pointers = self._q_NI.data_ptr(), self._scale_N.data_ptr(), bias

    @property
    def matrix(self) -> Tensor:
        """The weight that it stands for, [N, I]; made anew at every call."""
        return (self._q_NI * self._scale_N[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        outputs, inputs = self._q_NI.shape
        rows = x.numel() // inputs
        if self._product is None or rows > self._few:
            y = F.linear(x, self._q_NI.to(x.dtype)).float() * self._scale_N
            return (y if self._wide_bias is None else y + self._wide_bias).to(x.dtype)
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], outputs)
        threads = torch.get_num_threads()
        if self._product(*self._pointers, x.data_ptr(), y.data_ptr(), outputs, inputs, rows, threads):
            raise MemoryError
        return y


def rounded_rows(weight_NI: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as int8 [N, I], -127 to 127, and what each row is multiplied by, float32 [N].

    Args:
        weight_NI: Of any float dtype; some rows at a time are widened.
    """
    q_NI = torch.empty(weight_NI.shape, dtype=torch.int8)
    scale_N = torch.empty(len(weight_NI))
    rows = max(1, WIDENED // weight_NI.shape[1])
    for first in range(0, len(weight_NI), rows):
        some = slice(first, first + rows)
        wide = weight_NI[some].to(torch.float32, copy=True)
        scale_N[some] = wide.abs().amax(1).div_(127)
        steps = scale_N[some].where(scale_N[some] > 0, 1.0)  # a row of zeros stays one
        q_NI[some] = wide.div_(steps[:, None]).round_().to(torch.int8)
    return q_NI, scale_N


class PackedLinear(nn.Module):
    """y = x W^T + b with the weight in oneDNN's blocked layout, which is read faster than the usual one."""

    def __init__(self, weight_NI: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_NI.detach(), None)
        self.bias = None if bias_N is None else bias_N.detach()

    @property
    def matrix(self) -> Tensor:
        """The weight in its usual layout, [N, I]; unpacked anew at every call."""
        matrix_NI: Tensor = self._packed.to_dense()
        return matrix_NI

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


@dataclass(frozen=True)
class WeightLayout:
    """How weights are laid out.

    Attributes:
        held: int8 (rounded), bfloat16 (where that holds a float32 weight as it is), or the weights' own dtype.
        kernels: For weights that are held so, or None where they cannot be compiled.
    """

    held: torch.dtype
    kernels: Kernels | None

    @staticmethod
    def of(
        dtype: torch.dtype, device: torch.device, *, int8: bool = False, stored: torch.dtype | None = None,
        compile: bool = True,
    ) -> "WeightLayout":  # fmt: skip
        """The layout for weights of this dtype.

        Args:
            dtype: Of the weights, and of all that is computed with them.
            device: Kernels are for a CPU.
            int8: Whether weights are rounded to eight bits.
            stored: The dtype that they have in their folder.
            compile: Whether kernels are compiled, where there is a compiler.
        """
        narrow = (dtype, stored) == (torch.float32, torch.bfloat16)
        held = torch.int8 if int8 else torch.bfloat16 if narrow else dtype
        return WeightLayout(held, compiled(held, dtype) if compile and device.type == "cpu" else None)


def lay_out(weight_NI: Tensor, bias_N: Tensor | None, layout: WeightLayout) -> nn.Module | None:
    """A layer of this weight that is fast where rows are few; None where there is none for it.

    Args:
        weight_NI: On any device, in any dtype.
        bias_N: Or None.
        layout: For the weight's dtype.
    """
    dtype, kernels = weight_NI.dtype, layout.kernels
    if weight_NI.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    if layout.held == torch.int8:
        return Int8Linear(weight_NI, bias_N, kernels)
    if kernels is not None and weight_NI.shape[1] % DIVISOR == 0:
        held_NI = weight_NI if layout.held == dtype else _as_bfloat16(weight_NI.detach())
        if held_NI is not None:
            return ReadyLinear(held_NI, bias_N, kernels, dtype)
        if (own := compiled(dtype, dtype)) is not None:
            return ReadyLinear(weight_NI, bias_N, own, dtype)
    return PackedLinear(weight_NI, bias_N) if _packs(dtype) else None


def _as_bfloat16(weight_NI: Tensor) -> Tensor | None:
    """The weight in bfloat16 where that holds each of its numbers exactly, else None."""
    first = weight_NI.flatten()[:FIRST]
    if not torch.equal(first.bfloat16().float(), first):
        return None
    narrow_NI = weight_NI.bfloat16()
    return narrow_NI if torch.equal(narrow_NI.float(), weight_NI) else None


def joined(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer that gives the outputs of several, one after another."""
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias for layer in layers]
    bias_N = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
    return (weights[0] if len(weights) == 1 else torch.cat(weights)), bias_N


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, has packed linear layers that give the usual results."""
    try:
        weight, x = torch.eye(8, dtype=dtype), torch.arange(8, dtype=dtype)[None]
        return torch.equal(PackedLinear(weight, None)(x), x)
    except (AttributeError, RuntimeError):
        return False
