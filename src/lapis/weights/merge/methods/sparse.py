"""Differences thinned out before they are added: TIES, DARE, DELLA, Breadcrumbs. One recipe with three choices.

Which elements of d_i = x_i - b stay (the largest, a random share, a band), how the loss is made up for, and whether the
models elect a sign for each element. w_i are the weights, m a mask.

`numerics` decides where mergekit 0.1.5 and the papers part ways. The default is mergekit, since recipes in its format
carry weights that were tuned under its choices, and a recipe should give the same model here:

- sign election: mergekit takes the sign of sum w d, and + where that is 0; the TIES paper takes the sign of sum d, and
  lets an element with a sum of 0 rest.
- making up (`rescale`): mergekit multiplies what is left by sum abs(d) / sum abs(d m), for each tensor; the papers
  divide by the probability of being kept, which needs no sweep and is right on average instead of in total.

Masks that depend on magnitude are exact: of equal magnitudes, common among bf16 differences, the earlier element counts
as the larger. (mergekit leaves equals to an unstable sort.) Random masks are drawn from seed, tensor name and model.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapis.errors import ConfigError
from lapis.weights.merge.methods.block import (
    Block,
    Cut,
    Density,
    Elementwise,
    Epsilon,
    Gamma,
    Lambda,
    Normalize,
    Numerics,
    PerModel,
    Reduction,
    Rescale,
    Result,
    Steps,
    Weight,
    cuts,
    scratch,
)
from lapis.weights.merge.methods.linear import combination

Mask = np.ndarray[Any, np.dtype[Any]]  # of the difference's shape, bool or 0 and 1; numpy multiplies by it the fastest
Keep = Callable[[Block, int, Tensor], tuple[Mask | None, Tensor | float]]
"""(block, model, its difference) -> the mask of what stays (None: all), and the probability with which it stayed."""


def ties(
    *, weight: Weight, density: Density = (1.0,), normalize: Normalize = True, rescale: Rescale = False,
    lambda_: Lambda = 1.0, numerics: Numerics = "mergekit",
) -> Steps:  # fmt: skip
    """b + lambda sum w d m / sum w m: trim, elect a sign, merge those that agree (Yadav et al. 2023, arXiv 2306.01708).

    Trim keeps the k = max(1, int(density n)) largest of each d, and nothing at density 0.
    """
    keep = yield from _band(density, [0.0] * len(density), at_least=1)
    return (yield from _thinned(keep, weight, normalize, rescale, lambda_, numerics, elect=True))


def dare_linear(
    *, weight: Weight, density: Density = (1.0,), normalize: Normalize = False, rescale: Rescale = True,
    lambda_: Lambda = 1.0, numerics: Numerics = "mergekit",
) -> Steps:  # fmt: skip
    """b + lambda sum w d m / density, m random, P(m = 1) = density (Yu et al. 2023, arXiv 2311.03099, section 3)."""
    return (yield from _thinned(_random(density), weight, normalize, rescale, lambda_, numerics, elect=False))


def dare_ties(
    *, weight: Weight, density: Density = (1.0,), normalize: Normalize = False, rescale: Rescale = True,
    lambda_: Lambda = 1.0, numerics: Numerics = "mergekit",
) -> Steps:  # fmt: skip
    """dare_linear's random masks, then the sign election of ties (Yu et al. 2023, arXiv 2311.03099)."""
    return (yield from _thinned(_random(density), weight, normalize, rescale, lambda_, numerics, elect=True))


def della_linear(
    *, weight: Weight, density: Density = (1.0,), epsilon: Epsilon = (0.15,), normalize: Normalize = False,
    rescale: Rescale = True, lambda_: Lambda = 1.0, numerics: Numerics = "mergekit",
) -> Steps:  # fmt: skip
    """As dare_linear, with P(m = 1) = density - epsilon + 2 epsilon r, r in [0, 1] the rank of abs(d) within its row.

    MagPrune (Deep et al. 2024, arXiv 2406.11617, section 3.1); there epsilon spans the whole range, here half of it.
    """
    keep = _by_rank(density, epsilon)
    return (yield from _thinned(keep, weight, normalize, rescale, lambda_, numerics, elect=False))


