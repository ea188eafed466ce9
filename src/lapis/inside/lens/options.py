"""How the lens looks: the options of `lapis.lens` and of `lapis lens`. Needs no torch, so the command line reads it at
once."""

from dataclasses import dataclass, replace

from lapis.config import check_numbers
from lapis.errors import ConfigError

GRID = 24  # tokens of the prompt that a page shows


@dataclass(frozen=True)
class LensOptions:
    """What of a prompt is read, and how much of it is named.

    Raises:
        ConfigError: A value is below 1.
    """

    positions: int | None = None
    """Of how many of the last tokens the grid is read; each more costs a walk over the head. Default: 1, or 24 for a
    page."""
    top: int = 10
    """Tokens named per layer."""

    def __post_init__(self) -> None:
        check_numbers(self, "lens")
        for name in ("positions", "top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"lens: {name} is {value}; expected 1 or more")

    def for_page(self) -> "LensOptions":
        """The same with as many tokens in the grid as a page shows."""
        return replace(self, positions=self.positions or GRID)
