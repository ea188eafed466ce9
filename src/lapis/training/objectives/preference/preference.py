"""Learning from preference pairs without a reward model: DPO, IPO, KTO (with a reference), ORPO, SimPO (without one).

Each is its loss (pair_losses.py) over one forward pass of both replies. A loss is a mean over pairs, so micro-batches
and ranks do not change it, but for two terms that the methods define on a batch: KTO's distance from the reference and
ORPO's likelihood of the chosen chats are those of a micro-batch. Leaves out: the policy's own samples (policy.py).

Shapes: N pairs, S = 2N replies, the chosen ones first.
"""

import dataclasses
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapis.errors import TrainingError
from lapis.evaluation.replies import collate, log_probabilities, reply_log_probabilities
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import Paired, Sources, TooLong
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.preference.pair_losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from lapis.training.objectives.preference.pairwise import PairBatch, Pairwise, shown
from lapis.training.objectives.preference.reference import references, without_adapter


class _Policy(Pairwise):
    """Abstract: a language model that is trained on the log-probabilities of both replies."""

    head = "language"
    per_token = False  # replies are compared by their log-probability per token
    beta: float

    def loss(self, model: Transformer, batch: PairBatch) -> tuple[Tensor, int, dict[str, float]]:
        logp_S, told_R = log_probabilities(model, batch.replies)
        value_S = logp_S if batch.reference_S is None else logp_S - batch.reference_S
        if self.per_token:
            value_S = value_S / batch.replies.sizes_S
        chosen_N, rejected_N = value_S.chunk(2)
        loss_N = self._losses(chosen_N, rejected_N, batch, told_R)
        found = {"tokens": batch.replies.tokens, **shown(self.beta * value_S)}
        if batch.kl is not None:
            found["kl"] = float(batch.kl) * len(loss_N)
        return loss_N.sum(), len(loss_N), found

    @abstractmethod
    def _losses(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, told_R: Tensor) -> Tensor:
        """One per pair. told_R: log-probabilities of all scored tokens."""

    def held_out(self, model: Transformer, valid: Paired) -> "np.ndarray[Any, Any]":
        values = reply_log_probabilities(model, valid.replies) - self._against(valid)
        sizes = np.asarray([len(reply) for reply in valid.replies])
        return self.beta * (values / sizes if self.per_token else values)

    def _against(self, valid: Paired) -> "np.ndarray[Any, Any] | float":
        return 0.0


class _Referenced(_Policy):
    """Abstract: the policy is compared with a reference (see reference.py)."""

    mismatched = False  # the reference is asked of replies to other prompts as well

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        context: int,
        too_long: TooLong,
        valid: Sources | None,
        reference: str,
        **options: float | str | bool,
    ) -> None:
        super().__init__(tokenizer, data, context, too_long, valid, reference=reference, **options)
        self.reference = reference
        self._kept: dict[str, Tensor] | None = None

    def begin(self, model: Transformer, folder: Path | None = None) -> None:
        """Called before the first step, with the weights that the run starts from, also where it then goes on from a
        checkpoint. folder: where the reference's log-probabilities are kept, if anywhere."""
        asked = {"train": self.data.replies, "valid": self.valid.replies if self.valid else []}
        if self.mismatched:
            asked["mismatched"] = [self.data.mismatched(pair) for pair in range(len(self.data))]
        if self.reference == "base":
            with without_adapter(model):
                self._kept = references(model, self.tokenizer, "base", {"valid": asked["valid"]}, None)
            return
        self._kept = references(model, self.tokenizer, self.reference, asked, folder)

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        if self._kept is None:
            raise TrainingError(f"{self.name}: the reference is not known yet; call begin(model) before the first step")
        batch = super().prepare(model, batch)
        device = batch.margins_N.device
        if self.reference == "base":
            with without_adapter(model), torch.no_grad():
                return dataclasses.replace(batch, reference_S=log_probabilities(model, batch.replies)[0])
        numbers = [2 * pair + side for side in (0, 1) for pair in batch.pairs]
        return dataclasses.replace(batch, reference_S=self._kept["train"][numbers].to(device))

    def _against(self, valid: Paired) -> "np.ndarray[Any, Any] | float":
        if self._kept is None or "valid" not in self._kept:
            raise TrainingError(f"{self.name}: the reference is not known yet; call begin(model) before the first step")
        return self._kept["valid"].double().numpy()


