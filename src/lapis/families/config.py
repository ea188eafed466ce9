"""The shape of a model: a few numbers and a few enumerated fields. All that shapes is here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lapis.errors import ConfigError

# MLP kinds -> (has a gate, activation)
MLP_KINDS = {
    "swiglu": (True, "silu"),
    "geglu": (True, "gelu"),
    "geglu_tanh": (True, "gelu_tanh"),
    "gelu": (False, "gelu"),
    "gelu_tanh": (False, "gelu_tanh"),
    "relu": (False, "relu"),
    "relu2": (False, "relu2"),
    "silu": (False, "silu"),
}
Mlp = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2", "silu"]
Head = Literal["lm", "masked", "classes", "scalar", "none"]
Bias = Literal["none", "qkv", "attention", "mlp", "all"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) and how they are stretched beyond the trained context.

    kind: "linear" divides positions by `factor`; "dynamic" grows theta with the length (NTK); "yarn"
    (arXiv:2309.00071) and "llama3" treat slow and fast frequencies apart, with the other fields.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    factor: float | None = None
    original_context: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Image:
    """Square pictures in square patches, in pixels."""

    size: int
    patch: int
    channels: int = 3

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a model; the defaults are Llama's kind of block.

    dim: width. heads, kv_heads (0 = heads), head_dim (0 = dim / heads). ffn_dim: inner width of the MLP. vocab: rows of
    the embedding. context: positions it was made for; a hard limit only where positions are learned. norm_place "post"
    is BERT's (with a norm after the embedding and none at the end). window: how many tokens back a token sees, in
    `window_layers` (None = all). bias: which linear layers have one. types: token types (BERT). head: what stands on
    top; "classes" and "scalar" look at one token of each sequence. extra: fields of config.json that do not shape the
    model and are handed on (token ids, labels). family: the model_type that a saved folder gets.
    """

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    vocab: int
    context: int
    kv_heads: int = 0
    head_dim: int = 0
    family: str = "llama"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_place: Literal["pre", "post"] = "pre"
    mlp: Mlp = "swiglu"
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope: Rope = Rope()
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    causal: bool = True
    bias: Bias = "none"
    qk_norm: bool = False
    tied: bool = False
    head: Head = "lm"
    classes: int = 0
    types: int = 0
    pooler: bool = False
    image: Image | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "ffn_dim", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model: {name} is {getattr(self, name)}; expected 1 or more")
        if self.head_dim == 0 and self.dim % self.heads:
            raise ConfigError(f"model: dim {self.dim} is not a multiple of heads {self.heads}; give head_dim")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.heads)
        if self.head == "scalar":
            object.__setattr__(self, "classes", 1)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(f"model: heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(f"model: head_dim {self.head_dim} is odd; rotary positions turn pairs")
        if self.head == "classes" and self.classes < 1:
            raise ConfigError("model: head is classes, but classes is 0")
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ConfigError(f"model: window {self.window} must be 1 or more, in a causal model")
        if self.mlp not in MLP_KINDS:
            raise ConfigError(f'model: mlp is "{self.mlp}"; known: {", ".join(MLP_KINDS)}')
        if self.image is None and self.vocab < 1:
            raise ConfigError(f"model: vocab is {self.vocab}; expected 1 or more")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """From a family's table, which knows no classes of this room: `rope` and `image` are mappings there."""
        rope, image = fields.get("rope"), fields.get("image")
        return cls(**{**fields, "rope": Rope(**(rope or {})), "image": Image(**image) if image else None})

    @property
    def gated(self) -> bool:
        return MLP_KINDS[self.mlp][0]

    def windowed(self, layer: int) -> bool:
        """Whether this layer looks back no further than the window."""
        return self.window is not None and (self.window_layers is None or layer in self.window_layers)
