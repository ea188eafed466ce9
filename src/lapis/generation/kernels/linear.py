"""Linear layers with their weights laid out once: for the compiled kernels, or in oneDNN's blocked layout.

Shapes: B rows, N outputs, I inputs.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.generation.kernels.build import Kernels

FEW = {torch.float32: 16, torch.bfloat16: 8}  # rows up to which the compiled kernel is faster than torch's products
DIVISOR = 64  # of the inputs, which the compiled kernel takes apart in lines of the cache


class ReadyLinear(nn.Module):
    """y = x W^T + b by the compiled kernel where rows are few, and by torch's products where they are many."""

    def __init__(self, weight_NI: Tensor, bias_N: Tensor | None, kernels: Kernels) -> None:
        super().__init__()
        self.matrix = weight_NI.detach().contiguous()
        self.bias = None if bias_N is None else bias_N.detach()
        self._wide_bias = None if bias_N is None else bias_N.detach().float()
        self._few = FEW[weight_NI.dtype]
        self._product = kernels.product
        self._shape = self.matrix.shape
        self._pointers = (
            self.matrix.data_ptr(), None, None if self._wide_bias is None else self._wide_bias.data_ptr()
        )  # fmt: skip

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
        if self.matrix.dtype == torch.float32 and _packs(torch.float32):
            # torch's float32 product is MKL's, which some processors run at half the speed of oneDNN's
            y: Tensor = PackedLinear(self.matrix, self.bias)(x)
            return y
        return F.linear(x, self.matrix, self.bias)


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


def lay_out(weight_NI: Tensor, bias_N: Tensor | None, kernels: Kernels | None) -> nn.Module | None:
    """A layer of this weight that is fast where rows are few; None where there is none for it.

    Args:
        weight_NI: On any device, in any dtype.
        bias_N: Or None.
        kernels: For the weight's dtype; None where they cannot be compiled.
    """
    if weight_NI.device.type != "cpu" or weight_NI.dtype not in FEW:
        return None
    if kernels is not None and weight_NI.shape[1] % DIVISOR == 0:
        return ReadyLinear(weight_NI, bias_N, kernels)
    return PackedLinear(weight_NI, bias_N) if _packs(weight_NI.dtype) else None


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
