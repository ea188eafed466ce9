"""Output head and cross entropy in one, a few rows at a time: the logits of a batch never exist at once.

The gradient is made in the forward pass, while a block of logits is still in the cache: at the size of the tour this
takes half the time of logits followed by F.cross_entropy. Leaves out: label smoothing, class weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# elements of one block of logits: what a core's cache holds, and what a GPU needs to be busy (128 MB in float32)
_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
# rows of a block are a multiple of this: oneDNN makes a kernel for each shape that a CPU multiplies in bfloat16 and
# keeps a thousand of them, and the supervised tokens of chats are another number in each step
_LEAST = 64


def head_cross_entropy(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """The summed cross entropy (nats, float32 scalar) of `hidden @ weight.T + bias` against int64 targets.

    Matrix products are in autocast's dtype where it is on; softmax and sums are in float32.
    """
    device = hidden_RD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_RD.dtype
    loss: Tensor = _HeadCrossEntropy.apply(hidden_RD, weight_VD, bias_V, targets_R, dtype)  # type: ignore[no-untyped-call]
    return loss


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_R: Tensor, dtype: torch.dtype
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_RD, w_VD = hidden_RD.detach().to(dtype), weight_VD.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().float()
        device, size = x_RD.device, len(w_VD)
        elements = _ELEMENTS.get(device.type, 2**20)
        rows = max(_LEAST, elements // size)
        if needs_weight:  # each block adds to the whole gradient of the matrix, so as many rows as that has columns
            rows = max(rows, min(x_RD.shape[1], 2**26 // size))
        count = len(x_RD)
        rows = -(-max(1, min(rows, count)) // _LEAST) * _LEAST
        x_RD = F.pad(x_RD, (0, 0, 0, -count % _LEAST))
        targets_R = F.pad(targets_R, (0, -count % _LEAST))
        # every block uses the same memory: on a CPU, fresh pages for each would cost as much as the arithmetic
        low, high = x_RD.new_empty(rows, size), torch.empty(rows, size, dtype=torch.float32, device=device)
        d_hidden = torch.empty_like(x_RD) if needs_hidden else None
        d_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=device) if needs_weight else None
        product = torch.empty_like(w_VD) if needs_weight and dtype != torch.float32 else None
        fits = product is not None and high.numel() >= product.numel()
        spare = high.view(-1)[: weight_VD.numel()].view(weight_VD.shape) if fits else None
        d_bias = torch.zeros(size, dtype=torch.float32, device=device) if needs_bias else None
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for first in range(0, len(x_RD), rows):
                x, target = x_RD[first : first + rows], targets_R[first : first + rows, None]
                block, p, real = low[: len(x)], high[: len(x)], count - first  # what is behind these rows is padding
                p.copy_(torch.mm(x, w_VD.T, out=block))
                if bias is not None:
                    p.add_(bias)
                p.sub_(p.amax(-1, keepdim=True))
                picked = p.gather(1, target)
                z = p.exp_().sum(-1, keepdim=True)
                total += (z.log() - picked)[:real].sum(dtype=torch.float64)
                if d_hidden is None and d_weight is None and d_bias is None:
                    continue
                p.div_(z).scatter_add_(1, target, p.new_full((1, 1), -1.0).expand(len(x), 1))  # softmax - one-hot
                p[real:] = 0
                if d_bias is not None:
                    d_bias += p.sum(0)
                block.copy_(p)
                if d_hidden is not None:
                    torch.mm(block, w_VD, out=d_hidden[first : first + rows])
                if d_weight is not None and product is None:
                    d_weight.addmm_(block.T, x)
                elif d_weight is not None and product is not None:
                    torch.mm(block.T, x, out=product)
                    d_weight.add_(product if spare is None else spare.copy_(product))
        d_hidden = None if d_hidden is None else d_hidden[:count]
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        same = scale.device.type == "cpu" and scale.item() == 1  # the loop divides at the end of a step
        grads = (
            None if grad is None else (grad if same else grad * scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None)
