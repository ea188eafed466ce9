"""How a plan is made: the one place where its options, their defaults and their help are written.

Needs no torch, so that the command line can read it at once. Leaves out what a plan is made from (plan.py).
"""

from dataclasses import dataclass
from typing import Literal

from lapis.config import check_numbers
from lapis.errors import ConfigError

Goal = Literal["style", "knowledge"]
PieceSize = Literal["layers", "halves", "components"]
Sweeps = Literal["both", "in", "out"]


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made. Raises ConfigError for a value out of range."""

    goal: Goal = "style"
    """style changes how the model answers and leaves what it knows; knowledge the other way round."""
    budget: float = 0.25
    """Share of the blocks' parameters that may be chosen."""
    cost: float = 0.03
    """With --onto: by how much the graft may make the text harder, as a share of its bits."""
    embeddings: Literal["keep", "add"] = "add"
    """With --onto: add learns a scale for the token tables as well; keep leaves them as they are."""
    pieces: PieceSize = "halves"
    """What is taken or left: whole layers, their halves (attn, mlp), or single components."""
    sweeps: Sweeps = "both"
    """Put differences in, take them out, or both."""
    spectra: bool = False
    """Also ranks and signal-to-noise ratios of the differences. Slow."""
    gradients: bool = True
    """Also gradient x difference."""
    replies: bool = True
    """Generate replies to see whether they end."""
    draws: int = 8
    """Random choices of the same size that the choice is compared with."""
    limit: int = 64
    """So many chats, and 128 tokens of text for each."""
    context: int = 256
    """Tokens of a chat or a window of text."""
    seed: int = 0
    """Of the random choices."""
    allow_unrelated: bool = False
    """Go on, with a note, where chat or onto is no fine-tune of base."""

    def __post_init__(self) -> None:
        check_numbers(self, "plan")
        if self.goal not in ("style", "knowledge"):
            raise ConfigError(f'plan: goal is "{self.goal}"; give style or knowledge')
        if not 0 < self.budget <= 1:
            raise ConfigError(
                f"plan: budget is {self.budget:g}; it is a share of the parameters, above 0 and at most 1"
            )
        if not 0 < self.cost <= 1:
            raise ConfigError(f"plan: cost is {self.cost:g}; it is a share of the text's bits, above 0 and at most 1")
        for name in ("limit", "draws", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan: {name} is {getattr(self, name)}; give 1 or more")


@dataclass(frozen=True)
class SearchOptions(PlanOptions):
    """How a plan is made, or the scales of a recipe are searched. Raises ConfigError for a value out of range."""

    evaluations: int = 16
    """With --merge: settings that the search, the random control and the grid try each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluations < 1:
            raise ConfigError(f"plan: evaluations is {self.evaluations}; give 1 or more")
