"""The reward model: one number for a whole chat, higher for the reply that people chose.

The result is a folder that transformers opens as AutoModelForSequenceClassification with num_labels=1, with the same
scores. Leaves out: rewards for single steps of a reply.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lapis.errors import ConfigError
from lapis.evaluation.replies import reply_rewards, rewards
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import Paired
from lapis.training.objectives.objective import Loss
from lapis.training.objectives.preference.losses import reward_loss
from lapis.training.objectives.preference.pairwise import PairBatch, Pairwise, reward_sums


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
