"""A reward model as a reward: the whole chat, in the reward model's own tokens, scored by its scalar head.

Policy and reward model may have different tokenizers: the reply goes over as text.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from lapis.errors import ConfigError, DataError, TemplateError
from lapis.evaluation.replies import reply_rewards
from lapis.model.load import load
from lapis.text.rows.pair_rows import EncodedReply, encode_reply
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.rewards.reward import Case, Failure, Record, as_number


class RewardModel:
    """A folder whose model has a scalar head. note: a line to show where its tokenizer is not the policy's.

    Raises ConfigError for another head, or where there is no chat template.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self.tokenizer = Tokenizer.open(folder)
        self.model = load(folder, dtype=torch.float32)
        head = self.model.config.head
        if head != "scalar":
            raise ConfigError(
                f"reward {folder}: its head is {head}; a reward model has a scalar one (objective: reward)"
            )
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"reward {folder}: has no chat template; what is the reply could not be known")
        self.model.requires_grad_(False)
        same = self.tokenizer.digest() == tokenizer.digest()
        self.note = "" if same else f"reward {folder}: has another tokenizer; replies are encoded again, as text"

    def check(self, records: Sequence[tuple[Record, str]]) -> None:
        pass

    def score(self, cases: Sequence[Case]) -> list[float | Failure]:
        values: list[float | Failure] = [Failure("")] * len(cases)
        replies: list[EncodedReply] = []
        places: list[int] = []
        for i, case in enumerate(cases):
            prompt = [{"role": "user", "content": case.prompt}] if isinstance(case.prompt, str) else case.prompt
            try:
                reply = encode_reply(self.tokenizer, prompt, {"role": "assistant", "content": case.reply})
            except (DataError, TemplateError) as error:
                values[i] = Failure(f"cannot read the reply to {case.where}: {error}")
                continue
            limit = self.model.config.context
            if len(reply.ids) > limit:
                reply = dataclasses.replace(reply, ids=reply.ids[-limit:])
            replies.append(reply)
            places.append(i)
        for i, value in zip(places, reply_rewards(self.model, replies) if replies else [], strict=True):
            values[i] = as_number(value, cases[i].where)
        return values
