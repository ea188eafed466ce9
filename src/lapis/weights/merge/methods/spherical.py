"""Interpolation along spheres. All of it is a weighted sum whose weights follow from norms and dot products.

One sweep accumulates the Gram matrix of the inputs in float64; what a paper does to vectors of a million elements is
then done to coefficients, in double precision; the last step adds the tensors up. x_i are the models, b the base, u_i
unit vectors. With rows as vectors the Gram matrices are those of the rows of a block, and no sweep is needed.
"""

from math import acos, cos, sin, sqrt

import torch
from torch import Tensor

from lapis.errors import ConfigError
from lapis.weights.merge.methods.block import (
    Block,
    Elementwise,
    Eps,
    FilterWise,
    Flatten,
    Interpolation,
    MaxIterations,
    NormalizeWeights,
    Result,
    RowWise,
    Steps,
    Tolerance,
    Weight,
)
from lapis.weights.merge.methods.linear import combination

LERP_ABOVE = 0.9995
_PIECE = 1 << 14  # elements that are widened to float64 at a time, so that they stay in the cache


def slerp(*, t: Interpolation) -> Steps:
    """(sin((1 - t) a) b + sin(t a) x) / sin a, a the angle between the flattened tensors (Shoemake 1985, section 3.3).

    Plainly (1 - t) b + t x where abs(cos a) > 0.9995, as mergekit does; a base and its fine-tune are nearly always so.
    """
    (gram,) = yield lambda block: (_gram([block.origin, *block.models]),)
    (bb, bx), (_, xx) = gram.tolist()
    cosine = bx / ((sqrt(bb) if sqrt(bb) > 1e-8 else 1.0) * (sqrt(xx) if sqrt(xx) > 1e-8 else 1.0))
    cosine = min(1.0, max(-1.0, cosine))
    if abs(cosine) > LERP_ABOVE:
        at_base, at_other, note = 1 - t, t, "interpolated along a line: the tensors are within 0.9995 of one direction"
    else:
        angle = acos(cosine)
        at_base, at_other, note = sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle), ""
    return Elementwise(
        lambda block: (combination([block.origin, *block.models], [at_base, at_other]), None),
        note,
    )


def nuslerp(*, weight: Weight, nuslerp_flatten: Flatten = True, nuslerp_row_wise: RowWise = False) -> Steps:
    """slerp of two models at t = w2 / (w1 + w2), or of their differences where there is a base (then added to it).

    t is 0.5 where the weights sum to 0. A line is taken only where the vectors are parallel. Vectors: the whole tensor
    (nuslerp_flatten), its rows, or its columns (nuslerp_row_wise).
    """
    whole = sum(weight)
    t = 0.5 if abs(whole) < 1e-6 else weight[1] / whole

    if nuslerp_flatten:
        (gram,) = yield lambda block: (_gram(block.deltas()),)
        shares = _nuslerp_shares(gram.view(2, 2, 1), t)
    elif nuslerp_row_wise:

        def columns(block: Block) -> tuple[Tensor]:
            vectors = torch.stack(block.deltas()).double()
            return (torch.einsum("irc,jrc->ijc", vectors, vectors) if not block.vector else _rows_gram(vectors),)

        (gram,) = yield columns
        shares = _nuslerp_shares(gram, t)

    def apply(block: Block) -> Result:
        first, second = block.deltas()
        if nuslerp_flatten or nuslerp_row_wise:
            at_first, at_second = shares
        else:
            rows = _rows_gram(torch.stack([first, second]).double())
            at_first, at_second = (share.unsqueeze(1) for share in _nuslerp_shares(rows, t))
        merged = first.mul_(at_first.float()).add_(second.mul_(at_second.float()))
        return block.changed(merged) if block.base is not None else (merged, None)

    return Elementwise(apply)


