"""Learning from preference pairs: DPO, IPO, KTO (with a reference), ORPO, SimPO (without one), and the reward model.

Each is its loss (losses.py) over one forward pass of both replies. A loss is a mean over pairs, so micro-batches and
processes do not change it, except for two terms that the methods define on a batch: KTO's distance from the reference
and ORPO's likelihood of the chosen chats are those of a micro-batch.

A reward model gives one number for a whole chat, higher for the reply that people chose. Its folder opens in
transformers as AutoModelForSequenceClassification with num_labels=1, with the same scores. Leaves out: rewards for
single steps of a reply.

Shapes: N pairs, S = 2N replies, the chosen ones first.
"""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lapis.errors import ConfigError, TrainingError
from lapis.evaluation.replies import collate, log_probabilities, reply_log_probabilities, reply_rewards, rewards
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import Paired
from lapis.training.objectives.objective import Loss
from lapis.training.objectives.preference.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, reward_loss, simpo_loss
from lapis.training.objectives.preference.pairwise import PairBatch, Pairwise, reward_sums
from lapis.training.objectives.reference import check_tokenizer, reply_references, without_adapter


@dataclass(eq=False, kw_only=True)
class ReplyPolicy(Pairwise):
    """Base class: a language model that is trained on the log-probabilities of both replies.

    Args:
        beta: The scale of the implicit rewards; how costly it is to move away from the reference.
    """

    beta: float = 0.1

    per_token: ClassVar[bool] = False
    """Whether replies are compared by their log-probability per token."""

    def loss(self, model: Transformer, batch: PairBatch) -> Loss:
        logp_S, logp_R = log_probabilities(model, batch.replies)
        value_S = logp_S if batch.reference_S is None else logp_S - batch.reference_S
        if self.per_token:
            value_S = value_S / batch.replies.sizes_S
        chosen_N, rejected_N = value_S.chunk(2)
        loss_N = self.pair_loss(chosen_N, rejected_N, batch, logp_R)
        metrics = {"tokens": batch.replies.tokens, **reward_sums(self.beta * value_S)}
        if batch.kl is not None:
            metrics["kl"] = float(batch.kl) * len(loss_N)
        return loss_N.sum(), len(loss_N), metrics

    @abstractmethod
    def pair_loss(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, logp_R: Tensor) -> Tensor:
        """The loss of each pair, [N]. logp_R: log-probabilities of all scored tokens."""

    def reply_values(self, model: Transformer, held_out: Paired) -> "np.ndarray[Any, Any]":
        values = reply_log_probabilities(model, held_out.replies, progress=self.heard) - self._held_out_reference()
        sizes = np.asarray([len(reply) for reply in held_out.replies])
        return self.beta * (values / sizes if self.per_token else values)

    def _held_out_reference(self) -> "np.ndarray[Any, Any] | float":
        return 0.0


