"""A policy's replies to prompts with their rewards: rollouts.py and rewards/ together.

Shapes: B replies (those to one prompt are neighbors), R tokens of a reply.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lapis.model.scoring import evaluating
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.policy.experience import joined_rollouts
from lapis.training.objectives.policy.prompts import Prompt
from lapis.training.objectives.policy.rollouts import Rollouts, sample_rollouts
from lapis.training.rewards import Case, Judge, Scores

_ROWS = 512  # replies decoded at once


@dataclass(frozen=True)
class Replier:
    """Samples replies and has them scored. max_tokens: of a reply."""

    tokenizer: Tokenizer
    judge: Judge
    max_tokens: int

    def reply(
        self,
        model: Transformer,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        *,
        group: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Rollouts:
        """`group` replies to each prompt; see `sample_rollouts`."""
        pieces, size = [], max(1, _ROWS // group)
        with evaluating(model):
            for first in range(0, len(prompts), size):
                some = prompts[first : first + size]
                rollouts = sample_rollouts(
                    model, [row.ids for row in some], numbers[first : first + size], self.tokenizer.end_ids,
                    group=group, max_tokens=self.max_tokens, temperature=temperature, seed=seed,
                )  # fmt: skip
                pieces.append(rollouts)
        # copies, since tensors of inference mode cannot be part of a loss
        return Rollouts(**{name: tensor.clone() for name, tensor in joined_rollouts(pieces).tensors().items()})

    def score(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> Scores:
        """The rewards of the replies, in their order."""
        group = len(rollouts.ended_B) // len(prompts)
        lengths, ended = rollouts.mask_BR.sum(1).tolist(), rollouts.ended_B.tolist()
        cases = []
        for i, ids in enumerate(rollouts.reply_BR.tolist()):
            row = prompts[i // group]
            text = self.tokenizer.decode(ids[: lengths[i] - ended[i]], skip_special=True)
            cases.append(Case(row.text, text, row.record, row.where, ended[i], lengths[i]))
        return self.judge.score(cases)

    def likeliest(self, model: Transformer, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Prompt, likeliest reply and reward, for people; a reward that failed is None."""
        rollouts = self.reply(model, prompts, range(len(prompts)))
        scores = self.score(prompts, rollouts)
        return [
            {"prompt": row.shown, "reply": self.tokenizer.decode(ids[mask].tolist(), True),
             "reward": None if math.isnan(total) else total}
            for row, ids, mask, total in zip(prompts, rollouts.reply_BR, rollouts.mask_BR, scores.total, strict=True)
        ]  # fmt: skip
