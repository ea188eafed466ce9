"""Frozen linear layers in four bits: NF4, sixteen values that split a normal distribution evenly, with a scale for
every 64 weights (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3).

bitsandbytes packs, unpacks and multiplies; this file puts it where a linear layer was. Only for a base under LoRA, and
never in a folder. Leaves out: training or fusing such weights, reading folders that hold them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lapis.errors import ConfigError, MissingExtra


class Nf4Linear(nn.Module):
    """y = x W^T + b with W in four bits; products are in x's dtype. The packed weight is no parameter."""

    packed: Tensor

    def __init__(self, linear: nn.Linear, library: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._library = library
        packed, self._state = library.functional.quantize_4bit(
            linear.weight.detach().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("packed", packed)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight as it is computed with, [O, I]; made anew at every call."""
        dense: Tensor = self._library.functional.dequantize_4bit(self.packed, self._state)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, of which the backward pass keeps the packed weight only."""
        y: Tensor = self._library.matmul_4bit(x, self.packed.t(), quant_state=self._state)
        return y


def quantize(blocks: nn.Module, device: torch.device) -> None:
    """Puts every linear layer of the blocks into NF4, in place, one after the other.

    Args:
        blocks: Of a model on the CPU.
        device: A CUDA GPU.

    Raises:
        ConfigError: Without a CUDA GPU.
        MissingExtra: Without bitsandbytes.
    """
    if device.type != "cuda":
        raise ConfigError("lora: base nf4 needs a CUDA GPU; without one, base: bfloat16 halves the memory of float32")
    pack(blocks, device)


def pack(blocks: nn.Module, device: torch.device) -> None:
    """What `quantize` does, on any device that bitsandbytes computes on."""
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtra("bitsandbytes, which base: nf4 needs,", "nf4") from None
    for name in [name for name, module in blocks.named_modules() if type(module) is nn.Linear]:
        parent, _, last = name.rpartition(".")
        linear = blocks.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(blocks.get_submodule(parent), last, Nf4Linear(linear.to(device), bitsandbytes))
