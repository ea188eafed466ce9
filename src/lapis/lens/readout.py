"""States through the head, in blocks of the vocabulary: each block of the matrix is read once for all states.

Nothing of the size states x vocabulary is kept, and nothing is sorted: ranks are counts of tokens that have a higher
logit. Logits are float32 sums whatever the model's dtype, what is made of them is float64. Leaves out: the final norm,
which comes before (logit_lens.py).

Shapes: M states, Q ranked states, R tracked tokens, K best tokens, V vocabulary (v: one block), D model dim.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapis.errors import LapisError

ELEMENTS = 1 << 19  # of a block's logits, states x tokens: what a processor's cache holds


@dataclass
class Readout:
    """Of each state: entropy and KL in nats, the best tokens, and of tracked tokens log-probability and rank.

    kl_M: of the state's distribution from that of its reference, KL(reference || state), as in Belrose et al. 2023
    (arXiv:2303.08112). ranks_QR: 1 = best; tokens with equal logits share the better rank.
    """

    entropy_M: Tensor
    kl_M: Tensor
    top_ids_MK: Tensor
    top_logprobs_MK: Tensor
    logits_MR: Tensor
    logprobs_MR: Tensor
    ranks_QR: Tensor


@dataclass
class _Sums:
    """Running sums of exp(logit - high) over the blocks so far, each state's `high` its highest logit yet."""

    high_M1: Tensor
    total_M: Tensor
    logits_M: Tensor  # weighted by the state's own exponentials: for the entropy
    cross_M: Tensor  # weighted by the reference's: for the KL

    def raise_to(self, high_M1: Tensor, reference_M: Tensor) -> None:
        shrink_M = (self.high_M1 - high_M1).exp()[:, 0]
        self.total_M *= shrink_M
        self.logits_M *= shrink_M
        self.cross_M *= shrink_M[reference_M]
        self.high_M1 = high_M1


