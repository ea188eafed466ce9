"""The losses of learning from preferences, each a pure function of a few numbers per pair.

A log-probability is that of a reply given its prompt, in nats, summed over its tokens, or (where a name ends in `mean`)
divided by their number. A log-ratio is that of the policy less that of the reference. All tensors are float32 of shape
N, one number per pair, and so are the losses. The numbers come from
evaluation/replies.py and objectives/reference.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def reward_loss(chosen_N: Tensor, rejected_N: Tensor, margin_N: Tensor | None = None, center: float = 0.0) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin): Bradley and Terry (1952), as in Ouyang et al. 2022
    (arXiv:2203.02155, eq. 1); the margin is that of Llama 2 (arXiv:2307.09288, eq. 2).

    center: weight of (r_chosen + r_rejected)^2, which keeps rewards around zero (Eisenstein et al., arXiv:2312.09244).
    """
    difference_N = chosen_N - rejected_N if margin_N is None else chosen_N - rejected_N - margin_N
    loss_N = -F.logsigmoid(difference_N)
    return loss_N + center * (chosen_N + rejected_N).square() if center else loss_N


def dpo_loss(
    chosen_N: Tensor, rejected_N: Tensor, beta: float = 0.1, label_smoothing: float = 0.0, robust: bool = False
) -> Tensor:
    """-log sigmoid(beta * (log-ratio of chosen - of rejected)): Rafailov et al. 2023 (arXiv:2305.18290, eq. 7).

    label_smoothing: the share of pairs that are taken to be labeled the wrong way round; conservative DPO mixes the
    loss with that of the swapped pair (Mitchell 2023, "A note on DPO with noisy preferences"), and `robust` takes the
    bias of such labels away (Chowdhury et al., arXiv:2403.00409, eq. 9).
    """
    logits_N = beta * (chosen_N - rejected_N)
    plain_N, swapped_N = -F.logsigmoid(logits_N), -F.logsigmoid(-logits_N)
    if robust:
        return ((1 - label_smoothing) * plain_N - label_smoothing * swapped_N) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * plain_N + label_smoothing * swapped_N if label_smoothing else plain_N


def ipo_loss(chosen_mean_N: Tensor, rejected_mean_N: Tensor, beta: float = 0.1) -> Tensor:
    """(difference of the log-ratios per token - 1 / (2 beta))^2: Azar et al. 2023 (arXiv:2310.12036, eq. 17, where beta
    is tau). Log-ratios are divided by the tokens of their reply, as the authors did, so that long replies do not rule.
    """
    return (chosen_mean_N - rejected_mean_N - 1 / (2 * beta)).square()


def kto_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Tensor:
    """The mean of desirable * (1 - sigmoid(beta * (log-ratio of chosen - kl))) and
    undesirable * (1 - sigmoid(beta * (kl - log-ratio of rejected))): Ethayarajh et al. 2024 (arXiv:2402.01306, eq. 7).

    kl: how far the policy is from the reference, 0 or more, without gradient: the mean log-ratio of replies to
    prompts that they do not belong to.
    """
    plain_N = 1 - torch.sigmoid(beta * (chosen_N - kl))
    avoided_N = 1 - torch.sigmoid(beta * (kl - rejected_N))
    return (desirable * plain_N + undesirable * avoided_N) / 2


def orpo_loss(chosen_mean_N: Tensor, rejected_mean_N: Tensor, nll: Tensor, beta: float = 0.1) -> Tensor:
    """nll - beta * log sigmoid(log odds of chosen - log odds of rejected), odds = p / (1 - p): Hong et al. 2024
    (arXiv:2403.07691, eq. 4, 6 and 7; beta is lambda), with p the mean-token probability of a reply.

    nll: of the chosen chats, nats per token, a scalar or one per pair.
    """
    log_odds_N = chosen_mean_N - rejected_mean_N - (log1mexp(chosen_mean_N) - log1mexp(rejected_mean_N))
    return nll - beta * F.logsigmoid(log_odds_N)


def simpo_loss(
    chosen_mean_N: Tensor,
    rejected_mean_N: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta * (log-probability per token of chosen - of rejected) - gamma): Meng et al. 2024
    (arXiv:2405.14734, eq. 6). No reference. label_smoothing: as in conservative DPO."""
    logits_N = beta * (chosen_mean_N - rejected_mean_N) - gamma
    loss_N = -(1 - label_smoothing) * F.logsigmoid(logits_N)
    return loss_N - label_smoothing * F.logsigmoid(-logits_N) if label_smoothing else loss_N


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by whichever form is exact there (Maechler 2012)."""
    far = x < -math.log(2)
    near_x, far_x = torch.where(far, -1.0, x.clamp(max=-1e-7)), torch.where(far, x, -1.0)  # no NaN in the unused branch
    return torch.where(far, torch.log1p(-torch.exp(far_x)), torch.log(-torch.expm1(near_x)))