class DPO(_Referenced):
    """Direct preference optimization (arXiv:2305.18290; see dpo_loss).

    data: .jsonl of prompt, chosen and rejected. valid: the same, held out: accuracy of the implicit rewards, their
    calibration and what length has to do with them are reported on it. context: tokens of a chat. too_long: a chat
    that is longer is cut at its end, or its pair dropped; both are counted. reference: "start" (the policy before the
    run), "base" (the model without its adapter), or the folder of a model that the policy descends from. beta: how
    dear it is to move away from the reference. label_smoothing: share of labels that are taken to be wrong; robust:
    in the unbiased form.
    """

    name = "dpo"

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        *,
        context: int = 512,
        too_long: TooLong = "cut",
        valid: Any = None,
        reference: str = "start",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        robust: bool = False,
    ) -> None:
        super().__init__(tokenizer, data, context, too_long, valid, reference,
                         beta=beta, label_smoothing=label_smoothing, robust=robust)  # fmt: skip
        self.beta, self.label_smoothing, self.robust = beta, label_smoothing, robust

    def _losses(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, told_R: Tensor) -> Tensor:
        return dpo_loss(chosen_N, rejected_N, self.beta, self.label_smoothing, self.robust)


class IPO(_Referenced):
    """Identity preference optimization (arXiv:2310.12036; see ipo_loss): the difference is led to 1 / (2 beta) nats per
    token, and no further. The options are those of DPO, without smoothing."""

    name = "ipo"
    per_token = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        *,
        context: int = 512,
        too_long: TooLong = "cut",
        valid: Any = None,
        reference: str = "start",
        beta: float = 0.1,
    ) -> None:
        super().__init__(tokenizer, data, context, too_long, valid, reference, beta=beta)
        self.beta = beta

    def _losses(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, told_R: Tensor) -> Tensor:
        return ipo_loss(chosen_N, rejected_N, self.beta)


class KTO(_Referenced):
    """Kahneman-Tversky optimization (arXiv:2402.01306; see kto_loss), each pair being a desirable and an undesirable
    reply. The options are those of DPO; desirable, undesirable: weights of the two kinds. The distance from the
    reference is measured on each micro-batch, on its prompts with replies of the next pairs."""

    name = "kto"
    mismatched = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        *,
        context: int = 512,
        too_long: TooLong = "cut",
        valid: Any = None,
        reference: str = "start",
        beta: float = 0.1,
        desirable: float = 1.0,
        undesirable: float = 1.0,
    ) -> None:
        super().__init__(tokenizer, data, context, too_long, valid, reference,
                         beta=beta, desirable=desirable, undesirable=undesirable)  # fmt: skip
        self.beta, self.desirable, self.undesirable = beta, desirable, undesirable

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        batch = super().prepare(model, batch)
        others = collate([self.data.mismatched(pair) for pair in batch.pairs]).to(batch.margins_N.device)
        with torch.no_grad():
            logp_N = log_probabilities(model, others)[0]
            if self.reference == "base":
                with without_adapter(model):
                    reference_N = log_probabilities(model, others)[0]
            else:
                assert self._kept is not None
                reference_N = self._kept["mismatched"][batch.pairs].to(logp_N.device)
            return dataclasses.replace(batch, kl=(logp_N - reference_N).mean().clamp(min=0))

    def _losses(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, told_R: Tensor) -> Tensor:
        assert batch.kl is not None
        return kto_loss(chosen_N, rejected_N, batch.kl, self.beta, self.desirable, self.undesirable)


class ORPO(_Policy):
    """Odds ratio preference optimization (arXiv:2403.07691; see orpo_loss): supervised tuning on the chosen chats, with
    their prompts, and the odds of the replies, at once and without a reference. The options are those of DPO; beta:
    weight of the odds."""

    name = "orpo"
    per_token = True
    whole = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        *,
        context: int = 512,
        too_long: TooLong = "cut",
        valid: Any = None,
        beta: float = 0.1,
    ) -> None:
        super().__init__(tokenizer, data, context, too_long, valid, beta=beta)
        self.beta = beta

    def _losses(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, told_R: Tensor) -> Tensor:
        nll = -told_R[batch.replies.owner_R < len(chosen_N)].mean()
        return orpo_loss(chosen_N, rejected_N, nll, self.beta)


class SimPO(_Policy):
    """Simple preference optimization (arXiv:2405.14734; see simpo_loss): the log-probability per token is the reward,
    without a reference. The options are those of DPO; gamma: by how much the chosen reply should lead."""

    name = "simpo"
    per_token = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        *,
        context: int = 512,
        too_long: TooLong = "cut",
        valid: Any = None,
        beta: float = 2.0,
        gamma: float = 0.5,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(tokenizer, data, context, too_long, valid,
                         beta=beta, gamma=gamma, label_smoothing=label_smoothing)  # fmt: skip
        self.beta, self.gamma, self.label_smoothing = beta, gamma, label_smoothing

    def _losses(self, chosen_N: Tensor, rejected_N: Tensor, batch: PairBatch, told_R: Tensor) -> Tensor:
        return simpo_loss(chosen_N, rejected_N, self.beta, self.gamma, self.label_smoothing)
