"""What all objectives on preference pairs share: the data, its order, batches of both replies, held-out metrics.

Shapes: N pairs, S = 2N replies, the chosen ones first.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lapis.errors import ConfigError
from lapis.evaluation.preference import pair_figures
from lapis.evaluation.replies import ReplyBatch, collate
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import EncodedReply, Paired, Sources, TooLong
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.objective import Cursor, DataPlace, Objective, in_order
from lapis.training.objectives.supervised.next_token import continuation


@dataclass(frozen=True)
class PairBatch:
    """pairs: their numbers. margins_N: float32. reference_S: log-probabilities of the reference, where there is one.
    kl: KTO's distance from the reference, a scalar."""

    pairs: list[int]
    replies: ReplyBatch
    margins_N: Tensor
    reference_S: Tensor | None = None
    kl: Tensor | None = None


@dataclass(eq=False)
class Pairwise(Objective):
    """Base class of the objectives on preference pairs, with the options of all of them.

    Args:
        data: .jsonl of prompt, chosen, rejected and, optionally, margin (text/corpus/pairs.py), or pairs.
        context: Tokens of a chat.
        too_long: A chat that is longer is cut at its end, or its pair dropped. Both are counted.
        valid: Held-out pairs: accuracy, calibration and the effect of length are measured on them.
    """

    tokenizer: Tokenizer
    data: Sources
    _: KW_ONLY
    too_long: TooLong = "cut"
    valid: Any = None

    reply_only: ClassVar[bool] = True
    """Whether what the template writes after the reply is left out: a language model learns nothing from it."""
    with_prompts: ClassVar[bool] = False
    """Whether the prompts of chosen replies are scored as well."""
    verdicts: ClassVar[bool] = False
    """Whether replies with a verdict each are learned from as well as pairs."""

    def __post_init__(self) -> None:
        self._check_options()
        read = partial(Paired.read, tokenizer=self.tokenizer, context=self.context, verdicts=self.verdicts)
        self.examples = read(self.data, too_long=self.too_long)
        self.held_out = None if self.valid is None else read(self.valid)
        self.rows = len(self.examples)

    @property
    def own_options(self) -> dict[str, Any]:
        """The options that only this objective has, by name."""
        shared = {field.name for field in fields(Pairwise)}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in shared}

    def _check_options(self) -> None:
        for option, value in self.own_options.items():
            if option in ("beta", "gamma", "desirable", "undesirable") and not value > 0:
                raise ConfigError(f"{self.name}: {option} is {value}; it must be above 0")
            if option == "label_smoothing" and not 0 <= value < 0.5:
                raise ConfigError(f"{self.name}: label_smoothing is {value}; it is a share of the labels, below 0.5")

    def describe(self) -> dict[str, Any]:
        counts = dict(self.examples.counts)
        if self.held_out is not None:
            counts["held_out"] = len(self.held_out)
        return {
            "objective": self.name,
            "data": self.examples.digest,
            "valid": {} if self.held_out is None else {"": self.held_out.digest},
            "counts": counts,
            "context": self.context,
            "options": self.own_options,
            "tokenizer": self.tokenizer.digest(),
        }

    def coverage(self) -> list[str]:
        """The counts, and how the data was read."""
        return [*super().coverage(), *self.examples.notices]

    def batches(self, state: DataPlace) -> Iterator[tuple[PairBatch, Cursor]]:
        for pairs, _, cursor in in_order(self.rows, state.rows, state.cursor, state.seed):
            replies = [self.reply(2 * pair + side) for side in (0, 1) for pair in pairs]
            batch = collate(replies, whole=len(pairs) if self.with_prompts else 0)
            yield PairBatch(pairs, batch, torch.from_numpy(self.examples.margins[pairs])), cursor

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        device = next(model.parameters()).device
        return dataclasses.replace(batch, replies=batch.replies.to(device), margins_N=batch.margins_N.to(device))

    @property
    def tokens_per_row(self) -> float:
        return self.examples.counts["tokens"] / self.rows

    def small_batch(self, model: Transformer, state: DataPlace, tokens: int) -> PairBatch:
        pairs = list(range(max(1, min(state.rows, int(tokens / self.tokens_per_row)))))
        longest = max(2, tokens // (2 * len(pairs)))
        replies = [_last_tokens(self.reply(2 * pair + side), longest) for side in (0, 1) for pair in pairs]
        batch = collate(replies, whole=len(pairs) if self.with_prompts else 0)
        return self.prepare(model, PairBatch(pairs, batch, torch.from_numpy(self.examples.margins[pairs])))

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """accuracy, margin, loss (Bradley-Terry's), calibration_error and the length figures on the held-out pairs."""
        if self.held_out is None:
            return {}
        values = self.reply_values(model, self.held_out)
        sizes = [len(reply) for reply in self.held_out.replies]
        figures = pair_figures(values[::2], values[1::2], sizes[::2], sizes[1::2])
        return {name: value for name, value in figures.items() if value is not None}

    @abstractmethod
    def reply_values(self, model: Transformer, held_out: Paired) -> "np.ndarray[Any, Any]":
        """The reward of each held-out reply, float64."""

    def sample(self, model: Transformer) -> str:
        """The first prompt, and what the model replies."""
        first = (self.held_out or self.examples).replies[0]
        prompt = first.ids[: first.first].tolist()
        return f"{self.tokenizer.decode(prompt, True)} -> {continuation(model, self.tokenizer, prompt)}"

    def reply(self, number: int) -> EncodedReply:
        """Reply `number` of the training data, as it is scored."""
        reply = self.examples.replies[number]
        return reply.spoken if self.reply_only else reply


def reward_sums(reward_S: Tensor) -> dict[str, float]:
    """Sums over the pairs: accuracy (a tie is half), margin, and the rewards themselves."""
    chosen_N, rejected_N = reward_S.detach().chunk(2)
    margin_N = chosen_N - rejected_N
    right = (margin_N > 0).sum() + 0.5 * (margin_N == 0).sum()
    return {"accuracy": float(right), "margin": float(margin_N.sum()),
            "chosen_reward": float(chosen_N.sum()), "rejected_reward": float(rejected_N.sum())}  # fmt: skip


def _last_tokens(reply: EncodedReply, count: int) -> EncodedReply:
    """The chat without its beginning; one token before the reply is left at least."""
    cut = max(0, min(len(reply.ids) - count, reply.last - 2))
    return EncodedReply(reply.ids[cut:], max(1, reply.first - cut), reply.last - cut)