def _nuslerp_shares(gram: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The two coefficients for each of V vectors, from Gram matrices [2, 2, V]."""
    norms = gram.diagonal().T.sqrt().clamp(min=1e-7)
    cosine = (gram[0, 1] / (norms[0] * norms[1])).clamp(-1, 1)
    parallel = 1 - cosine.square() <= 1e-14  # mergekit's float32 cosines cannot tell such angles from 0
    angle = torch.acos(torch.where(parallel, 0.0, cosine))
    at_first = torch.where(parallel, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    at_second = torch.where(parallel, t, torch.sin(t * angle) / torch.sin(angle))
    return at_first, at_second


def multislerp(*, weight: Weight, normalize_weights: NormalizeWeights = True, eps: Eps = 1e-8) -> Steps:
    """Unit vectors -> weighted mean -> tangent plane -> exponential map, times the weighted norm.

    With a base, on the differences from it. A single model is taken as it is. Source: Goddard, "Multi-SLERP".
    """
    (gram,) = yield lambda block: (_gram(block.deltas()),)
    w = torch.tensor(weight, dtype=torch.float64)
    if normalize_weights:
        if float(w.sum()) == 0:
            raise ConfigError("multislerp: the weights sum to 0; set normalize_weights: false or change them")
        w = w / w.sum()
    norms = gram.diagonal().sqrt() + eps
    units = gram / norms.outer(norms)
    size = _length(w, units)
    if len(weight) == 1:
        shares = torch.ones(1, dtype=torch.float64)
    elif size < eps:
        if len(weight) != 2:
            raise ConfigError(
                "multislerp: the weighted directions cancel out, so that there is no mean; change the weights"
            )
        shares = w
    else:
        mean = w / size
        tangent = w - float(w @ (units @ mean)) * mean
        length = _length(tangent, units) + eps
        shares = (mean * cos(length) + tangent * (sin(length) / length)) * float((norms - eps) @ w) / norms

    def apply(block: Block) -> Result:
        merged = combination(block.deltas(), shares.tolist())
        return block.changed(merged) if block.base is not None else (merged, None)

    return Elementwise(apply)


def karcher(*, max_iter: MaxIterations = 10, tol: Tolerance = 1e-5) -> Steps:
    """The point on the unit sphere with the least sum of squared angles to the models, times their mean norm.

    The Karcher mean by iterated tangent steps, equal weights (arXiv 2603.04972). A base is a model like the others.
    """
    (gram,) = yield lambda block: (_gram(block.models),)
    norms = gram.diagonal().sqrt()
    valid = (norms > tol).double()
    if not float(valid.sum()):
        return Elementwise(lambda block: (block.models[0].zero_(), None))
    units = gram / norms.clamp(min=tol).outer(norms.clamp(min=tol))
    share = valid / valid.sum()
    size = _length(share, units)
    mean = share / size if size >= tol else torch.nn.functional.one_hot(valid.argmax(), len(valid)).double()
    for _ in range(max_iter):
        dots = (units @ mean).clamp(-1, 1)
        angles = torch.acos(dots)
        steps = torch.where(angles < tol, 0.0, share * angles / torch.sin(angles).clamp(min=1e-12))
        tangent = steps - float(steps @ dots) * mean
        length = _length(tangent, units)
        if length < tol:
            break
        mean = cos(length) * mean + sin(length) / length * tangent
        mean = mean / max(_length(mean, units), tol)
    shares = (mean * norms.mean() / norms.clamp(min=tol)).tolist() if len(norms) > 1 else [1.0]
    return Elementwise(lambda block: (combination(block.models, shares), None))


def model_stock(*, filter_wise: FilterWise = False) -> Steps:
    """t mean(x) + (1 - t) b with t = N c / (1 + (N - 1) c), c the mean cosine between the N differences.

    Model Stock (Jang et al. 2024, arXiv 2403.19522, equation 5). t is not clamped; it is 0 where that is singular.
    """
    if not filter_wise:
        (gram,) = yield lambda block: (_gram(block.deltas()),)
        ratio = _stock_ratio(gram.unsqueeze(2))

    def apply(block: Block) -> Result:
        deltas = block.deltas()
        rows = _stock_ratio(_rows_gram(torch.stack(deltas).double())) if filter_wise else ratio
        mean = combination(deltas, [1 / len(deltas)] * len(deltas))
        return block.changed(mean.mul_(rows.float().unsqueeze(1)))

    return Elementwise(apply)


def _stock_ratio(gram: Tensor) -> Tensor:
    """t for each of V vectors, from Gram matrices [N, N, V]."""
    norms = gram.diagonal().T.sqrt()
    count = len(norms)
    first, second = torch.triu_indices(count, count, 1)
    cosines = gram[first, second] / (norms[first] * norms[second]).clamp(min=1e-6)
    cosine = cosines.clamp(-1, 1).mean(0)
    divisor = 1 + (count - 1) * cosine
    return torch.where(divisor.abs() < 1e-6, 0.0, count * cosine / torch.where(divisor.abs() < 1e-6, 1.0, divisor))


def _gram(tensors: list[Tensor]) -> Tensor:
    """All dot products of N tensors, float64 [N, N]."""
    gram = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for first in range(0, flat[0].numel(), _PIECE):
        vectors = torch.stack([tensor[first : first + _PIECE] for tensor in flat]).double()
        gram.addmm_(vectors, vectors.T)
    return gram


def _rows_gram(vectors: Tensor) -> Tensor:
    """Gram matrices [N, N, R] of the rows of N tensors [N, R, C]."""
    return torch.einsum("irc,jrc->ijr", vectors, vectors)


def _length(shares: Tensor, gram: Tensor) -> float:
    """Norm of a weighted sum of vectors, from their Gram matrix."""
    return sqrt(max(0.0, float(shares @ gram @ shares)))
