"""Weighted sums, and what picks or passes on elements one by one. No sweep before the last step, but for ramplus_tl.

x_i are the models, b the base, d_i = x_i - b, w_i the weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lapis.errors import ConfigError
from lapis.weights.merge.methods.block import (
    Block,
    Elementwise,
    FisherFloor,
    Lambda,
    NearswapT,
    Normalize,
    RamAlpha,
    RamEpsilon,
    RamR,
    Result,
    Scale,
    Steps,
    Weight,
)


def combination(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum w x, in place of the first tensor. Neighbors weighted w and -w are subtracted first, which loses nothing."""
    pairs = list(zip(tensors, weights, strict=True))
    total, at = None, 0
    while at < len(pairs):
        tensor, weight = pairs[at]
        if at + 1 < len(pairs) and pairs[at + 1][1] == -weight:
            tensor = tensor.sub_(pairs[at + 1][0])
            at += 1
        if total is None:
            total = tensor if weight == 1 else tensor.mul_(weight)
        else:
            total.add_(tensor, alpha=weight)
        at += 1
    assert total is not None
    return total


def linear(*, weight: Weight, normalize: Normalize = True) -> Elementwise:
    """sum w x / sum w: model soups (Wortsman et al. 2022, arXiv 2203.05482). A base is a model like the others.

    Where the first weight is 1 and nothing is normalized, the others are what is added to the first model.
    """
    whole = sum(weight) if normalize else 1.0
    if whole == 0:
        raise ConfigError("linear: the weights sum to 0, so that their mean is not defined; set normalize: false")
    if not normalize and weight[0] == 1 and len(weight) > 1:

        def apply(block: Block) -> Result:
            delta = combination(block.models[1:], weight[1:])
            return block.models[0].add_(delta), delta

        return Elementwise(apply)
    return Elementwise(lambda block: (combination(block.models, [w / whole for w in weight]), None))


def fisher(*, weight: Weight = (1.0,), floor: FisherFloor = 1e-6) -> Elementwise:
    """sum w F x / sum w F, element by element, where F is how much an element matters to its model.

    Fisher-weighted averaging (Matena and Raffel 2022, arXiv 2111.09832, section 3.2). F comes from `lapis gather`: the
    mean over texts of the squared gradient of their log-probability, at least `floor`.
    """

    def apply(block: Block) -> Result:
        total, divisor = torch.zeros_like(block.models[0]), torch.zeros_like(block.models[0])
        for i, (model, w) in enumerate(zip(block.models, weight, strict=True)):
            share = block.statistics[i].clamp_(min=floor) if block.statistics else torch.ones_like(model)
            total.addcmul_(model, share, value=w)
            divisor.add_(share, alpha=w)
        return total.div_(divisor), None

    return Elementwise(apply)


def task_arithmetic(*, weight: Weight, lambda_: Lambda = 1.0, normalize: Normalize = False) -> Elementwise:
    """b + lambda sum w d: task arithmetic (Ilharco et al. 2022, arXiv 2212.04089, section 2).

    normalize divides by the sum of the weights, unless that is 0.
    """
    whole = sum(weight) if normalize else 1.0
    scale = lambda_ / (whole if abs(whole) >= 1e-8 else 1.0)
    return Elementwise(lambda block: block.changed(combination(block.deltas(), [w * scale for w in weight])))


def nearswap(*, t: NearswapT) -> Elementwise:
    """w x + (1 - w) b with w = clamp(t / max(abs(b - x), 1e-6), 0, 1): what is near is taken over, the rest less.

    Source: the card of alchemonaut/QuartetAnemoi-70B-t0.0001.
    """

    def apply(block: Block) -> Result:
        (delta,) = block.deltas()
        share = delta.abs().clamp_(min=1e-6).reciprocal_().mul_(t).clamp_(0, 1)
        return block.changed(share.mul_(delta))

    return Elementwise(apply)


def ram(*, epsilon: RamEpsilon = 1e-5) -> Elementwise:
    """b + the difference of the one model that changed an element, or the mean over the models that did.

    A model changed an element where abs(d) > epsilon. Reinforced Agent Merging (arXiv 2601.13572).
    """

    def apply(block: Block) -> Result:
        deltas = block.deltas()
        changed, owners = _owners(deltas, epsilon)
        return block.changed(_sum_of(deltas, changed).div_(owners.clamp_(min=1)))

    return Elementwise(apply)


def ramplus_tl(*, r: RamR = 0.1, alpha: RamAlpha = 0.2, epsilon: RamEpsilon = 1e-5) -> Steps:
    """ram, with what one model owns alone scaled by 1 + r clamp(rho, 0, alpha); rho = its shared / its own elements.

    Reinforced Agent Merging Plus, with rho counted per tensor (arXiv 2601.13572).
    """

    def counts(block: Block) -> tuple[Tensor, Tensor]:
        changed, owners = _owners(block.deltas(), epsilon)
        shared = torch.stack([(mask & (owners > 1)).sum() for mask in changed])
        alone = torch.stack([(mask & (owners == 1)).sum() for mask in changed])
        return shared, alone

    shared, alone = yield counts
    rho = shared.double() / alone.double().clamp(min=epsilon)
    scales = (1 + r * rho.clamp(0, alpha)).tolist()

    def apply(block: Block) -> Result:
        deltas = block.deltas()
        changed, owners = _owners(deltas, epsilon)
        overlap = _sum_of(deltas, changed).div_(owners.clamp(min=1))
        for delta, scale in zip(deltas, scales, strict=True):
            delta.mul_(scale)
        return block.changed(torch.where(owners == 1, _sum_of(deltas, changed), overlap))

    return Elementwise(apply)


def _owners(deltas: list[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Which elements each model changed, and by how many models each was changed."""
    changed = [delta.abs() > epsilon for delta in deltas]
    return changed, torch.stack(changed).sum(0)


def _sum_of(deltas: list[Tensor], masks: list[Tensor]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, mask in zip(deltas, masks, strict=True):
        total.addcmul_(delta, mask.to(delta.dtype))
    return total


def passthrough(*, scale: Scale = (1.0,)) -> Elementwise:
    """x times scale. With slices, the layers of several models are stacked."""
    return Elementwise(lambda block: (block.models[0].mul_(scale[0]), None))
