"""The reward model: one number for a whole chat, higher for the reply that people chose.

The result is a folder that transformers opens as AutoModelForSequenceClassification with num_labels=1, with the same
scores. Leaves out: rewards for single steps of a reply.
"""

from typing import Any

import numpy as np
from torch import Tensor

from lapis.errors import ConfigError
from lapis.evaluation.replies import reply_rewards, rewards
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import Paired, Sources, TooLong
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.preference.pair_losses import reward_loss
from lapis.training.objectives.preference.pairwise import PairBatch, Pairwise, shown


class Reward(Pairwise):
    """A reward model, by the loss of Bradley and Terry on pairs (see reward_loss).

    data: .jsonl of prompt, chosen, rejected, and where wanted margin. valid: the same, held out: accuracy, calibration
    and what length has to do with the rewards are reported on it. context: tokens of a chat. too_long: a chat that is
    longer is cut at its end, or its pair dropped; both are counted. margins: heed the records' margins. center: weight
    of a penalty that keeps rewards around zero.
    """

    head = "scalar"
    name = "reward"
    spoken_only = False  # others score a chat as the template writes it, to its last character

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        *,
        context: int = 512,
        too_long: TooLong = "cut",
        valid: Any = None,
        margins: bool = True,
        center: float = 0.0,
    ) -> None:
        super().__init__(tokenizer, data, context, too_long, valid, margins=margins, center=center)
        if center < 0:
            raise ConfigError(f"reward: center is {center}; it must not be below 0")
        self.center, self.margins = center, margins and bool(self.data.margins.any())

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        config = model.config
        if config.head != "scalar":
            raise ConfigError(f"reward: the model's head is {config.head}; put a scalar one on with: "
                              'lapis.model.heads.put_head(model, "scalar")')  # fmt: skip
        if self.tokenizer.pad_id is not None:
            config.extra.setdefault("pad_token_id", self.tokenizer.pad_id)  # where others look for a chat's last token
        return super().prepare(model, batch)

    def loss(self, model: Transformer, batch: PairBatch) -> tuple[Tensor, int, dict[str, float]]:
        reward_S = rewards(model, batch.replies)
        chosen_N, rejected_N = reward_S.chunk(2)
        loss_N = reward_loss(chosen_N, rejected_N, batch.margins_N if self.margins else None, self.center)
        return loss_N.sum(), len(loss_N), {"tokens": batch.replies.tokens, **shown(reward_S)}

    def held_out(self, model: Transformer, valid: Paired) -> "np.ndarray[Any, Any]":
        return np.asarray(reply_rewards(model, valid.replies))

    def sample(self, model: Transformer) -> str:
        """The rewards of the first pair."""
        data = self.valid or self.data
        first = data.replies[0]
        chosen, rejected = reply_rewards(model, data.replies[:2])
        said = " ".join(self.tokenizer.decode(first.ids[: first.first].tolist(), True).split())
        return f"{said[:60]} -> chosen {chosen:.2f}, rejected {rejected:.2f}"
