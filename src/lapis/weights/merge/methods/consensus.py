"""Elements chosen by how important they are: SCE (variance over the models) and Arcee Fusion (a base's outliers).

d_i = x_i - b.
"""

import torch
from torch import Tensor

from lapis.weights.merge.methods.block import Block, Elementwise, Numerics, Result, SelectTopK, Steps, cuts


def sce(*, select_topk: SelectTopK = 1.0, numerics: Numerics = "mergekit") -> Steps:
    """Select the elements of largest variance over the models, weigh each model by mean d^2, erase minority signs.

    b + sum w d m / sum w m; w is normalised over the models, m agrees with the sign of sum d (Wan et al. 2024, arXiv
    2408.07990, section 3.2). k = int(select_topk x the number of elements with any variance). mergekit gives all models
    one weight where the mean squares sum to less than 1e-6, which fine-tunes commonly do; numerics: paper does not.
    """

    def variance(block: Block) -> list[Tensor]:
        deltas = block.deltas()
        return [torch.stack(deltas).var(0, correction=0)]

    select = None
    if select_topk < 1:
        (varied,) = yield lambda block: (int(torch.count_nonzero(variance(block)[0])),)
        staying = max(0, int(varied * select_topk))
        ((select,),) = yield from cuts(variance, lambda _, count: [count - max(staying, 1)])

    def selected(block: Block) -> list[Tensor]:
        mask = select.upper(block, variance(block)[0]) if select else None
        deltas = block.deltas()
        if mask is not None:
            for delta in deltas:
                delta.mul_(mask if staying else 0)
        return deltas

    def squares(block: Block) -> tuple[Tensor, int]:
        deltas = selected(block)
        return torch.stack([delta.double().square_().sum() for delta in deltas]), deltas[0].numel()

    sums, count = yield squares
    means = sums / count
    even = float(means.sum()) < (1e-6 if numerics == "mergekit" else 1e-300)
    weights = (torch.full_like(means, 1 / len(means)) if even else means / means.sum()).tolist()

    def apply(block: Block) -> Result:
        deltas = selected(block)
        sign = torch.stack(deltas).sum(0)
        sign = sign.ge_(0).mul_(2).sub_(1) if numerics == "mergekit" else sign.sign_()
        merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, weight in zip(deltas, weights, strict=True):
            agreed = delta.mul_(sign).clamp_(min=0)
            merged.add_(agreed, alpha=weight)
            divisor.add_(agreed.sign_(), alpha=weight)
        return block.changed(merged.div_(divisor.clamp_(min=1e-6)).mul_(sign))

    return Elementwise(apply)


def arcee_fusion() -> Steps:
    """b + d where abs(d) KL(softmax(x) || softmax(b)) reaches median + 1.5 (Q3 - Q1); softmax and KL by rows.

    Source: Arcee, "Fusion" (mergekit). mergekit estimates the quartiles of large tensors from a million elements drawn
    without a seed; here they are exact, so that nothing is random.
    """
    divergence: dict[int, Tensor] = {}

    def importance(block: Block) -> list[Tensor]:
        if block.first in divergence:
            kl = divergence[block.first]
        else:
            kl = divergence[block.first] = _divergence(block.models[0], block.origin)
        return [block.deltas()[0].abs().mul_(kl)]

    ((first, median, third),) = yield from cuts(
        importance, lambda _, count: [int(quantile * (count - 1)) for quantile in (0.25, 0.5, 0.75)]
    )
    threshold = median.value + 1.5 * (third.value - first.value)

    def apply(block: Block) -> Result:
        (score,) = importance(block)
        (delta,) = block.deltas()
        return block.changed(delta.mul_(score >= threshold))

    return Elementwise(apply)


def _divergence(model: Tensor, base: Tensor) -> Tensor:
    """KL(softmax(model) || softmax(base)) of rows, [R, 1]. A fine-tune's is about 1e-8; float32 would be all noise."""
    p = model.double().softmax(-1).add_(1e-8)
    q = base.double().softmax(-1).add_(1e-8)
    return (p * (p / q).log_()).sum(-1, keepdim=True).clamp_(min=0).float()