def della(
    *, weight: Weight, density: Density = (1.0,), epsilon: Epsilon = (0.15,), normalize: Normalize = True,
    rescale: Rescale = True, lambda_: Lambda = 1.0, numerics: Numerics = "mergekit",
) -> Steps:  # fmt: skip
    """della_linear's masks, then the sign election of ties and the mean (Deep et al. 2024, arXiv 2406.11617)."""
    keep = _by_rank(density, epsilon)
    return (yield from _thinned(keep, weight, normalize, rescale, lambda_, numerics, elect=True))


def breadcrumbs(
    *, weight: Weight, density: Density = (1.0,), gamma: Gamma = (0.01,), normalize: Normalize = False,
    rescale: Rescale = False, lambda_: Lambda = 1.0, numerics: Numerics = "mergekit",
) -> Steps:  # fmt: skip
    """b + lambda sum w d m, m without the int(gamma n) largest and keeping the next int(density n).

    Model Breadcrumbs (Davari and Belilovsky 2023, arXiv 2312.06795, section 3). Density is met first: where density and
    gamma pass 1 together, fewer outliers are dropped.
    """
    keep = yield from _band(density, gamma)
    return (yield from _thinned(keep, weight, normalize, rescale, lambda_, numerics, elect=False))


def breadcrumbs_ties(
    *, weight: Weight, density: Density = (1.0,), gamma: Gamma = (0.01,), normalize: Normalize = False,
    rescale: Rescale = False, lambda_: Lambda = 1.0, numerics: Numerics = "mergekit",
) -> Steps:  # fmt: skip
    """The masks of breadcrumbs, then the sign election of ties (arXiv 2312.06795 and 2306.01708)."""
    keep = yield from _band(density, gamma)
    return (yield from _thinned(keep, weight, normalize, rescale, lambda_, numerics, elect=True))


def _thinned(
    keep: Keep, weight: PerModel, normalize: bool, rescale: bool, lambda_: float, numerics: str, *, elect: bool
) -> Steps:
    """The part that all methods here share: masks, making up, weights, election, mean."""
    masks: dict[int, list[Any]] = {}
    ratios = [1.0] * len(weight)

    if rescale and numerics == "mergekit":

        def norms(block: Block) -> tuple[Any, ...]:
            sums, packed = [], []
            for i, delta in enumerate(block.deltas()):
                mask, _ = keep(block, i, delta)
                sums += [_sum(delta.abs_()), 0.0 if mask is None else _sum(_masked(delta, mask))]
                packed.append(None if mask is None else np.packbits(mask != 0))
            return (torch.tensor(sums, dtype=torch.float64), {block.first: packed})

        sums, masks = yield norms
        ratios = [all_ / left if all_ >= 1e-7 and left >= 1e-7 else 1.0 for all_, left in sums.view(-1, 2).tolist()]

    def thin(block: Block) -> list[Tensor]:
        deltas = block.deltas()
        for i, delta in enumerate(deltas):
            probability: Tensor | float = 1.0
            if masks:
                packed = masks[block.first][i]
                mask = None if packed is None else _unpacked(packed, delta)
            else:
                mask, probability = keep(block, i, delta)
            if mask is not None:
                _masked(delta, mask)
                if rescale and not masks and not (isinstance(probability, float) and probability <= 0):
                    delta.div_(probability)
        return deltas

    whole = sum(weight)

    def apply(block: Block) -> Result:
        deltas = thin(block)
        if elect:
            merged = _elected(deltas, weight, ratios, normalize, numerics)
        else:
            scale = 1 / whole if normalize and abs(whole) >= 1e-8 else 1.0
            merged = combination(deltas, [w * r * scale for w, r in zip(weight, ratios, strict=True)])
        return block.changed(merged.mul_(lambda_) if lambda_ != 1 else merged)

    return Elementwise(apply)


def _elected(deltas: list[Tensor], weight: PerModel, ratios: list[float], normalize: bool, numerics: str) -> Tensor:
    """sum of those w d whose sign is the elected one; over the sum of their w where normalize is set."""
    sign = scratch(deltas[0], "sign").zero_()
    for delta, w, ratio in zip(deltas, weight, ratios, strict=True):
        if numerics == "paper":
            sign.add_(delta)
        delta.mul_(w * ratio)
        if numerics == "mergekit":
            sign.add_(delta)
    sign = sign.sign_() if numerics == "paper" else sign.ge_(0).mul_(2).sub_(1)
    merged, divisor = scratch(sign, "merged").zero_(), scratch(sign, "divisor").zero_()
    for delta, w in zip(deltas, weight, strict=True):
        agreed = delta.mul_(sign).clamp_(min=0)  # abs(w d) where the signs agree, 0 elsewhere
        merged.add_(agreed)
        if normalize:
            divisor.add_(agreed.sign_(), alpha=w)
    if normalize:
        merged.div_(divisor.add_(torch.eq(divisor, 0, out=scratch(sign, "zero"))))
    return merged.mul_(sign)


