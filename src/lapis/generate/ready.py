"""A model made ready to generate: weights packed once into the order in which the processor reads them.

One token at a time, a model is as fast as its weights can be read. oneDNN reads a packed weight at the memory's full
speed and the usual layout at two thirds of it (benchmarks/results/), with the same sums. A packed model only generates:
it has no weights left to train, save or look into. Leaves out quantization; GPUs, where nothing needs packing.
"""

import torch
from torch import Tensor, nn

from lapis.model.heads import LanguageHead
from lapis.model.transformer import Transformer


class PackedLinear(nn.Module):
    """A linear layer, y = x W^T + b, whose weight lies in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


@torch.inference_mode()
def ready(model: Transformer) -> Transformer:
    """The same model, packed in place and in evaluation mode. Does nothing more where packing does not apply.

    Each weight is dropped as soon as it is packed, so the peak is one weight more. A tied embedding stays beside the
    packed head, since its rows are looked up.
    """
    model.eval()
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return model
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif type(child) is LanguageHead:
                setattr(module, name, PackedLinear(child.matrix, child.bias))
    return model


def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, has packed linear layers that give the usual results."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    try:
        weight, x = torch.eye(8, dtype=dtype), torch.arange(8, dtype=dtype)[None]
        return torch.equal(PackedLinear(weight, None)(x), x)
    except (AttributeError, RuntimeError):
        return False