@dataclass(eq=False, kw_only=True)
class ReferencedPolicy(ReplyPolicy):
    """Base class: the policy is compared with a reference (objectives/reference.py).

    Args:
        reference: "start" (the policy before the run), "base" (the model without its adapter), or the folder of a model
            that the policy descends from.
    """

    reference: str = "start"

    computes_first = True
    mismatched: ClassVar[bool] = False
    """Whether the reference scores replies to other prompts as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokenizer(self.reference, self.tokenizer)
        self._reference: dict[str, Tensor] | None = None

    def begin(self, model: Transformer, folder: Path | None = None) -> None:
        replies = {"train": self.examples.replies, "valid": self.held_out.replies if self.held_out else []}
        if self.mismatched:
            replies["mismatched"] = [self.examples.mismatched(pair) for pair in range(len(self.examples))]
        if self.reference == "base":
            with without_adapter(model):
                held_out = {"valid": replies["valid"]}
                self._reference = reply_references(model, self.tokenizer, "base", held_out, None, self.heard)
            return
        self._reference = reply_references(model, self.tokenizer, self.reference, replies, folder, self.heard)

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        known = self._known()
        batch = super().prepare(model, batch)
        if self.reference == "base":
            with without_adapter(model), torch.no_grad():
                return dataclasses.replace(batch, reference_S=log_probabilities(model, batch.replies)[0])
        numbers = [2 * pair + side for side in (0, 1) for pair in batch.pairs]
        return dataclasses.replace(batch, reference_S=known["train"][numbers].to(batch.margins_N.device))

    def _held_out_reference(self) -> "np.ndarray[Any, Any] | float":
        return self._known()["valid"].double().numpy()

    def _known(self) -> dict[str, Tensor]:
        if self._reference is None:
            raise TrainingError(f"{self.name}: the reference is not known yet; call begin(model) before the first step")
        return self._reference


@dataclass(eq=False, kw_only=True)
class DPO(ReferencedPolicy):
    """Direct preference optimization (arXiv:2305.18290; see dpo_loss). valid: accuracy and calibration are those of the
    implicit rewards.

    Args:
        label_smoothing: Share of labels that are taken to be wrong.
        robust: Smooth in the unbiased form.
    """

    label_smoothing: float = 0.0
    robust: bool = False

    name = "dpo"

    def pair_loss(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, logp_R: Tensor) -> Tensor:
        return dpo_loss(chosen_N, rejected_N, self.beta, self.label_smoothing, self.robust)


@dataclass(eq=False, kw_only=True)
class IPO(ReferencedPolicy):
    """Identity preference optimization (arXiv:2310.12036; see ipo_loss): the difference is led to 1 / (2 beta) nats per
    token, and no further."""

    name = "ipo"
    per_token = True

    def pair_loss(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, logp_R: Tensor) -> Tensor:
        return ipo_loss(chosen_N, rejected_N, self.beta)


@dataclass(eq=False, kw_only=True)
class KTO(ReferencedPolicy):
    """Kahneman-Tversky optimization (arXiv:2402.01306; see kto_loss), each pair being a desirable and an undesirable
    reply. The distance from the reference is measured on each micro-batch, on its prompts with replies of the next
    pairs.

    Args:
        desirable: Weight of the chosen replies.
        undesirable: Weight of the rejected replies.
    """

    desirable: float = 1.0
    undesirable: float = 1.0

    name = "kto"
    separable = False
    mismatched = True
    verdicts = True

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        batch = super().prepare(model, batch)
        others = collate([self.examples.mismatched(pair) for pair in batch.pairs]).to(batch.margins_N.device)
        with torch.no_grad():
            logp_N = log_probabilities(model, others)[0]
            if self.reference == "base":
                with without_adapter(model):
                    reference_N = log_probabilities(model, others)[0]
            else:
                reference_N = self._known()["mismatched"][batch.pairs].to(logp_N.device)
            return dataclasses.replace(batch, kl=(logp_N - reference_N).mean().clamp(min=0))

    def pair_loss(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, logp_R: Tensor) -> Tensor:
        assert batch.kl is not None
        return kto_loss(chosen_N, rejected_N, batch.kl, self.beta, self.desirable, self.undesirable)


@dataclass(eq=False, kw_only=True)
class ORPO(ReplyPolicy):
    """Odds ratio preference optimization (arXiv:2403.07691; see orpo_loss): supervised tuning on the chosen chats, with
    their prompts, and the odds of the replies, at once and without a reference. The chats count by the mean over the
    tokens of a micro-batch, as in TRL. beta: weight of the odds."""

    name = "orpo"
    separable = False
    per_token = True
    with_prompts = True

    def pair_loss(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, logp_R: Tensor) -> Tensor:
        nll = -logp_R[batch.replies.owner_R < len(chosen_N)].mean()
        return orpo_loss(chosen_N, rejected_N, nll, self.beta)


@dataclass(eq=False, kw_only=True)
class SimPO(ReplyPolicy):
    """Simple preference optimization (arXiv:2405.14734; see simpo_loss): the log-probability per token is the reward,
    without a reference.

    Args:
        gamma: By how much the chosen reply should lead.
        label_smoothing: Share of labels that are taken to be wrong.
    """

    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0

    name = "simpo"
    per_token = True

    def pair_loss(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, logp_R: Tensor) -> Tensor:
        return simpo_loss(chosen_N, rejected_N, self.beta, self.gamma, self.label_smoothing)


@dataclass(eq=False, kw_only=True)
class Reward(Pairwise):
    """A reward model, by the loss of Bradley and Terry on pairs (see reward_loss).

    Args:
        margins: Use the margins of the records.
        center: Weight of a penalty that keeps rewards around zero.
    """

    margins: bool = True
    center: float = 0.0

    name = "reward"
    head = "scalar"
    reply_only = False  # other tools score a chat as the template writes it, to its last character

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center < 0:
            raise ConfigError(f"reward: center is {self.center}; it must not be below 0")
        self._uses_margins = self.margins and bool(self.examples.margins.any())

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        config = model.config
        if config.head != "scalar":
            raise ConfigError(f"reward: the model's head is {config.head}; put a scalar one on with: "
                              'lapis.model.transformer.put_head(model, "scalar")')  # fmt: skip
        if self.tokenizer.pad_id is not None:
            config.extra.setdefault("pad_token_id", self.tokenizer.pad_id)  # where others look for a chat's last token
        return super().prepare(model, batch)

    def loss(self, model: Transformer, batch: PairBatch) -> Loss:
        reward_S = rewards(model, batch.replies)
        chosen_N, rejected_N = reward_S.chunk(2)
        loss_N = reward_loss(chosen_N, rejected_N, batch.margins_N if self._uses_margins else None, self.center)
        return loss_N.sum(), len(loss_N), {"tokens": batch.replies.tokens, **reward_sums(reward_S)}

    def reply_values(self, model: Transformer, held_out: Paired) -> "np.ndarray[Any, Any]":
        return np.asarray(reply_rewards(model, held_out.replies, progress=self.heard))

    def sample(self, model: Transformer) -> str:
        """The rewards of the first pair."""
        replies = (self.held_out or self.examples).replies
        first = replies[0]
        chosen, rejected = reply_rewards(model, replies[:2])
        text = " ".join(self.tokenizer.decode(first.ids[: first.first].tolist(), True).split())
        return f"{text[:60]} -> chosen {chosen:.2f}, rejected {rejected:.2f}"
