"""One reply while it is written: its next token from the model's logits, and the text that is certain.

A reply's numbers come from its own generator and its own penalties, so it does not depend on who else is in the batch.

Shapes: V vocabulary; 1 for the one row.
"""

import random

import torch
from torch import Tensor

from lapis.generation.generate import ReplyRow
from lapis.generation.options import Sampling
from lapis.generation.sampling import choose, generators, lower_repeated
from lapis.serving.engine.grammar import Constraint
from lapis.serving.engine.order import Chunk, ReplyStream, TokenScore
from lapis.serving.engine.served import ServedModel

GREEDY = Sampling()


class RunningRow:
    """One reply of an order. slot: where its keys and values are. prompt: of the order, which it begins with."""

    def __init__(self, stream: ReplyStream, number: int, served: ServedModel, constraint: Constraint | None) -> None:
        order = stream.order
        self.stream, self.number = stream, number
        self.slot = -1
        self.prompt = order.prompt
        self.last = -1
        self._text = ReplyRow(served.tokenizer, order.prompt, order.sampling, served.context)
        self._sampling, self._shaping = order.sampling, order.shaping
        self._draws: list[random.Random] = generators(order.sampling, [number])
        self._constraint = constraint
        self._scores: list[TokenScore] = []
        vocab, device = served.model.config.vocab, served.model.embed.weight.device
        self._seen_1V = self._counts_1V = self._bias_1V = None
        if order.sampling.repetition_penalty != 1:
            self._seen_1V = torch.zeros(1, vocab, dtype=torch.bool, device=device)
            self._seen_1V[0, order.prompt] = True
        if order.shaping.frequency_penalty or order.shaping.presence_penalty:
            self._counts_1V = torch.zeros(1, vocab, device=device)
        if order.shaping.logit_bias:
            self._bias_1V = torch.zeros(1, vocab, device=device)
            for token, bias in order.shaping.logit_bias.items():
                self._bias_1V[0, token] = bias

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, of logits as they are."""
        return self._sampling.temperature == 0 and self._seen_1V is None and self._shaping.plain

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.stream.cancelled

    @property
    def reading(self) -> list[int]:
        """All that the model has to have read before the next token."""
        return self.prompt + self._text.ids

    def choose(self, logits_1V: Tensor) -> int:
        """The next token. Raises LapisError where the logits are not numbers."""
        if self._counts_1V is not None:
            shaping = self._shaping
            logits_1V = lower_repeated(
                logits_1V.float(), self._counts_1V, shaping.frequency_penalty, shaping.presence_penalty
            )
        if self._bias_1V is not None:
            logits_1V = logits_1V.float() + self._bias_1V
        if self._constraint is not None:
            logits_1V = self._constraint.allow(logits_1V.float())
        return int(choose(logits_1V, self._sampling, self._draws, self._seen_1V))

    def add(self, token: int, logits_1V: Tensor) -> Chunk | None:
        """Takes in a token; what there is to send, if anything."""
        self.last = token
        if self._seen_1V is not None:
            self._seen_1V[0, token] = True
        if self._counts_1V is not None:
            self._counts_1V[0, token] += 1
        if self._constraint is not None:
            self._constraint.take(token)
        top = self.stream.order.top_logprobs
        if top is not None:
            self._scores.append(score(logits_1V[0].float(), token, top))
        piece = self._text.add(token)
        reason = self._text.stop_reason
        if not piece and not reason:
            return None
        scores, self._scores = tuple(self._scores), []
        return Chunk(self.number, piece, scores, reason, len(self._text.ids))

    def fail(self, why: str) -> Chunk:
        """The chunk that ends the reply with an error."""
        return Chunk(self.number, why, (), "failed", len(self._text.ids))


def score(logits_V: Tensor, token: int, top: int) -> TokenScore:
    """A token's log-probability, and those of the `top` likeliest."""
    logprobs_V = logits_V - logits_V.logsumexp(-1)
    values, ids = logprobs_V.topk(top)
    return TokenScore(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
