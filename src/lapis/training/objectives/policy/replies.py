"""A policy's replies to prompts, and what they are worth: rollouts (rollouts.py) with rewards (rewards/).

Leaves out: what is learned from them.

Shapes: B replies (those to one prompt stand together), R tokens of a reply.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.policy.experience import joined
from lapis.training.objectives.policy.prompts import Prompt
from lapis.training.objectives.policy.rollouts import Rollouts, roll
from lapis.training.rewards import Case, Judge, Scores

_ROWS = 512  # replies decoded at once


@dataclass(frozen=True)
class Replier:
    """max_tokens: of a reply."""

    tokenizer: Tokenizer
    judge: Judge
    max_tokens: int

    def roll(
        self,
        model: Transformer,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        *,
        group: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Rollouts:
        """`group` replies to each prompt; numbers, seed: what their draws follow from."""
        training, pieces, size = model.training, [], max(1, _ROWS // group)
        model.eval()
        try:
            for first in range(0, len(prompts), size):
                some = prompts[first : first + size]
                made = roll(model, [row.ids for row in some], numbers[first : first + size], self.tokenizer.end_ids,
                            group=group, max_tokens=self.max_tokens, temperature=temperature, seed=seed)  # fmt: skip
                pieces.append(made)
        finally:
            model.train(training)
        return joined(pieces)

    def score(self, prompts: Sequence[Prompt], rollouts: Rollouts) -> Scores:
        """What the replies are worth, in their order."""
        group = len(rollouts.ended_B) // len(prompts)
        lengths, ended = rollouts.mask_BR.sum(1).tolist(), rollouts.ended_B.tolist()
        cases = []
        for i, ids in enumerate(rollouts.reply_BR.tolist()):
            row, said = prompts[i // group], ids[: lengths[i] - ended[i]]
            text = self.tokenizer.decode(said, skip_special=True)
            cases.append(Case(row.asked, text, row.record, row.where, ended[i], lengths[i]))
        return self.judge.score(cases)

    def likeliest(self, model: Transformer, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Prompt, likeliest reply and reward, for people; a reward that failed is None."""
        rollouts = self.roll(model, prompts, range(len(prompts)))
        scores = self.score(prompts, rollouts)
        return [
            {"prompt": row.shown, "reply": self.tokenizer.decode(ids[mask].tolist(), True),
             "reward": None if math.isnan(total) else total}
            for row, ids, mask, total in zip(prompts, rollouts.reply_BR, rollouts.mask_BR, scores.total, strict=True)
        ]  # fmt: skip
