"""Options of what compares activations. Needs no torch, so the command line reads it at once."""

from dataclasses import dataclass
from pathlib import Path

from lapis.config import check_numbers
from lapis.errors import ConfigError


@dataclass(frozen=True)
class DifferenceOptions:
    """Over what the mean difference of activations is taken. Raises ConfigError for a value below 1."""

    texts: int = 2000
    """With --activations: how many texts are read, each up to its first places."""
    places: int = 5
    """With --activations: how many of the first places of each text."""

    def __post_init__(self) -> None:
        check_numbers(self, "diff")
        for name in ("texts", "places"):
            if getattr(self, name) < 1:
                raise ConfigError(f"diff: {name} is {getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True)
class SteerOptions:
    """What is added to a model's activations while it writes. Raises ConfigError for what goes without a file."""

    steer: Path | None = None
    """Vectors of lapis diff --activations --vectors; one of them is added to the states after a layer."""
    layer: int | None = None
    """With --steer: after which layer; default: the middle one."""
    strength: float | None = None
    """With --steer: what the vector is multiplied by; 1 is the difference as it was measured (default), below 0 is away
    from it."""
    place: int | None = None
    """With --steer: the vector of this place of the texts, from 0; default: the mean over all places."""

    def __post_init__(self) -> None:
        check_numbers(self, "generate")
        given = [name for name in ("layer", "strength", "place") if getattr(self, name) is not None]
        if self.steer is None and given:
            raise ConfigError(f"generate: --{given[0]} is for --steer FILE")
