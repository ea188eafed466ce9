"""How the next token is chosen from the logits: penalties, filters, and one draw per row.

Every function is pure: logits in, logits or ids out. A row's draw comes from that row's own generator, so what a row
says does not depend on its neighbors in the batch. Order and arithmetic are those of transformers' processors. Leaves
out beam search, contrastive search and bans on single tokens.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lapis.errors import LapisError
from lapis.generation.options import Sampling

# The nucleus is nearly always among this many tokens; sorting a whole vocabulary of 150,000 takes a third of a step.
_NUCLEUS = 1024


def generators(sampling: Sampling, rows: Sequence[int]) -> list[random.Random]:
    """One source of random numbers for each row, by the row's own number. The same on every device."""
    if sampling.seed is None:
        return [random.Random() for _ in rows]
    return [random.Random(sampling.seed + row) for row in rows]


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by `penalty` where positive and multiplied where negative (Keskar et al. 2019)."""
    lowered_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def lower_repeated(logits_BV: Tensor, counts_BV: Tensor, frequency: float, presence: float) -> Tensor:
    """OpenAI's penalties: `frequency` for each time that a token is in the reply, `presence` where it is at all."""
    return logits_BV - counts_BV * frequency - (counts_BV > 0) * presence


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Logits with all but the k largest of each row at -inf; ties with the k-th stay."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Logits with all outside the nucleus at -inf (Holtzman et al. 2020, section 3.1).

    The nucleus is the fewest tokens, likeliest first, whose probabilities reach p. It is looked for among the likeliest
    thousand, and in the whole vocabulary only where those do not reach p.

    Args:
        logits_BV: Float.
        p: From above 0 to 1.
    """
    log_total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    for width in sorted({min(_NUCLEUS, logits_BV.shape[-1]), logits_BV.shape[-1]}):
        values_BW, ids_BW = logits_BV.topk(width)
        sums_BW = (values_BW - log_total_B1).exp().cumsum(-1)
        if bool((sums_BW[:, -1] >= p).all()):
            break
    outside_BW = sums_BW >= p
    outside_BW = outside_BW.roll(1, -1)  # the token that reaches p is still inside
    outside_BW[:, 0] = False
    return torch.full_like(logits_BV, -math.inf).scatter_(-1, ids_BW, values_BW.masked_fill(outside_BW, -math.inf))


def min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Logits at -inf where the probability is below p times that of the likeliest token (Nguyen et al. 2024)."""
    floor_B1 = logits_BV.amax(-1, keepdim=True) + math.log(p)
    return logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, top-p and min-p, each only where it is asked for. float32 in, float32 out."""
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = top_p(logits_BV, sampling.top_p)
    if sampling.min_p:
        logits_BV = min_p(logits_BV, sampling.min_p)
    return logits_BV


def choose(
    logits_BV: Tensor, sampling: Sampling, draws: Sequence[random.Random], seen_BV: Tensor | None = None
) -> Tensor:
    """The next token of each row.

    One uniform number per row is turned into a token by the inverse of the cumulative distribution, in float64.

    Args:
        logits_BV: Float.
        sampling: How tokens are chosen.
        draws: A generator for each row.
        seen_BV: bool, the tokens of prompt and reply, for the repetition penalty.

    Returns:
        ids_B, int64.

    Raises:
        LapisError: Where a row's logits are not numbers.
    """
    logits_BV = logits_BV.float()
    if seen_BV is not None:
        logits_BV = penalize(logits_BV, seen_BV, sampling.repetition_penalty)
    best_B, ids_B = logits_BV.max(-1)
    if not bool(best_B.isfinite().all()):
        raise LapisError("generate: the model's logits are NaN or infinite; its weights are damaged or overflow")
    if sampling.temperature == 0:
        return ids_B
    sums_BV = filtered(logits_BV, sampling).softmax(-1).cumsum(-1, dtype=torch.float64)
    # 32 random bits: the largest share stays below 1 in float64, so a token of probability 0 is never met
    shares = [draw.getrandbits(32) / 2**32 for draw in draws]
    aims_B1 = sums_BV[:, -1:] * torch.tensor(shares, dtype=torch.float64, device=sums_BV.device)[:, None]
    return torch.searchsorted(sums_BV, aims_B1, right=True)[:, 0]