@torch.inference_mode()
def read(
    rows_MD: Tensor,
    reference_M: Tensor,
    matrix_VD: Tensor,
    bias_V: Tensor | None,
    own_FV: Tensor | None,
    tracked: Sequence[int] = (),
    ranked: slice = slice(0),
    top: int = 10,
    width: int = 0,
) -> Readout:
    """Reads normed states through the head.

    reference_M: for each state the row of the last state at its place. own_FV: the model's own logits, for every row
    that is a reference, in their order; None where the head is another model's. tracked: token ids; ranked: the states
    for which their ranks are counted. width: tokens per block; 0 takes what fits a cache.
    Raises LapisError where the logits of references differ from own_FV. NaN in, NaN out.
    """
    finals_F = torch.unique(reference_M)
    size, device = len(matrix_VD), rows_MD.device
    rows_MD = rows_MD.float()
    M, R = len(rows_MD), len(tracked)
    width = width or max(256, min(16384, ELEMENTS // M))
    zeros_M = torch.zeros(M, dtype=torch.float64, device=device)
    sums = _Sums(torch.full((M, 1), -torch.inf, dtype=torch.float64, device=device), *(zeros_M.clone() for _ in "abc"))
    best_MK, best_ids_MK = rows_MD.new_empty(M, 0), torch.empty(M, 0, dtype=torch.long, device=device)
    logits_MR = rows_MD.new_zeros(M, R)
    ranks_QR = torch.ones_like(logits_MR[ranked], dtype=torch.long)
    holders = {index // width for index in tracked}
    # Blocks that hold a tracked token go first and wait, so that ranks compare bits that came from the same product
    order = sorted(range(-(-size // width)), key=lambda block: block not in holders)
    waiting: list[Tensor] = []
    gap, scale = torch.zeros((), device=device), torch.ones((), device=device)
    weight_vD = torch.empty(width, matrix_VD.shape[1], device=device)
    with _products_as_exact_as(matrix_VD):
        for step, block in enumerate(order):
            first, last = block * width, min((block + 1) * width, size)
            logits_Mv = rows_MD @ weight_vD[: last - first].copy_(matrix_VD[first:last]).T
            if bias_V is not None:
                logits_Mv += bias_V[first:last].float()
            if own_FV is not None:
                own_Fv = own_FV[:, first:last].float()
                gap = torch.maximum(gap, (logits_Mv[finals_F] - own_Fv).abs().max())  # NaN stays
                scale = torch.maximum(scale, own_Fv.abs().max())
            _add(sums, logits_Mv, reference_M)
            values_MK, places_MK = logits_Mv.topk(min(top, last - first))
            both_MK = torch.cat((best_MK, values_MK), 1)
            best_MK, chosen_MK = both_MK.topk(min(top, both_MK.shape[1]))
            best_ids_MK = torch.cat((best_ids_MK, places_MK + first), 1).gather(1, chosen_MK)
            for column, index in enumerate(tracked):
                if first <= index < last:
                    logits_MR[:, column] = logits_Mv[:, index - first]
            if R:
                waiting.append(logits_Mv[ranked])
            if step + 1 >= len(holders):
                for seen_Qv in waiting:
                    for column in range(R):
                        ranks_QR[:, column] += (seen_Qv > logits_MR[ranked, column, None]).sum(1)
                waiting = []
    if own_FV is not None and bool(sums.total_M.isfinite().all()):
        _check_own(gap.item(), scale.item(), own_FV.dtype)
    log_total_M = sums.total_M.log() + sums.high_M1[:, 0]
    mean_M, cross_M = sums.logits_M / sums.total_M, sums.cross_M / sums.total_M[reference_M]
    kl_M = mean_M[reference_M] - cross_M - log_total_M[reference_M] + log_total_M
    kl_M[finals_F] = 0
    return Readout(
        entropy_M=log_total_M - mean_M,
        kl_M=kl_M.clamp_(min=0),
        top_ids_MK=best_ids_MK,
        top_logprobs_MK=best_MK - log_total_M[:, None],
        logits_MR=logits_MR,
        logprobs_MR=logits_MR - log_total_M[:, None],
        ranks_QR=ranks_QR,
    )


def _add(sums: _Sums, logits_Mv: Tensor, reference_M: Tensor) -> None:
    """Takes one block into the sums."""
    sums.raise_to(torch.maximum(sums.high_M1, logits_Mv.amax(1, keepdim=True).double()), reference_M)
    wide_Mv = logits_Mv.double()
    weights_Mv = (wide_Mv - sums.high_M1).exp_()
    sums.total_M += weights_Mv.sum(1)
    sums.logits_M += torch.linalg.vecdot(weights_Mv, wide_Mv)
    sums.cross_M += torch.linalg.vecdot(weights_Mv[reference_M], wide_Mv)


def _check_own(gap: float, scale: float, dtype: torch.dtype) -> None:
    """The model rounds its logits once, to its dtype; beyond that only the order of the sums differs."""
    allowed = max(torch.finfo(dtype).eps, 2e-5) * scale
    if not gap <= allowed:
        raise LapisError(
            f"lens: the last state through norm and head is {gap:.3g} off the model's own logits (allowed "
            f"{allowed:.1g}); this model does more at its end than norm and head, so a lens would mislead"
        )


@contextmanager
def _products_as_exact_as(matrix: Tensor) -> Iterator[None]:
    """Lets float32 products of bfloat16 numbers run on bfloat16 units: they lose nothing, and take half the time.

    The sums stay in float32, which a product of two bfloat16 matrices would round to bfloat16 at its end.
    """
    if matrix.dtype != torch.bfloat16:
        yield
        return
    backends: Any = torch.backends
    unit, fast = (backends.cuda.matmul, "tf32") if matrix.is_cuda else (backends.mkldnn.matmul, "bf16")
    before = unit.fp32_precision
    unit.fp32_precision = fast
    try:
        yield
    finally:
        unit.fp32_precision = before
