"""How large a story is, as a function of its minutes alone: the world, the model, the tokens of each run.

A tour learns a fixed number of tokens, so that it ends with the same models whatever else the machine does. Its
minutes are about those that the whole takes on two cores of a recent server CPU with bfloat16 instructions
(docs/evidence/tour.md names it); another machine takes longer over the same story. Leaves out: what is done with it
(recipe.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lapis.families.config import ModelConfig

CONTEXT = 256
FULL = 5.0  # minutes of the story that docs/evidence/tour.md measures

RUNS = {"base": 2_400_000, "chat": 1_000_000, "adapted": 400_000, "tuned": 1_000_000, "yardstick": 300_000}
"""Tokens of each run of the full story. Both tunings on English chats see the same chats."""

REAL_RUNS = {"base": 1_150_000, "chat": 700_000, "adapted": 650_000, "tuned": 700_000, "yardstick": 700_000}
"""The same for real text, which has more words and more to say: fewer tokens of a larger model."""


PEOPLE = ((1.0, 40), (2.5, 60), (float("inf"), 120))
"""Minutes, and the inhabitants of the world up to these."""

CHATS = 12000  # training chats of the full story
CHARACTERS_PER_TOKEN = 4.5  # somewhat more than what a token of the built-in world stands for
SWEEP, MEASURING = 200_000.0, 300_000.0  # tokens that would be learned in the same time


@dataclass(frozen=True)
class StorySize:
    """Of one story.

    Args:
        people: Inhabitants of the built-in world.
        vocabulary: Of the tokenizer, at most.
        tokens: Of each run.
        chats: Training chats of the built-in world.
        exam: Share of the full exam (measure.py), so that measuring takes a small part of a short story, too.
    """

    people: int
    dim: int
    layers: int
    heads: int
    ffn_dim: int
    vocabulary: int
    tokens: Mapping[str, int]
    chats: int
    exam: float

    def steps(self, run: str, batch: int) -> int:
        """Steps of a run, each of `batch` rows."""
        return max(1, round(self.tokens[run] / (batch * CONTEXT)))

    def model(self, vocabulary: int) -> ModelConfig:
        """A Llama-shaped decoder for a tokenizer with so many tokens."""
        return ModelConfig(
            dim=self.dim, layers=self.layers, heads=self.heads, kv_heads=self.heads, ffn_dim=self.ffn_dim,
            vocab=vocabulary, context=CONTEXT, tied=True,
        )  # fmt: skip

    @classmethod
    def of(cls, minutes: float, *, real: bool) -> "StorySize":
        """The size of a story of so many minutes, on real text or on the built-in world."""
        share = minutes / FULL
        tokens = {run: max(4096, round(amount * share)) for run, amount in (REAL_RUNS if real else RUNS).items()}
        if real:
            return cls(0, 256, 4, 4, 512, 4096, tokens, 0, min(1.0, share))
        people = next(people for most, people in PEOPLE if minutes <= most)
        return cls(people, 192, 3, 6, 512, 3072, tokens, max(1000, round(CHATS * share)), min(1.0, share))

    @property
    def work(self) -> dict[str, float]:
        """Part of a tour -> tokens that would be learned in the same time, in the order of the parts."""
        work = {"world": 0.04 * self.tokens["base"], "tokenizer": 20_000.0}
        for run, tokens in self.tokens.items():
            if run in ("base", "adapted"):
                work[f"text for {run}"] = 0.01 * tokens
            work[run] = float(tokens)
        return {**work, "sweep": SWEEP * self.exam, "measuring": MEASURING * self.exam, "page": 10_000.0}

    def characters(self, run: str) -> int:
        """Of the text that a run reads: somewhat more than its tokens. Beside chats stands an eighth as much."""
        tokens = self.tokens.get(run, self.tokens["chat"] // 8)
        return round(tokens * CHARACTERS_PER_TOKEN)