def _band(density: PerModel, gamma: Sequence[float], at_least: int = 0) -> Generator[Reduction, tuple[Any, ...], Keep]:
    """Keeps int(density n) magnitudes, the largest but for int(gamma n) outliers."""
    thin = [i for i, share in enumerate(density) if 0 < share < 1]
    bounds: dict[int, tuple[int, int, int]] = {}  # model -> the ranks [low, high) that stay, of how many

    def sizes(block: Block) -> Iterator[Tensor]:
        deltas = block.deltas()
        return (torch.abs(deltas[i], out=scratch(deltas[i], "size")) for i in thin)

    def ranks(at: int, count: int) -> list[int]:
        staying = min(count, max(at_least, int(density[thin[at]] * count)))
        low = max(0, count - staying - int(gamma[thin[at]] * count))
        bounds[thin[at]] = (low, low + staying, count)
        return [rank for rank in (low, low + staying) if rank < count]

    edges_of_all: list[list[Cut]] = (yield from cuts(sizes, ranks)) if thin else []

    def keep(block: Block, i: int, delta: Tensor) -> tuple[Mask | None, float]:
        if density[i] >= 1:
            return None, 1.0
        low, high, count = bounds.get(i, (0, 0, 0))
        if low == high:
            return np.zeros(delta.shape, np.bool_), 1.0
        edges = edges_of_all[thin.index(i)]
        mask = edges[0].upper(block, torch.abs(delta, out=scratch(delta, "size")))
        if high < count:
            mask.sub_(edges[1].upper(block, delta.abs()))
        return mask.numpy(), 1.0

    return keep


def _random(density: PerModel) -> Keep:
    """Keeps each element with probability `density`."""

    def keep(block: Block, i: int, delta: Tensor) -> tuple[Mask | None, float]:
        if density[i] >= 1:
            return None, 1.0
        return block.random(i) < np.uint32(max(density[i], 0.0) * 2**32), density[i]

    return keep


def _by_rank(density: PerModel, epsilon: PerModel) -> Keep:
    """Keeps an element the more likely, the larger it is within its row."""
    for share, spread in zip(density, epsilon, strict=True):
        if 0 < share < 1 and not (0 < share - spread and share + spread < 1):
            raise ConfigError(
                f"della: density {share} with epsilon {spread}; density +- epsilon must stay within 0 and 1"
            )

    def keep(block: Block, i: int, delta: Tensor) -> tuple[Mask | None, Tensor | float]:
        if density[i] >= 1:
            return None, 1.0
        if density[i] <= 0:
            return np.zeros(delta.shape, np.bool_), 1.0
        rows, columns = delta.shape
        ranks = torch.empty(rows, columns)
        order = delta.abs().argsort(dim=1, stable=True)
        ranks.scatter_(1, order, torch.arange(columns, dtype=torch.float32).expand(rows, columns))
        middle = columns == 1
        share = ranks.fill_(0.5) if middle else ranks.div_(columns - 1)
        probability = share.mul_(2 * epsilon[i]).add_(density[i] - epsilon[i])
        return block.random(i) < probability.double().mul_(2**32).numpy(), probability

    return keep


def _masked(delta: Tensor, mask: Mask) -> Tensor:
    """delta times the mask, in place."""
    values = delta.numpy()
    np.multiply(values, mask, out=values)
    return delta


def _unpacked(packed: Any, like: Tensor) -> Mask:
    return np.unpackbits(packed, count=like.numel()).view(np.bool_).reshape(like.shape)


def _sum(values: Tensor) -> float:
    """A float64 sum of short float32 sums, which is as good for numbers of one sign and several times faster."""
    vector, short = values.view(-1), 1 << 12
    whole = vector.numel() // short * short
    return float(vector[:whole].view(-1, short).sum(1).double().sum() + vector[whole:].double().sum())
