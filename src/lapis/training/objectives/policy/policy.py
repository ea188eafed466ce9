"""Learning from rewards: GRPO, RLOO and PPO. What they share is in on_policy.py; here are advantages and losses.

    rewards: [{name: number, options: {field: final}}, {name: length, weight: 0.1, options: {most: 200}}]

Shapes: P prompts, G replies of one prompt, B replies, R tokens of a reply, D model dim.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lapis.errors import ConfigError
from lapis.model.transformer import Transformer
from lapis.training.distributed.parallel import sum_over_processes
from lapis.training.objectives.objective import DataPlace, Loss
from lapis.training.objectives.policy.experience import Experience
from lapis.training.objectives.policy.guards import kl_sum
from lapis.training.objectives.policy.losses import (
    adapted_kl_weight,
    clipped_surrogate,
    clipped_value,
    gae,
    group_relative,
    k3,
    leave_one_out,
    moments,
    whiten,
)
from lapis.training.objectives.policy.on_policy import MicroBatch, OnPolicy


@dataclass(eq=False, kw_only=True)
class GRPO(OnPolicy):
    """Group-relative policy optimization (Shao et al. 2024, arXiv:2402.03300).

    kl is the weight of k3 in the loss.

    Args:
        scale: "group" divides a group's advantages by its standard deviation, "none" does not (arXiv:2503.20783).
        average: The loss over all tokens of the step ("token"; DAPO, arXiv:2503.14476), over each reply and then over
            replies ("reply"; as published), or by replies times max_tokens ("fixed"; Dr. GRPO).
        kl_unbiased: k3 times the ratio, whose gradient is that of the KL itself (arXiv:2512.02556, section 3.1); as
            published without.
    """

    scale: Literal["group", "none"] = "group"
    average: Literal["token", "reply", "fixed"] = "token"
    kl_unbiased: bool = True

    name = "grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_group(self)

    def with_advantages(self, model: Transformer, experience: Experience, turn: MicroBatch) -> Experience:
        rewards_PG = experience.rewards_B.view(-1, self.group)
        return replace(experience, advantages=group_relative(rewards_PG, self.scale == "group").flatten())

    def loss(self, model: Transformer, batch: tuple[MicroBatch, Experience]) -> Loss:
        turn, experience = batch
        scores, rollouts = self._score(model, experience), experience.rollouts
        assert experience.advantages is not None
        advantages_B1 = experience.advantages[:, None]
        loss_BR, stopped_BR = clipped_surrogate(scores.logprobs_BR, rollouts.logprobs_BR, advantages_B1, *self.bounds)
        if self.kl and experience.reference_BR is not None:
            kl_BR = k3(scores.logprobs_BR, experience.reference_BR)
            if self.kl_unbiased:
                kl_BR = kl_BR * (scores.logprobs_BR - rollouts.logprobs_BR).exp()
            loss_BR = loss_BR + self.kl * kl_BR
        mask_BR = rollouts.mask_BR
        figures = self.figures(turn, experience, scores, stopped_BR[mask_BR])
        if self.average == "token":
            return (loss_BR * mask_BR).sum(), int(mask_BR.sum()), figures
        size_B = mask_BR.sum(1) if self.average == "reply" else mask_BR.new_full((), self.max_tokens, dtype=torch.long)
        return ((loss_BR * mask_BR).sum(1) / size_B).sum(), len(experience), figures


@dataclass(eq=False, kw_only=True)
class RLOO(OnPolicy):
    """REINFORCE with the other replies of the prompt as the baseline (Ahmadian et al. 2024, arXiv:2402.14740).

    A whole reply is one action: one ratio for the reply. kl is the weight of the reply's log ratio to the reference,
    which is taken off the reward.
    """

    group: int = 4
    name = "rloo"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_group(self)

    def with_advantages(self, model: Transformer, experience: Experience, turn: MicroBatch) -> Experience:
        rewards_B = experience.rewards_B
        if self.kl and experience.reference_BR is not None:
            rollouts = experience.rollouts
            ratio_BR = (rollouts.logprobs_BR - experience.reference_BR) * rollouts.mask_BR
            rewards_B = rewards_B - self.kl * ratio_BR.sum(1)
        return replace(experience, advantages=leave_one_out(rewards_B.view(-1, self.group)).flatten())

    def loss(self, model: Transformer, batch: tuple[MicroBatch, Experience]) -> Loss:
        turn, experience = batch
        scores, rollouts = self._score(model, experience), experience.rollouts
        logp_B = (scores.logprobs_BR * rollouts.mask_BR).sum(1)
        old_B = (rollouts.logprobs_BR * rollouts.mask_BR).sum(1)
        assert experience.advantages is not None
        loss_B, stopped_B = clipped_surrogate(logp_B, old_B, experience.advantages, *self.bounds)
        return loss_B.sum(), len(experience), self.figures(turn, experience, scores, stopped_B)


@dataclass(eq=False, kw_only=True)
class PPO(OnPolicy):
    """Proximal policy optimization with a value head and GAE (Schulman et al. 2017, arXiv:1707.06347; for language
    models Ziegler et al. 2019, arXiv:1909.08593).

    The value head is one linear map on the policy's last hidden states, and starts at 0; it is not part of the result.
    A token's reward is -kl times its log ratio to the reference, and the reply's reward comes with its last token.

    Args:
        gamma: Of GAE: discount of later rewards.
        lam: Of GAE.
        value_epsilon: How far a value may move before it is clipped.
        value_weight: Weight of the value loss.
        entropy: Weight of an entropy bonus.
        whiten: Advantages with mean 0 and variance 1 over the tokens of the step.
        kl_target: Nats per reply that kl is adapted to; 0 = kl stays as it is.
        kl_horizon: Replies over which kl may change by a factor of about e.
    """

    group: int = 1
    kl: float = 0.05
    updates: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    value_epsilon: float = 0.2
    value_weight: float = 0.1
    entropy: float = 0.0
    whiten: bool = True
    kl_target: float = 0.0
    kl_horizon: int = 10_000

    name = "ppo"
    _head: nn.Linear | None = field(default=None, init=False, repr=False)
    # the KL weight of the latest rollout, and of the one after it
    _weights: tuple[int, float, float] = field(default=(-1, 0.0, 0.0), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fits, expected in (
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
            ("lam", 0 <= self.lam <= 1, "from 0 to 1"),
            ("value_epsilon", self.value_epsilon > 0, "above 0"),
            ("value_weight", self.value_weight >= 0, "0 or more"),
            ("entropy", self.entropy >= 0, "0 or more"),
            ("kl_target", self.kl_target >= 0, "0 (fixed) or more"),
            ("kl_horizon", self.kl_horizon > 0, "above 0"),
        ):
            if not fits:
                raise ConfigError(f"ppo: {name} is {getattr(self, name)}; expected {expected}")

    @property
    def extra_module(self) -> nn.Module | None:
        return self._head

    def begin(self, model: Transformer, folder: Path | None = None) -> None:
        weight = model.embed.weight
        self._head = nn.Linear(model.config.dim, 1, device=weight.device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        super().begin(model, folder)

    def small_batch(self, model: Transformer, state: DataPlace, tokens: int) -> tuple[MicroBatch, Experience]:
        turn, experience = super().small_batch(model, state, tokens)
        zeros_BR = torch.zeros_like(experience.rollouts.logprobs_BR)
        return turn, replace(experience, advantages=zeros_BR, values_BR=zeros_BR, returns_BR=zeros_BR)

    def values(self, hidden_ND: Tensor, mask_BR: Tensor) -> Tensor:
        """What the value head expects before each token, [B, R], 0 outside the mask."""
        assert self._head is not None
        values_N = self._head(hidden_ND.float())[:, 0].float()
        return torch.zeros(mask_BR.shape, device=mask_BR.device).masked_scatter(mask_BR, values_N)

    @torch.no_grad()
    def with_advantages(self, model: Transformer, experience: Experience, turn: MicroBatch) -> Experience:
        rollouts, mask_BR = experience.rollouts, experience.rollouts.mask_BR
        values_BR = self.values(self._score(model, experience).hidden_ND, mask_BR)
        scored_BR = mask_BR & experience.rewards_B.isfinite()[:, None]
        weight = self._kl_weight(turn.round)
        rewards_BR = torch.zeros_like(values_BR)
        if experience.reference_BR is not None:
            rewards_BR -= weight * (rollouts.logprobs_BR - experience.reference_BR) * mask_BR
        last_B1 = mask_BR.sum(1, keepdim=True) - 1
        rewards_BR.scatter_add_(1, last_B1, experience.rewards_B.nan_to_num(0.0)[:, None])
        advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, self.gamma, self.lam)
        if self.whiten:
            advantages_BR = whiten(advantages_BR, scored_BR, sum_over_processes(moments(advantages_BR, scored_BR)))
        self._adapt(turn.round, weight, experience)
        return replace(experience, advantages=advantages_BR * scored_BR, values_BR=values_BR, returns_BR=returns_BR)

    def loss(self, model: Transformer, batch: tuple[MicroBatch, Experience]) -> Loss:
        turn, experience = batch
        scores = self._score(model, experience, learn_entropy=self.entropy > 0)
        rollouts = experience.rollouts
        scored_BR = rollouts.mask_BR & experience.rewards_B.isfinite()[:, None]
        assert experience.advantages is not None and experience.values_BR is not None
        assert experience.returns_BR is not None
        loss_BR, stopped_BR = clipped_surrogate(
            scores.logprobs_BR, rollouts.logprobs_BR, experience.advantages, *self.bounds
        )
        values_BR = self.values(scores.hidden_ND, rollouts.mask_BR)
        value_BR = clipped_value(values_BR, experience.values_BR, experience.returns_BR, self.value_epsilon)
        loss_BR = loss_BR + self.value_weight * value_BR
        if self.entropy:
            loss_BR = loss_BR - self.entropy * scores.entropy_BR
        figures = self.figures(turn, experience, scores, stopped_BR[rollouts.mask_BR])
        figures |= {
            "value_loss": value_BR.detach()[scored_BR].sum().item() / max(1, int(scored_BR.sum())),
            "kl_weight": self._weights[1],
        }
        return (loss_BR * scored_BR).sum(), int(scored_BR.sum()), figures

    def _kl_weight(self, number: int) -> float:
        """The KL weight for rollout `number`; the same each time it is called."""
        at, now, after = self._weights
        return now if number == at else self.kl if at < 0 else after

    def _adapt(self, number: int, weight: float, experience: Experience) -> None:
        after = weight
        if self.kl_target and experience.reference_BR is not None:
            ones = experience.rewards_B.new_tensor(float(len(experience)), dtype=torch.float64)
            kl, replies = sum_over_processes(torch.stack([kl_sum(experience), ones])).tolist()
            after = adapted_kl_weight(weight, kl / replies, self.kl_target, self.kl_horizon, int(replies))
        self._weights = (number, weight, after)

    def state_tensors(self) -> dict[str, Tensor]:
        assert self._head is not None
        weights = {"weights": torch.tensor(self._weights, dtype=torch.float64)}
        return super().state_tensors() | weights | {f"head.{name}": t for name, t in self._head.state_dict().items()}

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().restore_tensors(tensors)
        assert self._head is not None
        self._head.load_state_dict({name[5:]: t for name, t in tensors.items() if name.startswith("head.")})
        at, now, after = tensors["weights"].tolist()
        self._weights = (int(at), now, after)


def _require_group(objective: OnPolicy) -> None:
    if objective.group < 2:
        raise ConfigError(
            f"{objective.name}: group is {objective.group}; a reply is compared with others, give 2 or more"
        )
