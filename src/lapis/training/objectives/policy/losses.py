"""What policies learn from and what they minimize, as pure functions: advantages, then losses.

Advantages are rewards relative to a group, to the other replies, or to a value head (GAE). Losses are clipped
surrogates, the KL estimator k3 and the clipped value loss.

Shapes: P prompts, G replies of one prompt, B replies, R tokens of a reply; "..." is B or [B, R].
"""

import torch
from torch import Tensor

_TINY = 1e-4  # added to a standard deviation before dividing by it


def group_relative(rewards_PG: Tensor, scaled: bool) -> Tensor:
    """Reward less the group's mean, and, where `scaled`, by its standard deviation (GRPO; Shao et al. 2024,
    arXiv:2402.03300, section 4.1.1; without it, Liu et al. 2025, arXiv:2503.20783).

    Args:
        rewards_PG: float32. NaN = could not be scored: such a reply counts in no mean and has the advantage 0.
        scaled: Divide by the standard deviation of the group, that of a sample (G - 1). A group in which fewer than two
            replies have a reward has none.
    """
    centered_PG = rewards_PG - rewards_PG.nanmean(1, keepdim=True)
    if scaled:
        counts_P1 = rewards_PG.isfinite().sum(1, keepdim=True)
        variance_P1 = centered_PG.square().nansum(1, keepdim=True) / (counts_P1 - 1).clamp(min=1)
        centered_PG = centered_PG / (variance_P1.sqrt() + _TINY)
    return centered_PG.nan_to_num(0.0)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Reward less the mean reward of the prompt's other replies (RLOO; Ahmadian et al. 2024, arXiv:2402.14740,
    section 3.2). NaN as in `group_relative`."""
    known_PG = rewards_PG.isfinite()
    others_PG = rewards_PG.nansum(1, keepdim=True) - rewards_PG
    baseline_PG = others_PG / (known_PG.sum(1, keepdim=True) - 1)
    return (rewards_PG - baseline_PG).nan_to_num(0.0, 0.0, 0.0)


def gae(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantages and the returns that values should have been (Schulman et al. 2016, arXiv:1506.02438,
    equation 16), each [B, R], 0 outside the mask.

    Args:
        rewards_BR: Of each token.
        values_BR: Of the state before each token. A reply ends at its last token, whether by the end token or by
            length: nothing is expected after it.
        mask_BR: True for the tokens of a reply, which are at the front of the row.
        gamma: Discount of later rewards.
        lam: Between one-step (0) and whole-reply (1) estimates.
    """
    rewards_BR, values_BR = rewards_BR * mask_BR, values_BR * mask_BR
    advantages_BR = torch.zeros_like(values_BR)
    after_B, next_value_B = torch.zeros_like(values_BR[:, 0]), torch.zeros_like(values_BR[:, 0])
    for place in range(values_BR.shape[1] - 1, -1, -1):
        surprise_B = rewards_BR[:, place] + gamma * next_value_B - values_BR[:, place]
        after_B = (surprise_B + gamma * lam * after_B) * mask_BR[:, place]
        advantages_BR[:, place] = after_B
        next_value_B = values_BR[:, place]
    return advantages_BR, advantages_BR + values_BR


def moments(x_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Count, sum and sum of squares under the mask, float64 [3]: what `whiten` needs, and what processes add up."""
    x = x_BR[mask_BR].double()
    return torch.stack((x.new_tensor(float(x.numel())), x.sum(), x.square().sum()))


def whiten(x_BR: Tensor, mask_BR: Tensor, moments_3: Tensor) -> Tensor:
    """x with mean 0 and variance 1 under the mask, by its `moments`; 0 elsewhere. A constant becomes 0."""
    count, total, squares = moments_3.tolist()
    mean = total / max(count, 1.0)
    variance = max(0.0, squares / max(count, 1.0) - mean**2)
    white_BR: Tensor = (x_BR - mean) / (variance + 1e-8) ** 0.5 * mask_BR
    return white_BR


def adapted_kl_weight(coefficient: float, kl: float, target: float, horizon: int, replies: int) -> float:
    """The KL coefficient for the next rollouts: it grows while the KL (nats per reply) is above `target` (Ziegler et
    al. 2019, arXiv:1909.08593, section 2.2). horizon: replies over which it may change by a factor of about e."""
    error = min(0.2, max(-0.2, kl / target - 1))
    return coefficient * (1 + error * replies / horizon)


def clipped_surrogate(logp: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and where clipping leaves no gradient (PPO; Schulman et al.
    2017, arXiv:1707.06347, equation 7; `high` apart from `low`: DAPO, arXiv:2503.14476).

    Args:
        logp: Log-probabilities under the policy, [...].
        old: The same under the policy that sampled, [...].
        advantages: Broadcast to [...].
        low: How far a ratio may fall below 1.
        high: How far it may rise above 1.

    Returns:
        The loss and a bool mask of clipped places, [...] each.
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
