"""The figures of a policy's step, and what the guards are told of a rollout. Leaves out: who shows them.

Shapes: B replies, R tokens of a reply.
"""

import math

import torch
from torch import Tensor

from lapis.training.distributed.ranks import added
from lapis.training.objectives.policy.experience import Experience
from lapis.training.objectives.policy.guards import repetition
from lapis.training.objectives.policy.rollouts import Said
from lapis.training.objectives.policy.surrogate import k3


def step_figures(experience: Experience, said: Said, stopped: Tensor) -> dict[str, float]:
    """What every policy objective reports of a micro-batch. stopped: where clipping took the gradient away.

    kl: nats per token from the policy that drew to the reference, estimated by k3. policy_shift: the same to the policy
    as it is now. unscored: share of replies without a reward. A reward that no reply has is left out.
    """
    rollouts, mask_BR = experience.rollouts, experience.rollouts.mask_BR
    tokens = int(mask_BR.sum())
    logp_BR = said.logprobs_BR.detach()
    found = _means({"reward": experience.rewards_B})
    if experience.reference_BR is not None:
        found["kl"] = (k3(rollouts.logprobs_BR, experience.reference_BR) * mask_BR).sum().item() / tokens
    found |= {
        "length": tokens / len(experience),
        "entropy": said.entropy_BR.detach().sum().item() / tokens,
        "clip_share": stopped.double().mean().item(),
        "policy_shift": (k3(rollouts.logprobs_BR, logp_BR) * mask_BR).sum().item() / tokens,
        "ended": rollouts.ended_B.double().mean().item(),
        "unscored": experience.rewards_B.isnan().double().mean().item(),
        "tokens": float(rollouts.ids_BT.numel()),
    }
    if len(experience.parts) > 1:
        found |= _means({f"reward_{name}": values for name, values in experience.parts.items()})
    return found


def guard_figures(experience: Experience) -> dict[str, float]:
    """Means over the rollouts of all processes, as `Guards.see` wants them. Entropy: of what was drawn, by its
    log-probabilities. kl: by its log ratios; NaN where there is no reference."""
    rollouts, known_B = experience.rollouts, experience.rewards_B.isfinite()
    tokens = rollouts.mask_BR.sum().double()
    sums = torch.stack([
        known_B.sum().double(), experience.rewards_B[known_B].double().sum(), tokens,
        -rollouts.logprobs_BR.double().sum(), kl_sum(experience), tokens.new_tensor(float(len(experience))),
        tokens.new_tensor(repetition(rollouts.reply_BR.tolist(), rollouts.mask_BR.sum(1).tolist())),
    ])  # fmt: skip
    known, reward, tokens_, nats, kl, replies, repeated = added(sums).tolist()
    return {"reward": reward / known, "entropy": nats / tokens_, "length": tokens_ / replies,
            "repetition": repeated / replies, "kl": kl / tokens_}  # fmt: skip


def kl_sum(experience: Experience) -> Tensor:
    """Nats over all tokens of what was drawn, to the reference, float64; NaN where there is no reference."""
    rollouts = experience.rollouts
    if experience.reference_BR is None:
        return rollouts.logprobs_BR.new_tensor(math.nan, dtype=torch.float64)
    return ((rollouts.logprobs_BR - experience.reference_BR).double() * rollouts.mask_BR).sum()


def _means(named: dict[str, Tensor]) -> dict[str, float]:
    """Of each that has a number."""
    return {name: values.nanmean().item() for name, values in named.items() if bool(values.isfinite().any())}
