"""A budget as a person writes it: "3 min", "8 GB", "1e18 flops"."""

import re
from dataclasses import dataclass
from typing import Literal

from lapis.errors import ConfigError
from lapis.parsing import quoted

# of all spellings: what is bounded, and how much of it one unit is
UNITS: dict[str, tuple[Literal["seconds", "bytes", "flops"], float]] = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("m", "min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
    **dict.fromkeys(("d", "day", "days"), ("seconds", 86_400.0)),
    "mb": ("bytes", 1e6),
    "gb": ("bytes", 1e9),
    "mib": ("bytes", 2.0**20),
    "gib": ("bytes", 2.0**30),
    "flops": ("flops", 1.0),
    "flop": ("flops", 1.0),
}


@dataclass(frozen=True)
class Budget:
    """How much a run may take. amount: in seconds, bytes, or floating-point operations."""

    kind: Literal["seconds", "bytes", "flops"]
    amount: float
    text: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """From a number and a unit. Raises ConfigError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([a-z]+)\s*", text.lower())
        if match is None or match[2] not in UNITS or not 0 < float(match[1]) < 1e40:
            raise ConfigError(
                f'train: budget is {quoted(text)}; give a time, a size or FLOPs: "3 min", "8 GB", "1e18 flops"'
            )
        kind, unit = UNITS[match[2]]
        return cls(kind, float(match[1]) * unit, text.strip())
