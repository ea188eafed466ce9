"""States through the head, in blocks of the vocabulary: each block of the matrix is read once for all states.

Nothing of the size states x vocabulary is kept, and nothing is sorted: ranks are counts of tokens that have a higher
logit. Logits are float32 sums whatever the model's dtype, what is made of them is float64. Leaves out: the final norm,
which comes before (logit_lens.py).

Shapes: P places, N states of each (the final one last), X states more, M = P N + X rows, R tracked tokens, K best
tokens, V vocabulary (v: one block), D model dim.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapis.errors import LapisError

# Rows x tokens of a block, and tokens: its weights, logits and exponentials stay in the caches. Powers of two, because
# products of other widths are slower.
ELEMENTS, LEAST, MOST = 1 << 18, 256, 2048
GROUP = 16  # tokens of which only the highest is looked at first, where the best are searched


@dataclass
class Readout:
    """Of each state: entropy and KL in nats, the best tokens, and of tracked tokens log-probability and rank.

    kl_PN: of the state's distribution from the final one's at its place, KL(final || state), as in Belrose et al. 2023
    (arXiv:2303.08112). ranks_PNR: 1 = best; tokens with equal logits share the better rank.
    """

    entropy_PN: Tensor
    kl_PN: Tensor
    top_ids_PNK: Tensor
    top_logprobs_PNK: Tensor
    logits_PNR: Tensor
    logprobs_PNR: Tensor
    ranks_PNR: Tensor
    more_logprobs_XR: Tensor


class _Sums:
    """Running sums of exp(logit - high) over the blocks so far, each row's `high` its highest logit yet; float64.

    Of the rows behind the states, of which nothing else is needed, log totals only; their logits are used up.
    """

    def __init__(self, rows: int, places: int, states: int, device: torch.device) -> None:
        zeros = torch.zeros(3, places, states, dtype=torch.float64, device=device)
        self.high_PN1 = torch.full((places, states, 1), -torch.inf, dtype=torch.float64, device=device)
        self.more_X = torch.full((rows - places * states,), -torch.inf, dtype=torch.float64, device=device)
        # logits weighted by a state's own exponentials (for the entropy) and by the final state's (for the KL)
        self.total_PN, self.own_PN, self.cross_PN = zeros

    def add(self, logits_Mv: Tensor) -> None:
        """Takes in one block."""
        P, N = self.own_PN.shape
        logits_PNv = logits_Mv[: P * N].view(P, N, -1)
        high_PN1 = torch.maximum(self.high_PN1, logits_PNv.amax(2, keepdim=True).double())
        shrink_PN = (self.high_PN1 - high_PN1).exp()[..., 0]
        self.high_PN1 = high_PN1
        wide_PNv = logits_PNv.double()
        weights_PNv = (wide_PNv - high_PN1).exp_()
        self.total_PN = self.total_PN * shrink_PN + weights_PNv.sum(2)
        self.own_PN = self.own_PN * shrink_PN + torch.linalg.vecdot(weights_PNv, wide_PNv)
        crossed_PN = (wide_PNv @ weights_PNv[:, -1, :, None])[..., 0]
        self.cross_PN = self.cross_PN * shrink_PN[:, -1:] + crossed_PN
        if len(self.more_X):  # in float32, and in the place of the logits
            logits_Xv = logits_Mv[P * N :]
            high_X1 = logits_Xv.amax(1, keepdim=True)
            total_X = logits_Xv.sub_(high_X1).exp_().sum(1).double()
            self.more_X = torch.logaddexp(self.more_X, total_X.log() + high_X1[:, 0].double())

    def log_totals(self) -> Tensor:
        """log of the sum of exp(logit) over the vocabulary, [M]."""
        return torch.cat(((self.total_PN.log() + self.high_PN1[..., 0]).flatten(), self.more_X))


@dataclass
class _Ranks:
    """Counts of higher logits. Until all tracked logits are known, blocks wait.

    They are taken from the very products that the others come from, so that a token never outranks itself.
    """

    tracked: Sequence[int]
    logits_MR: Tensor
    states: int
    waiting: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing = len(self.tracked)
        self.ranks_SR = torch.ones_like(self.logits_MR[: self.states], dtype=torch.long)

    def add(self, logits_Mv: Tensor, first: int) -> None:
        for column, index in enumerate(self.tracked):
            if first <= index < first + logits_Mv.shape[1]:
                self.logits_MR[:, column] = logits_Mv[:, index - first]
                self.missing -= 1
        if self.tracked:
            self.waiting.append(logits_Mv[: self.states])
        if not self.missing:
            for block_Sv in self.waiting:
                above_Sv = torch.empty_like(block_Sv)  # float counts of a block are exact, and sums of bools are slow
                for column in range(len(self.tracked)):
                    torch.gt(block_Sv, self.logits_MR[: self.states, column, None], out=above_Sv)
                    self.ranks_SR[:, column] += above_Sv.sum(1).long()
            self.waiting = []


@torch.inference_mode()
def read(
    states_PND: Tensor,
    matrix_VD: Tensor,
    bias_V: Tensor | None = None,
    own_PV: Tensor | None = None,
    *,
    more_XD: Tensor | None = None,
    tracked: Sequence[int] = (),
    ranked: int | None = None,
    top: int = 10,
    cap: float | None = None,
    width: int = 0,
) -> Readout:
    """Reads normed states through the head, the last state of each place being its final one.

    own_PV: the model's own logits at the places; None where the head is another model's. more_XD: states of which only
    log-probabilities of tracked tokens are needed. tracked: token ids, of which the first `ranked` (default: all) are
    ranked. cap: logits are cap tanh(logits / cap), where there is one. width: tokens per block; 0 takes what fits a
    cache.
    Raises LapisError where the final states' logits differ from own_PV. NaN in, NaN out.
    """
    P, N, D = states_PND.shape
    size, device = len(matrix_VD), states_PND.device
    rows_MD = states_PND.reshape(P * N, D).float()
    rows_MD = rows_MD if more_XD is None else torch.cat((rows_MD, more_XD.float()))
    M = len(rows_MD)
    width = width or max(LEAST, min(MOST, 1 << (ELEMENTS // M).bit_length() - 1))
    sums = _Sums(M, P, N, device)
    logits_MR = rows_MD.new_zeros(M, len(tracked))
    ranks = _Ranks(tracked[:ranked], logits_MR, P * N)
    best_SK, best_ids_SK = rows_MD.new_empty(P * N, 0), torch.empty(P * N, 0, dtype=torch.long, device=device)
    holders = {index // width for index in tracked[:ranked]}
    final_PV = None if own_PV is None else rows_MD.new_empty(P, size)
    wide = matrix_VD.dtype == torch.float32
    weight_vD = torch.empty(0 if wide else width, D, device=device)
    with _products_as_exact_as(matrix_VD):
        for block in sorted(range(-(-size // width)), key=lambda block: block not in holders):
            first, last = block * width, min((block + 1) * width, size)
            block_vD = matrix_VD[first:last]
            logits_Mv = rows_MD @ (block_vD if wide else weight_vD[: last - first].copy_(block_vD)).T
            if bias_V is not None:
                logits_Mv += bias_V[first:last].float()
            if cap is not None:
                logits_Mv = logits_Mv.div_(cap).tanh_().mul_(cap)
            if final_PV is not None:
                final_PV[:, first:last] = logits_Mv[: P * N].view(P, N, -1)[:, -1]
            ranks.add(logits_Mv, first)
            for column, index in enumerate(tracked[len(ranks.tracked) :], len(ranks.tracked)):
                if first <= index < last:
                    logits_MR[:, column] = logits_Mv[:, index - first]
            sums.add(logits_Mv)
            values_SK, places_SK = _best(logits_Mv[: P * N], top)
            both_SK = torch.cat((best_SK, values_SK), 1)
            best_SK, chosen_SK = both_SK.topk(min(top, both_SK.shape[1]))
            best_ids_SK = torch.cat((best_ids_SK, places_SK + first), 1).gather(1, chosen_SK)
    log_total_M = sums.log_totals()
    if own_PV is not None and final_PV is not None and bool(log_total_M.isfinite().all()):
        _check_own(final_PV, own_PV)
    logprobs_MR = logits_MR - log_total_M[:, None]
    log_total_PN = log_total_M[: P * N].view(P, N)
    mean_PN, cross_PN = sums.own_PN / sums.total_PN, sums.cross_PN / sums.total_PN[:, -1:]
    kl_PN = mean_PN[:, -1:] - cross_PN - log_total_PN[:, -1:] + log_total_PN
    kl_PN[:, -1] = 0
    return Readout(
        entropy_PN=log_total_PN - mean_PN,
        kl_PN=kl_PN.clamp_(min=0),
        top_ids_PNK=best_ids_SK.view(P, N, -1),
        top_logprobs_PNK=best_SK.view(P, N, -1) - log_total_PN[..., None],
        logits_PNR=logits_MR[: P * N].view(P, N, -1),
        logprobs_PNR=logprobs_MR[: P * N].view(P, N, -1),
        ranks_PNR=ranks.ranks_SR.view(P, N, -1),
        more_logprobs_XR=logprobs_MR[P * N :],
    )


def _best(logits_Sv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk in two steps: the best tokens stand in the groups whose highest are best."""
    S, size = logits_Sv.shape
    if size % GROUP or size < 4 * GROUP * count:
        return logits_Sv.topk(min(count, size))
    grouped_SgG = logits_Sv.view(S, -1, GROUP)
    groups_SK = grouped_SgG.amax(2).topk(count).indices
    values_SK, among_SK = grouped_SgG.take_along_dim(groups_SK[..., None], 1).flatten(1).topk(count)
    return values_SK, groups_SK.gather(1, among_SK // GROUP) * GROUP + among_SK % GROUP


def _check_own(final_PV: Tensor, own_PV: Tensor) -> None:
    """The model rounds its logits once, to its dtype; beyond that only the order of the sums differs."""
    gap = float((final_PV - own_PV).abs().max())  # NaN stays
    allowed = max(torch.finfo(own_PV.dtype).eps, 2e-5) * max(1.0, float(own_PV.abs().max()))
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
