"""The shape of a model: a few numbers and a few enumerated fields. All that shapes is here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, ClassVar, Literal

from lapis.config import check_numbers
from lapis.errors import ConfigError
from lapis.families.fields import LARGEST, MOST_LAYERS, TOKENS
from lapis.families.uneven import LayerInputs, Uneven

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
    "xielu": (False, "xielu"),
}
MlpKind = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2", "silu", "xielu"]
Head = Literal["lm", "masked", "classes", "scalar", "none"]
MOST_EXPERTS = 100_000  # of all layers; they are counted one by one
Bias = Literal["none", "qkv", "attention", "mlp", "all"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) and how they are stretched beyond the trained context.

    kind: "linear" divides positions by `factor`; "dynamic" grows theta with the length (NTK); "yarn"
    (arXiv:2309.00071) and "llama3" treat slow and fast frequencies apart, with the other fields. query_growth: beta in
    1 + beta log(1 + floor(position / original_context)), which the queries of Ministral 3 are multiplied by. share: how
    much of each head turns, from its front; where the kind is "proportional" the pairs are those of the whole head, and
    all but that share of them stand still. neighbors: the pairs are (2i, 2i + 1), as in the paper, and not half of what
    turns apart.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "proportional"] = "default"
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
    query_growth: float | None = None
    share: float = 1.0
    neighbors: bool = False

    def width(self, head_dim: int) -> int:
        """How many numbers of a head turn, or stand in a pair that could."""
        return head_dim if self.kind == "proportional" else int(head_dim * self.share)


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
class Experts:
    """MLPs of which a router chooses a few for each token (Shazeer et al. 2017, arXiv:1701.06538).

    count: MLPs of a block. active: Those that a token goes through. normalized: Whether their weights are made to sum
    to 1. shared_dim: Inner width of one more that every token goes through; 0 = none. balance: What the loss of uneven
    choices is multiplied by in training. dense_layers: Those that have an ordinary MLP instead, of inner width
    dense_dim. beside: All layers have such an MLP, and its output is added.
    """

    count: int
    active: int
    normalized: bool = True
    shared_dim: int = 0
    balance: float = 0.0
    dense_layers: tuple[int, ...] = ()
    dense_dim: int = 0
    beside: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        check_numbers(self, "experts")
        if (self.dense_layers or self.beside) and self.dense_dim < 1:
            raise ConfigError(f"experts: dense_dim is {self.dense_dim}; layers with an ordinary MLP want its width")
        if not 1 <= self.active <= self.count:
            raise ConfigError(f"experts: active is {self.active}; expected 1 to {self.count}, the number of experts")
        if self.shared_dim < 0 or self.balance < 0:
            raise ConfigError("experts: shared_dim and balance must not be below 0")


@dataclass(frozen=True)
class Delta:
    """Layers that keep a state of fixed size in place of attention (Yang et al. 2024, arXiv:2412.06464).

    layers: Which. heads, head_dim: of queries and keys; value_heads, value_dim: of values. kernel: tokens of the short
    convolution before them. CHUNK: tokens that are computed at a time.
    """

    CHUNK: ClassVar[int] = 64

    layers: tuple[int, ...]
    heads: int
    value_heads: int
    head_dim: int
    value_dim: int
    kernel: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check_numbers(self, "delta")
        if min(self.heads, self.value_heads, self.head_dim, self.value_dim, self.kernel) < 1:
            raise ConfigError("delta: every size must be 1 or more")
        if self.value_heads % self.heads:
            raise ConfigError(f"delta: value_heads {self.value_heads} is not a multiple of heads {self.heads}")

    @property
    def values(self) -> int:
        """Numbers of all values of a token."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Numbers of a token's queries, keys and values together."""
        return 2 * self.heads * self.head_dim + self.values


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a model; the defaults are Llama's kind of block.

    Attributes:
        dim: Width of the residual stream.
        layers: Number of blocks.
        heads: Heads of queries.
        ffn_dim: Inner width of the MLP, or of each expert.
        experts: In place of the MLP, where there are several.
        delta: Layers of a gated delta net in place of attention, where there are some.
        uneven: What differs from layer to layer, where it does; head_dim, kv_heads and ffn_dim are then those of layers
            with a window.
        layer_inputs: Vectors of a token that each layer reads, where there are some.
        vocab: Rows of the embedding.
        context: Positions that the model was made for; a hard limit only where positions are learned.
        kv_heads: Heads of keys and values; 0 = heads.
        head_dim: Width of a head; 0 = dim / heads.
        query_scalar: Scores of attention are divided by its square root; 0 = head_dim.
        family: The model_type that a saved folder gets. It also says which block the model has.
        norm_place: "post" is BERT's, with a norm after the embedding and none at the end; "embed" is "pre", but what
            the first attention reads is normed right after the embedding.
        norm_bias: Whether LayerNorms have one.
        parallel: The two halves of a block read the same state, through one norm ("shared") or each through its own.
        rope: Rotary positions; window_rope: those of layers with a window, where they differ.
        nope_layers: Those that turn nothing, though the others do.
        window: How many tokens back a token sees, itself included, in `window_layers` (None = all layers); as many
            ahead where the model is not causal.
        bias: Which linear layers have one.
        qk_norm: Whether queries and keys are normed.
        qk_norm_over: Head by head, or all heads as one vector.
        attention_cap: Scores of attention are cap tanh(score / cap); 0 = as they are.
        logit_cap: The same of logits.
        embed_scale: What embedded tokens are multiplied by; 0 = what the family does by itself.
        residual_scale: What each half of a block is multiplied by before it is added to the stream.
        logit_divisor: What logits are divided by; it is applied to the last hidden state.
        first_position: The row of learned positions that the first token has; those before it are RoBERTa's own.
        tied: Whether the head is the embedding.
        head: What stands on top; "classes" and "scalar" look at one token of each sequence.
        types: Token types (BERT).
        pooler: Whether there is BERT's dense layer for the first token.
        class_dense: The activation of a dense layer that a classifier has of its own; BERT's is the pooler. "masked":
            the classifier stands on the dense layer and the norm that the head of masked words has.
        pooling: What a classifier looks at: one token of each sequence, or the mean of all.
        extra: Fields of config.json that do not shape the model and are handed on (token ids, labels).
    """

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    vocab: int
    context: int
    kv_heads: int = 0
    head_dim: int = 0
    query_scalar: float = 0.0
    family: str = "llama"
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_place: Literal["pre", "post", "embed"] = "pre"
    norm_bias: bool = True
    parallel: Literal["none", "shared", "own"] = "none"
    mlp: MlpKind = "swiglu"
    experts: Experts | None = None
    delta: Delta | None = None
    uneven: Uneven | None = None
    layer_inputs: LayerInputs | None = None
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope: Rope = Rope()
    window_rope: Rope | None = None
    nope_layers: tuple[int, ...] = ()
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    causal: bool = True
    bias: Bias = "none"
    qk_norm: bool = False
    qk_norm_over: Literal["head", "all"] = "head"
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embed_scale: float = 0.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    first_position: int = 0
    tied: bool = False
    head: Head = "lm"
    classes: int = 0
    types: int = 0
    pooler: bool = False
    class_dense: Literal["none", "tanh", "relu", "masked"] = "none"
    pooling: Literal["token", "mean"] = "token"
    image: Image | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        for name in ("dim", "layers", "heads", "ffn_dim", "context"):
            most = MOST_LAYERS if name == "layers" else LARGEST
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"model: {name} is {getattr(self, name)}; expected 1 to {most:,}")
        if self.head_dim == 0 and self.dim % self.heads:
            raise ConfigError(f"model: dim {self.dim} is not a multiple of heads {self.heads}; give head_dim")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.heads)
        if self.head == "scalar":
            object.__setattr__(self, "classes", 1)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(f"model: heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        turning = self.rope.width(self.head_dim)
        if self.positions == "rotary" and (turning % 2 or not 2 <= turning <= self.head_dim):
            raise ConfigError(f"model: {turning} of head_dim {self.head_dim} are to turn; rotary positions turn pairs")
        if self.head == "classes" and self.classes < 1:
            raise ConfigError("model: head is classes, but classes is 0")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"model: window is {self.window}; expected 1 or more")
        if self.experts is not None and self.layers * self.experts.count > MOST_EXPERTS:
            raise ConfigError(
                f"model: {self.layers} layers of {self.experts.count:,} experts; at most {MOST_EXPERTS:,} in all"
            )
        if self.uneven is not None:
            self._check_uneven(self.uneven)
        if self.mlp not in MLP_KINDS:
            raise ConfigError(f'model: mlp is "{self.mlp}"; known: {", ".join(MLP_KINDS)}')
        if self.image is None and self.vocab < 1:
            raise ConfigError(f"model: vocab is {self.vocab}; expected 1 or more")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """From fields in which those that are dataclasses here may be mappings."""
        kinds = {"rope": Rope, "window_rope": Rope, "image": Image, "experts": Experts, "delta": Delta,
                 "uneven": Uneven, "layer_inputs": LayerInputs}  # fmt: skip
        nested = {name: kind(**value) for name, kind in kinds.items() if isinstance(value := fields.get(name), Mapping)}
        return cls(**{**fields, **nested})

    @property
    def attention_scale(self) -> float:
        """What the product of a query and a key is multiplied by (Vaswani et al. 2017, section 3.2.1)."""
        return 1 / sqrt(self.query_scalar or self.head_dim)

    @property
    def reach(self) -> int:
        """Tokens that prompt and reply may have together. Dynamic rope stretches the context by its factor."""
        return int(self.context * (self.rope.factor or 1)) if self.rope.kind == "dynamic" else self.context

    @property
    def pools(self) -> bool:
        """Whether a classifier on top of such a model reads BERT's pooler."""
        return not self.causal and self.image is None and self.class_dense == "none"

    @property
    def kinds(self) -> tuple[int, ...]:
        """For each layer, the first one that has parameters of the same names and shapes."""
        bare = self.norm_place == "embed"
        looks = [
            (self.mixes_by_state(layer), self.mixes_experts(layer), bare and layer == 0,
             self.uneven and (self.windowed(layer), self.borrows(layer)))
            for layer in range(self.layers)
        ]  # fmt: skip
        return tuple(looks.index(look) for look in looks)

    def at(self, layer: int) -> "ModelConfig":
        """The same with the sizes that one layer has; itself where all have the same."""
        if self.uneven is None:
            return self
        own = self if self.windowed(layer) else self.uneven
        width = 2 * self.ffn_dim if self.uneven.double and self.borrows(layer) else self.ffn_dim
        even = replace(self.uneven, double=False)
        return replace(self, head_dim=own.head_dim, kv_heads=own.kv_heads, ffn_dim=width, uneven=even)

    def borrows(self, layer: int) -> bool:
        """Whether this layer reads the keys and values of another."""
        return self.uneven is not None and layer >= self.layers - self.uneven.borrowing

    def keys_from(self, layer: int) -> int:
        """The layer whose keys and values this one reads; itself in most."""
        if self.uneven is None or not self.borrows(layer):
            return layer
        own = range(self.layers - self.uneven.borrowing)
        return max(other for other in own if self.windowed(other) == self.windowed(layer))

    def keys_are_values(self, layer: int) -> bool:
        """Whether this layer has no v of its own though it has k."""
        return self.uneven is not None and self.uneven.keys_as_values and not self.windowed(layer)

    def _check_uneven(self, uneven: Uneven) -> None:
        own = range(max(0, self.layers - uneven.borrowing))
        kinds = {self.windowed(layer) for layer in own}
        lacking = [layer for layer in range(len(own), self.layers) if self.windowed(layer) not in kinds]
        if lacking:
            raise ConfigError(
                f"model: layer {lacking[0]} has no keys of its own, and no layer before the last {uneven.borrowing} is "
                "of its kind"
            )
        if self.heads % uneven.kv_heads:
            raise ConfigError(f"model: heads {self.heads} is not a multiple of uneven.kv_heads {uneven.kv_heads}")
        turning = self.rope.width(uneven.head_dim)
        if turning % 2 or turning < 2:
            raise ConfigError(f"model: {turning} of uneven.head_dim {uneven.head_dim} are to turn; it must be even")

    def mixes_by_state(self, layer: int) -> bool:
        """Whether this layer has a delta net in the place of attention."""
        return self.delta is not None and layer in self.delta.layers

    def mixes_experts(self, layer: int) -> bool:
        """Whether this layer has experts in the place of its MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def gated(self) -> bool:
        return MLP_KINDS[self.mlp][0]

    def windowed(self, layer: int) -> bool:
        """Whether this layer looks back no further than the window."""
        return self.window is not None and (self.window_layers is None or layer in self.window_layers)


CLASS_FIELDS = ("id2label", "label2id", "problem_type")


def class_fields(classes: Sequence[str]) -> dict[str, Any]:
    """The fields of config.json that name the classes; empty where there are none."""
    if not classes:
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def class_names(config: ModelConfig) -> list[str]:
    """The names of the classes by number; LABEL_0, LABEL_1, ... where the folder names none, as in transformers."""
    named = config.extra.get("id2label")
    named = named if isinstance(named, Mapping) else {}
    return [str(named.get(str(i), named.get(i, f"LABEL_{i}"))) for i in range(config.classes)]


def complete(config: ModelConfig, written: Mapping[str, Any], absent: Sequence[str] = TOKENS) -> dict[str, Any]:
    """A family's fields of config.json with those that every family carries.

    Args:
        config: Of the model.
        written: What the family writes of its shape.
        absent: Fields that are written as null where the model has none: transformers' own defaults for them are ids of
            other models.
    """
    result = {**written, **config.extra}
    for name in absent:
        result.setdefault(name, None)
    return {**result, "num_labels": config.classes} if config.classes else result
