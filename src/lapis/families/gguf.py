"""How a family's models lie in a GGUF file: what llama.cpp calls them, how it wants their tensors, what it computes.

One entry for each model_type, in the family's own file. Keys and tensors that all have alike are in formats/gguf/.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig


@dataclass(frozen=True)
class Gguf:
    """One architecture of llama.cpp.

    Attributes:
        arch: What `general.architecture` says.
        permuted: Rows of q and k lie so that the two numbers that rotary positions turn together are neighbors, as in
            Meta's own files; elsewhere they lie half a head apart.
        norm_offset: Added to the weights of norms. Folders of Gemma keep them around 0, and add 1 when they run.
        windows: Which windows llama.cpp keeps to: none, or those of every layer but each sixth.
        computes: Field of ModelConfig -> the values that llama.cpp computes with; others are refused.
        inner: Heads that stay behind: the file holds the encoder alone.
        numbers: Field of ModelConfig -> the key that has its number.
        nope_every: Each layer with such a number turns nothing, which llama.cpp takes for granted; 0 = none.
    """

    arch: str
    permuted: bool = False
    norm_offset: float = 0.0
    windows: Literal["none", "sixth"] = "none"
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    numbers: Mapping[str, str] = field(default_factory=dict)
    nope_every: int = 0

    def nope_layers(self, layers: int) -> tuple[int, ...]:
        """The layers that llama.cpp does not turn."""
        return tuple(i for i in range(layers) if self.nope_every and (i + 1) % self.nope_every == 0)

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError where llama.cpp would compute something else than the model."""
        for name, values in self.computes.items():
            value = getattr(config, name)
            if value not in values:
                known = " or ".join(map(str, values))
                raise ConfigError(
                    f"{name} is {value!r}, and llama.cpp computes {config.family} with {known} only; such a model has "
                    "no GGUF file"
                )
        if config.nope_layers != self.nope_layers(config.layers):
            raise ConfigError(
                f"llama.cpp leaves each {self.nope_every}th layer of {config.family} without rotary positions; this "
                f"model leaves {', '.join(map(str, config.nope_layers)) or 'none'} (from 0), so it has no GGUF file"
            )


ROTARY = {"norm": ("rms",), "norm_place": ("pre",), "causal": (True,), "head": ("lm",), "positions": ("rotary",)}
LEARNED = {"norm": ("layer",), "positions": ("learned",), "bias": ("all",)}
