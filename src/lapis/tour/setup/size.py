"""How large a story is, as a function of its minutes alone: the world, the model, the tokens of each run.

A tour learns a fixed number of tokens, so that it ends with the same models whatever else the machine does. Its
minutes are about those that the whole takes on two cores of a recent server CPU with bfloat16 instructions
(docs/evidence/tour.md names it); another machine takes longer over the same story. Leaves out: what is done with it
(recipe.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lapis.families.config import ModelConfig
from lapis.tour.measure import LEAST

CONTEXT = 256
FULL = 5.0  # minutes of the story that docs/evidence/tour.md measures

RUNS = {"base": 2_400_000, "chat": 900_000, "adapted": 300_000, "tuned": 900_000, "yardstick": 300_000}
"""Tokens of each run of the full story. Both tunings on English chats see the same chats."""

SHORT = 2.0  # minutes up to which a story is short
SHORT_RUNS = {"base": 650_000, "chat": 330_000, "adapted": 80_000, "tuned": 330_000, "yardstick": 100_000}
"""Tokens of each run for each minute of a short story, whose model has two layers and learns at a high rate."""

REAL_RUNS = {"base": 1_150_000, "chat": 700_000, "adapted": 650_000, "tuned": 700_000, "yardstick": 700_000}
"""The same for real text, which has more words and more to say: fewer tokens of a larger model."""


@dataclass(frozen=True)
class LearningRates:
    """How the models learn: what was tried is in docs/evidence/tour.md.

    Args:
        base, adapted, chat: Peak learning rates of Muon.
        batch, chat_batch: Rows of CONTEXT tokens in a step.
        target_in_base: Share of the target language in the text that base reads.
        rows_of_text: Rows of a batch of chats that are text. With text beside them the chats leave the embedding alone;
            with 0 they change all weights.
    """

    base: float
    adapted: float
    chat: float
    batch: int
    chat_batch: int
    target_in_base: float
    rows_of_text: int


# many small steps learn most; the further adapted drifts from base, the less a graft takes
WORLD_RECIPE = LearningRates(4e-3, 5e-4, 8e-4, 4, 8, target_in_base=0.4, rows_of_text=1)
SHORT_RECIPE = LearningRates(1e-2, 1e-3, 1.5e-3, 4, 8, target_in_base=0.4, rows_of_text=1)
REAL_RECIPE = LearningRates(3e-3, 1e-3, 4e-4, 8, 8, target_in_base=0.2, rows_of_text=0)

PEOPLE, PEOPLE_OF_SHORT = 60, 40  # inhabitants of the built-in world
CHATS = 12000  # training chats of the full story
CHARACTERS_PER_TOKEN = 4.5  # somewhat more than what a token of the built-in world stands for
SWEEP, MEASURING = 200_000.0, 300_000.0  # tokens that would be learned in the same time


@dataclass(frozen=True, kw_only=True)
class RunSizes(ABC):
    """What the runs of a story learn, and how.

    Args:
        tokens: Of each run.
        recipe: How the models learn.
        held_out: Share of the full held-out material (measure.py), so that measuring takes a small part of a short
            story, too.
    """

    tokens: Mapping[str, int]
    recipe: LearningRates
    held_out: float

    fewest: ClassVar[int] = LEAST  # chats, and questions, of one language in each half of what is held out

    @property
    def halvings(self) -> int:
        """How often the sweep of scales is refined."""
        return 2

    def steps(self, run: str) -> dict[str, int]:
        """Of a run: rows of a step, and how many steps."""
        batch = self.recipe.batch if run in ("base", "adapted") else self.recipe.chat_batch
        return {"batch": batch, "steps": max(1, round(self.tokens[run] / (batch * CONTEXT)))}

    @abstractmethod
    def learning(self, run: str) -> dict[str, Any]:
        """Of a run: the settings of its training."""

    @property
    @abstractmethod
    def work(self) -> dict[str, float]:
        """Part of a tour -> tokens that would be learned in the same time, in the order of the parts."""

    def characters(self, run: str) -> int:
        """Of the text that a run reads: somewhat more than its tokens. Beside chats stands an eighth as much."""
        tokens = self.tokens[run] if run in self.tokens else self.tokens["chat"] // 8
        return round(tokens * CHARACTERS_PER_TOKEN)


@dataclass(frozen=True, kw_only=True)
class StorySize(RunSizes):
    """Of a story that begins with a new model.

    Args:
        people: Inhabitants of the built-in world.
        vocabulary: Of the tokenizer, at most.
        chats: Training chats of the built-in world.
    """

    people: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocabulary: int
    chats: int

    def learning(self, run: str) -> dict[str, Any]:
        rates = {"base": self.recipe.base, "adapted": self.recipe.adapted}
        more = {} if run in rates else {"weight_decay": 0.0}
        return {"optimizer": "muon", "lr": rates.get(run, self.recipe.chat), **self.steps(run), **more}

    def model(self, vocabulary: int) -> ModelConfig:
        """A Llama-shaped decoder for a tokenizer with so many tokens."""
        return ModelConfig(
            dim=self.dim, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, ffn_dim=self.ffn_dim,
            vocab=vocabulary, context=CONTEXT, tied=True,
        )  # fmt: skip

    @classmethod
    def of(cls, minutes: float, *, real: bool) -> "StorySize":
        """The size of a story of so many minutes, on real text or on the built-in world."""
        share, short = minutes / FULL, minutes <= SHORT
        full = REAL_RUNS if real else RUNS
        tokens = {run: max(4096, round(amount * share)) for run, amount in full.items()}
        held_out = min(1.0, share)
        if real:
            return cls(
                people=0, chats=0, dim=256, layers=4, heads=4, kv_heads=2, ffn_dim=512, vocabulary=4096,
                tokens=tokens, recipe=REAL_RECIPE, held_out=held_out,
            )  # fmt: skip
        if short:
            tokens = {run: max(4096, round(amount * minutes)) for run, amount in SHORT_RUNS.items()}
        return cls(
            people=PEOPLE_OF_SHORT if short else PEOPLE, chats=max(1000, round(CHATS * share)),
            dim=192, layers=2 if short else 3, heads=6, kv_heads=6, ffn_dim=512, vocabulary=3072,
            tokens=tokens, recipe=SHORT_RECIPE if short else WORLD_RECIPE, held_out=held_out,
        )  # fmt: skip

    @property
    def work(self) -> dict[str, float]:
        work = {"world": 0.04 * self.tokens["base"], "tokenizer": 20_000.0}
        for run, tokens in self.tokens.items():
            if run in ("base", "adapted"):
                work[f"text for {run}"] = 0.01 * tokens
            work[run] = float(tokens)
        return {**work, "sweep": SWEEP * self.held_out, "measuring": MEASURING * self.held_out, "page": 10_000.0}
