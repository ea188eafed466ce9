"""Methods that take a whole matrix apart, or know what a layer reads. Everything that is no matrix of a layer (vectors,
tables of tokens) is averaged, as the papers' own code does.

x_i are the models, b the base, d_i = x_i - b, w_i the weights, N their number. Arithmetic is in float64, one matrix at
a time; a stack of matrices (experts) is taken matrix by matrix.

Shapes: O outputs, I inputs, K directions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapis.errors import ConfigError
from lapis.weights.merge.methods.block import (
    AdamRate,
    AdamSteps,
    Block,
    Elementwise,
    Lambda,
    OffDiagonal,
    Result,
    Weight,
)
from lapis.weights.merge.methods.linear import combination

_RIDGE = 1e-10  # of the mean diagonal: directions that no input had keep the mean of the models


def tsv_m(*, weight: Weight = (1.0,), lambda_: Lambda = 1.0) -> Elementwise:
    """b + lambda U S V^T of the strongest K = min(O, I) / N directions of each w d, made orthogonal between the models.

    Task Singular Vectors, merging (Gargiulo et al. 2025, arXiv 2412.00081, algorithm 1): the models' left directions
    side by side are replaced by the nearest matrix with orthonormal columns, and so are the right ones.
    """

    def merged(deltas: Sequence[Tensor]) -> Tensor:
        parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
        count = max(1, len(parts[0][1]) // len(parts))
        left_OK = _orthonormal(torch.cat([u[:, :count] for u, _, _ in parts], 1))
        right_IK = _orthonormal(torch.cat([vh[:count].T for _, _, vh in parts], 1))
        merged_OI: Tensor = left_OK * torch.cat([s[:count] for _, s, _ in parts]) @ right_IK.T
        return merged_OI

    return Elementwise(_of_matrices(merged, weight, lambda_))


def iso_c(*, weight: Weight = (1.0,), lambda_: Lambda = 1.0) -> Elementwise:
    """b + lambda s U V^T, where U S V^T = sum w d and s is the mean of its singular values.

    Isotropic merging in the common subspace (Marczak et al. 2025, arXiv 2502.04959, section 4.1).
    """

    def merged(deltas: Sequence[Tensor]) -> Tensor:
        u_OK, s_K, vh_KI = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
        even_OI: Tensor = s_K.mean() * (u_OK @ vh_KI)
        return even_OI

    return Elementwise(_of_matrices(merged, weight, lambda_))


def wudi(
    *, weight: Weight = (1.0,), lambda_: Lambda = 1.0, steps: AdamSteps = 300, rate: AdamRate = 1e-5
) -> Elementwise:
    """b + lambda t, where t minimizes sum_i abs((t - w d_i) (w d_i)^T)^2 / abs(w d_i)^2 from sum w d on.

    WUDI-Merging (Cheng et al. 2025, arXiv 2503.08099, section 3.3): Adam from the sum, as many steps as published. With
    steps: 0 the minimum that is nearest to the sum, which the quadratic has in closed form.
    """

    def merged(deltas: Sequence[Tensor]) -> Tensor:
        total_OI = torch.stack(list(deltas)).sum(0)
        scaled = [delta / norm if (norm := float(delta.norm())) else delta for delta in deltas]
        gram_II = sum((each.T @ each for each in scaled), torch.zeros(total_OI.shape[1], dtype=total_OI.dtype).diag())
        aim_OI = sum((d @ (s.T @ s) for d, s in zip(deltas, scaled, strict=True)), torch.zeros_like(total_OI))
        if steps == 0:
            inverse_II: Tensor = torch.linalg.pinv(gram_II, hermitian=True)
            return total_OI + (aim_OI - total_OI @ gram_II) @ inverse_II
        result, first, second = total_OI.clone(), torch.zeros_like(total_OI), torch.zeros_like(total_OI)
        for step in range(1, steps + 1):
            gradient = (result @ gram_II - aim_OI).mul_(2)
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            result.addcdiv_(first, scale, value=-rate / (1 - 0.9**step))
        return result

    return Elementwise(_of_matrices(merged, weight, lambda_))


def regmean(*, weight: Weight = (1.0,), off_diagonal: OffDiagonal = 0.9) -> Elementwise:
    """(sum w x G) (sum w G)^-1, where G is what a layer's inputs are like: the mean of v v^T over tokens.

    RegMean (Jin et al. 2023, arXiv 2212.09849, equation 2), with G's elements off the diagonal reduced to
    off_diagonal of themselves (section 3.3). G comes from `lapis gather`; a tensor that has none is averaged.
    """
    whole = sum(weight)
    if whole == 0:
        raise ConfigError("regmean: the weights sum to 0, so that their mean is not defined")

    def merged(block: Block) -> Result:
        mean = combination([model.double() for model in block.models], [w / whole for w in weight])
        if not block.statistics:
            return mean.float(), None
        sums_RI, sums_II = torch.zeros_like(mean), torch.zeros_like(block.statistics[0], dtype=torch.float64)
        for model, w, gram in zip(block.models, weight, block.statistics, strict=True):
            reduced = gram.double().mul_(off_diagonal * w)
            reduced.diagonal().add_(gram.double().diagonal(), alpha=(1 - off_diagonal) * w)
            sums_RI.addmm_(model.double() - mean, reduced)
            sums_II += reduced
        sums_II.diagonal().add_(_RIDGE * float(sums_II.diagonal().mean()) or 1.0)
        return (mean + torch.linalg.solve(sums_II, sums_RI, left=False)).float(), None

    return Elementwise(merged)


def _of_matrices(
    merged: Callable[[Sequence[Tensor]], Tensor], weight: Sequence[float], scale: float
) -> Callable[[Block], Result]:
    """The last step: base + scale * merged(w d) for each matrix of the block, float64; the mean of w d elsewhere."""

    def apply(block: Block) -> Result:
        deltas = block.deltas()
        if not block.matrices:
            return block.changed(combination(deltas, [w * scale / len(weight) for w in weight]))
        stacks = [delta.view(block.matrices, -1, delta.shape[-1]) for delta in deltas]
        results = [
            merged([stack[i].double().mul_(w) for stack, w in zip(stacks, weight, strict=True)])
            for i in range(block.matrices)
        ]
        return block.changed(torch.cat(results).mul_(scale).float())

    return apply


def _orthonormal(columns: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to this one (orthogonal Procrustes)."""
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest
