"""Options of a reply, and of the machine. Needs no torch, so that the command line can read it at once.

Leaves out what the options do: sampling.py chooses tokens, generate.py stops, ready.py loads.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from lapis.config import check_numbers
from lapis.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, and when to stop. Raises ConfigError for a value out of range."""

    temperature: float = 0.0
    """0 takes the most likely token; higher is freer."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach p."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens seen before, in prompt or reply, become less likely."""
    max_tokens: int = 256
    """New tokens at most."""
    stop: tuple[str, ...] = ()
    """A text that ends the reply and is left out of it; may be given again."""
    seed: int | None = None
    """Row i of a batch draws from seed + i; none draws anew each time."""

    def __post_init__(self) -> None:
        check_numbers(self, "sampling")
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
        ):
            if not fits:
                raise ConfigError(f"sampling: {name} is {getattr(self, name)!r}; expected {expected}")


@dataclass(frozen=True)
class Runtime:
    """Where a model runs, and in which precision."""

    device: str | None = None
    """cpu or cuda; default: a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of weights and arithmetic; default: that of the folder, or float32 where the processor has no bfloat16
    instructions."""


@dataclass(frozen=True)
class DecodingRuntime(Runtime):
    """Where a model that writes runs, in which precision, and how its weights are held."""

    weights: Literal["int8"] | None = None
    """int8 rounds each row of a weight to 255 steps: faster on a CPU, in half the memory, and with other numbers (lapis
    eval --weights int8 says what that costs)."""
