"""The tour's story about a model that somebody else trained, on real text, and how much of everything it takes.

    base      the model, as it came
    chat      base, tuned on English chats; or its chat version, where one is given
    adapted   base, continued on the target language with some English replayed
    tuned     adapted, tuned on the same English chats: the yardstick
    grafted   adapted + scale x (chat - base): no training step

The embedding and the head stay as they are throughout, except the rows of the template's tokens in the chats: a graft
leaves them alone as well, and in so few steps they would learn little and cost a third of the time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lapis.model.transformer import Transformer
from lapis.tour import measure
from lapis.tour.recipe import SCALES, Story
from lapis.tour.setup.size import CONTEXT, LearningRates, RunSizes
from lapis.training.objectives.objective import Objective
from lapis.training.objectives.supervised.next_token import Chat
from lapis.training.setup.select import select_parts

TOKENS = 30_000  # about ten minutes of two cores with a model of 135 million parameters
SHARES = {"chat": 0.3, "adapted": 0.4, "tuned": 0.3}
RECIPE = LearningRates(0.0, 5e-5, 5e-5, 2, 2, target_in_base=0.0, rows_of_text=0)  # of AdamW; many small steps
MEASURED_WELL = 150_000  # tokens from which on the held-out material is used in full
LEAST_HELD_OUT = 0.06  # of it: a piece of text has up to 2,000 characters, and both halves need one
FORWARD = 0.25  # what reading a token costs, where learning it costs 1
PROMPT_AND_REPLY, CHAT, CHARACTER = 250, 150, 0.35  # in tokens; a reply's count more, as they are written one by one
ROWS_SHOWN = 4000  # rows of the embedding that moved most


@dataclass(frozen=True, kw_only=True)
class RealSize(RunSizes):
    """Of a story about a model that exists."""

    recipe: LearningRates = RECIPE
    fewest: ClassVar[int] = 6

    def learning(self, run: str) -> dict[str, Any]:
        steps = self.steps(run)
        return {
            "optimizer": "adamw", "lr": self.recipe.adapted if run == "adapted" else self.recipe.chat, **steps,
            "weight_decay": 0.0, "sample_every": 0.0, "log_every": max(1, steps["steps"] // 20),
        }  # fmt: skip

    @property
    def halvings(self) -> int:
        return 0 if self.held_out == LEAST_HELD_OUT else 2  # where little is measured, finer scales are noise

    @property
    def work(self) -> dict[str, float]:
        chats = max(self.fewest, measure.CHATS * self.held_out)
        read = 2 * (measure.CHARACTERS * self.held_out * CHARACTER + chats * CHAT)
        likelihoods = len(SCALES) + self.halvings + 2
        models = 1 + len(SHARES) + 1
        return {
            "text for adapted": 0.01 * self.tokens["adapted"],
            **self.tokens,
            "sweep": likelihoods * read * FORWARD,
            "measuring": models * (read + 2 * chats * PROMPT_AND_REPLY) * FORWARD,
            "page": 10 * CONTEXT,
        }

    @classmethod
    def of(cls, tokens: int, *, chat_is_given: bool) -> "RealSize":
        """The size of a story in which so many tokens are learned."""
        shares = {run: share for run, share in SHARES.items() if not (chat_is_given and run == "chat")}
        runs = {run: max(CONTEXT, round(tokens * share / sum(shares.values()))) for run, share in shares.items()}
        return cls(tokens=runs, held_out=min(1.0, max(LEAST_HELD_OUT, tokens / MEASURED_WELL)))


@dataclass
class RealStory(Story):
    """The story about a model.

    Args:
        given: base, and chat where there is one.
        template_tokens: Ids of the tokens that only the chat template writes.
    """

    given: Mapping[str, Path] = field(default_factory=dict)
    template_tokens: list[int] = field(default_factory=list)

    def make_models(self, chats: Path) -> None:
        self.models |= self.given
        if "chat" not in self.given:
            self.chat("chat", "base", chats)
        self.adapt()
        self.chat("tuned", "adapted", chats)

    def train(self, name: str, model: Transformer, objective: Objective) -> None:
        hold_tables(model, self.template_tokens if isinstance(objective, Chat) else [])
        super().train(name, model, objective)

    def difference(self) -> dict[str, Any]:
        """As of every story; of the rows of the embedding those that moved, the largest."""
        difference = super().difference()
        moved = [row for row in difference["rows"] if row["relative_norm"] > 0]
        return {**difference, "rows": sorted(moved, key=lambda row: -row["relative_norm"])[:ROWS_SHOWN]}


def hold_tables(model: Transformer, tokens: list[int]) -> None:
    """Leaves the embedding and the head out of a training, except the rows of `tokens`."""
    select_parts(model, freeze=["embed"] if model.config.tied else ["embed", "head"], tokens=tokens)
