"""What all objectives on preference pairs share: the data, their order, batches of both replies, held-out figures.

Leaves out: what a pair's loss is (reward.py, preference.py), and the reference (reference.py).

Shapes: N pairs, S = 2N replies, the chosen ones first.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lapis.errors import ConfigError, LapisError
from lapis.evaluation.preference import pair_figures
from lapis.evaluation.replies import ReplyBatch, collate
from lapis.generation.generate import generate
from lapis.generation.options import Sampling
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import Paired, Reply, Sources, TooLong
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.loop.state import TrainState
from lapis.training.objectives.order import in_order


@dataclass(frozen=True)
class PairBatch:
    """pairs: their numbers. margins_N: float32. reference_S: log-probabilities of the reference, where there is one.
    kl: KTO's distance from the reference, a scalar."""

    pairs: list[int]
    replies: ReplyBatch
    margins_N: Tensor
    reference_S: Tensor | None = None
    kl: Tensor | None = None


class Pairwise(ABC):
    """Abstract. data, valid: .jsonl of pairs (text/corpus/pairs.py), or pairs; valid is held out and reported on."""

    name: ClassVar[str]
    spoken_only: ClassVar[bool] = True  # language models learn nothing from what a template writes after the reply
    whole: ClassVar[bool] = False  # the chosen prompts are scored as well

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Sources,
        context: int,
        too_long: TooLong,
        valid: Sources | None,
        **options: float | str | bool,
    ) -> None:
        for option, value in options.items():
            if option in ("beta", "gamma", "desirable", "undesirable") and not value > 0:  # type: ignore[operator]
                raise ConfigError(f"{self.name}: {option} is {value}; it must be above 0")
            if option == "label_smoothing" and not 0 <= value < 0.5:  # type: ignore[operator]
                raise ConfigError(f"{self.name}: label_smoothing is {value}; it is a share of the labels, below 0.5")
        self.tokenizer, self.context, self.options = tokenizer, context, options
        self.data = Paired.read(data, tokenizer, context, too_long=too_long)
        self.valid = None if valid is None else Paired.read(valid, tokenizer, context)
        self.rows = len(self.data)

    def describe(self) -> dict[str, Any]:
        counts = dict(self.data.counts)
        if self.valid is not None:
            counts["held_out"] = len(self.valid)
        return {
            "objective": self.name,
            "data": self.data.digest,
            "counts": counts,
            "context": self.context,
            "options": self.options,
            "tokenizer": self.tokenizer.digest(),
        }

    def batches(self, state: TrainState) -> Iterator[tuple[PairBatch, dict[str, Any]]]:
        for chosen, _, cursor in in_order(self.rows, state.rows, state.cursor, state.seed):
            replies = [self._read(self.data, 2 * pair + side) for side in (0, 1) for pair in chosen]
            batch = collate(replies, whole=len(chosen) if self.whole else 0)
            yield PairBatch(chosen, batch, torch.from_numpy(self.data.margins[chosen])), cursor

    def prepare(self, model: Transformer, batch: PairBatch) -> PairBatch:
        device = next(model.parameters()).device
        return dataclasses.replace(batch, replies=batch.replies.to(device), margins_N=batch.margins_N.to(device))

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """accuracy, margin, loss (Bradley-Terry's), calibration_error and the length figures on the held-out pairs."""
        if self.valid is None:
            return {}
        values = self.held_out(model, self.valid)
        sizes = [len(reply) for reply in self.valid.replies]
        found = pair_figures(values[::2], values[1::2], sizes[::2], sizes[1::2])
        return {name: value for name, value in found.items() if value is not None}

    @abstractmethod
    def held_out(self, model: Transformer, valid: Paired) -> "np.ndarray[Any, Any]":
        """The reward of each held-out reply."""

    def sample(self, model: Transformer) -> str:
        """What the model replies to the first prompt, forty tokens of it."""
        first = (self.valid or self.data).replies[0]
        prompt = first.ids[: first.first].tolist()
        try:
            with torch.inference_mode():
                sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=40, seed=0)
                reply = generate(model, self.tokenizer, prompt, sampling)
        except LapisError as error:
            reply = f"({error})"
        return f"{self.tokenizer.decode(prompt, True)} -> {reply}"

    def _read(self, data: Paired, number: int) -> Reply:
        reply = data.replies[number]
        return reply.spoken if self.spoken_only else reply


def shown(reward_S: Tensor) -> dict[str, float]:
    """Sums over the pairs: accuracy (a tie is half), margin, and the rewards themselves."""
    chosen_N, rejected_N = reward_S.detach().chunk(2)
    margin_N = chosen_N - rejected_N
    right = (margin_N > 0).sum() + 0.5 * (margin_N == 0).sum()
    return {"accuracy": float(right), "margin": float(margin_N.sum()),
            "chosen_reward": float(chosen_N.sum()), "rejected_reward": float(rejected_N.sum())}  # fmt: skip
