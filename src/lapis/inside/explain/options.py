"""How much of a text `lapis explain` shows. Needs no torch, so the command line reads it at once."""

from dataclasses import dataclass

from lapis.config import check_numbers
from lapis.errors import ConfigError

MOST = 96  # tokens in a row that a reader, and a page of five megabytes, can take in


@dataclass(frozen=True)
class ExplainOptions:
    """How much of a text is explained.

    Raises:
        ConfigError: A value is out of range.
    """

    places: int = 32
    """The last tokens of the text that are shown, 96 at most; each is read in every layer."""
    heads: int = 6
    """Attention heads whose queries, keys and values are kept: those that did most for the next token."""

    def __post_init__(self) -> None:
        check_numbers(self, "explain")
        if not 1 <= self.places <= MOST:
            raise ConfigError(f"explain: places is {self.places}; expected 1 to {MOST}")
        if self.heads < 1:
            raise ConfigError(f"explain: heads is {self.heads}; expected 1 or more")
