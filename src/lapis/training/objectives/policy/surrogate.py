"""What policies minimize: clipped surrogates, the KL estimator k3, the clipped value loss. Pure functions.

Leaves out: how losses are averaged (training/objectives/policy/policy.py).

Shapes: B replies, R tokens of a reply; "..." stands for either.
"""

import torch
from torch import Tensor


def clipped(logp: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and where clipping took the gradient away (PPO; Schulman et al.
    2017, arXiv:1707.06347, equation 7; `high` apart from `low`: DAPO, arXiv:2503.14476).

    logp, old: log-probabilities of what was said, under the policy and under the one that said it, of equal shape.
    """
    ratio = (logp - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    stopped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return loss, stopped.detach()


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - logp: an estimator of KL(policy, reference) that is never negative
    (Schulman 2020, joschu.net/blog/kl-approx.html)."""
    difference = reference - logp
    return difference.exp() - difference - 1


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, epsilon: float) -> Tensor:
    """max((v - R)^2, (old + clip(v - old, -epsilon, epsilon) - R)^2) / 2 (Schulman et al. 2017, and Ziegler et al.
    2019's code): a value moves no further than epsilon from what it was at the rollout."""
    near = old + (values - old).clamp(-epsilon, epsilon)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
