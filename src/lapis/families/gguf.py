"""How a family's models lie in a GGUF file: what llama.cpp calls them, how it wants their tensors, what it computes.

One entry for each model_type, in the family's own file. Keys and tensors that all have alike are in formats/gguf/.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig

Runs = tuple[tuple[int, int], ...]  # [first, last) of rows or columns, one run after another


@dataclass(frozen=True)
class FileTensor:
    """How a tensor of the file is made of one of the folder's. It gets no offset, though it be a norm.

    Attributes:
        file: Its name there; "" = the library's.
        rows: The folder's rows in the order of the file; None = as they are.
        columns: The same of columns, and of the numbers of a vector.
        parameter: Which of the parameters that the folder's tensor holds it is, and no more.
        negative_exp: The file has -exp(x).
    """

    file: str = ""
    rows: Callable[[ModelConfig], Runs] | None = None
    columns: Callable[[ModelConfig], Runs] | None = None
    parameter: int | None = None
    negative_exp: bool = False


@dataclass(frozen=True)
class Gguf:
    """One architecture of llama.cpp.

    Attributes:
        arch: What `general.architecture` says.
        permuted: Rows of q and k lie so that the two numbers that rotary positions turn together are neighbors, as in
            Meta's own files; elsewhere they lie half a head apart.
        norm_offset: Added to the weights of norms. Folders of Gemma keep them around 0, and add 1 when they run.
        windows: Each such layer sees everything, and the others have a window; 0 = llama.cpp knows no windows.
        near_theta: Rotary base of layers with a window, where it is another one and no key says it.
        computes: Field of ModelConfig -> the values that llama.cpp computes with; others are refused.
        inner: Heads that stay behind: the file holds the encoder alone.
        numbers: Field of ModelConfig -> the key that has its number.
        nope_every: Each layer with such a number turns nothing, which llama.cpp takes for granted; 0 = none.
        normalized: Of a mixture of experts: whether llama.cpp makes the weights of those chosen sum to 1.
        grouped: llama.cpp lets heads of queries share keys and values.
        says_parallel: A key says whether both halves of a block read the stream side by side.
        imported: Whether such a file is read, too.
        means: Field of ModelConfig -> what such a file means without a word.
        partial: Heads may turn in part, as a key says.
        own_windows: What there is to say of windows, `more` says.
        says_windows: A key says of each layer whether it has a window.
        optional_windows: A model without windows lies in such a file, too; then all of its layers turn.
        windowed_depth: llama.cpp gives windows to a model of so many layers only; 0 = whatever their number.
        near_plain: Layers with a window turn by the base of the others, unstretched.
        yarn_mscale: A key has YaRN's mscale_all_dim, and llama.cpp takes 1 for mscale.
        lists: Component -> the key (whole) that has its number for each layer, in place of a tensor.
        files: Component -> its tensor in the file, where the library's table does not have it.
        tensors: Component -> the tensors that are made of its one, where order or numbers differ.
        interleaved: Component -> the matrices that its one tensor stacks for each expert, interleaved, inputs first.
        more: What else the file says of a model, in place of what all say alike. Raises ConfigError for a model that
            llama.cpp does not compute.
    """

    arch: str
    permuted: bool = False
    norm_offset: float = 0.0
    windows: int = 0
    near_theta: float = 0.0
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    numbers: Mapping[str, str] = field(default_factory=dict)
    nope_every: int = 0
    normalized: bool = True
    grouped: bool = True
    says_parallel: bool = False
    imported: bool = True
    means: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
    own_windows: bool = False
    says_windows: bool = False
    optional_windows: bool = False
    windowed_depth: int = 0
    near_plain: bool = False
    yarn_mscale: bool = False
    lists: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, tuple[FileTensor, ...]] = field(default_factory=dict)
    interleaved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    more: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}

    def nope_layers(self, layers: int, windows: bool = True) -> tuple[int, ...]:
        """The layers that llama.cpp does not turn. windows: whether some layers of the model have one."""
        if self.optional_windows and not windows:
            return ()
        return tuple(i for i in range(layers) if self.nope_every and (i + 1) % self.nope_every == 0)

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError where llama.cpp would compute something else than the model."""
        for name, values in self.computes.items():
            value = attrgetter(name)(config)
            if value not in values:
                known = " or ".join(map(str, values))
                raise ConfigError(
                    f"{name} is {value!r}, and llama.cpp computes {config.family} with {known} only; such a model has "
                    "no GGUF file"
                )
        empty = next((name for name in self.numbers if name.endswith("_cap") and not getattr(config, name)), None)
        if empty:
            raise ConfigError(f"{empty} is 0, and llama.cpp computes {config.family} with a cap only; such a model has "
                              "no GGUF file")  # fmt: skip
        if config.experts is not None and config.experts.dense_layers:
            raise ConfigError(
                "some layers have an ordinary MLP beside experts in others; such a model has no GGUF file"
            )
        if config.experts is not None and config.experts.normalized != self.normalized:
            how = "sum to 1" if self.normalized else "do not sum to 1"
            raise ConfigError(
                f"llama.cpp computes {config.family} with weights of experts that {how}; this model has no GGUF file"
            )
        if not self.grouped and config.kv_heads != config.heads:
            raise ConfigError(
                f"kv_heads is {config.kv_heads}, and llama.cpp computes {config.family} with one for each of the "
                f"{config.heads} heads only; such a model has no GGUF file"
            )
        if self.windowed_depth and config.window is not None and config.layers != self.windowed_depth:
            raise ConfigError(
                f"llama.cpp gives {config.family} a window in a model of {self.windowed_depth} layers only; this one "
                f"has {config.layers} and no GGUF file"
            )
        if config.nope_layers != self.nope_layers(config.layers, config.window is not None):
            raise ConfigError(
                f"llama.cpp leaves each {self.nope_every}th layer of {config.family} without rotary positions; this "
                f"model leaves {', '.join(map(str, config.nope_layers)) or 'none'} (from 0), so it has no GGUF file"
            )


HALVES = {"rope.neighbors": (False,), "rope.share": (1.0,)}  # all of a head turns, in pairs half a head apart
ROTARY = {"norm": ("rms",), "norm_place": ("pre",), "causal": (True,), "head": ("lm",), "positions": ("rotary",)}
LEARNED = {"norm": ("layer",), "positions": ("learned",), "bias": ("all",)}
