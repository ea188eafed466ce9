"""The shape of a model as the keys of a GGUF file, and back.

The keys are those that llama.cpp reads for all architectures alike. What they cannot say is refused by name. Leaves out
the tokenizer (formats/vocabulary/) and the tensors (tensors.py).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lapis.errors import CheckpointError, ConfigError
from lapis.families import FAMILIES, Family, family_of
from lapis.families.config import ModelConfig, Rope
from lapis.families.gguf import Gguf
from lapis.families.olmo import PATTERN as OLMO3_PATTERN
from lapis.formats.gguf.header import GgufFile
from lapis.formats.gguf.library import Array
from lapis.formats.gguf.tensors import ROPE_FACTORS
from lapis.wording import format_count

MEAN_POOLING, CLS_POOLING = 1, 2


def layout_of(config: ModelConfig, family: Family) -> Gguf:
    """How a model of this shape lies in a file. Raises ConfigError where llama.cpp does not have it, by name."""
    layout = family.gguf.get(config.family)
    if layout is None:
        known = ", ".join(kind for other in FAMILIES for kind in other.gguf)
        raise ConfigError(f"{config.family} has no GGUF file here; known: {known}")
    layout.check(config)
    return layout


def write_keys(config: ModelConfig, layout: Gguf, notes: list[str]) -> dict[str, Any]:
    """Key without the architecture's name in front -> int, float or bool. notes: gains what a reader should know.

    Raises ConfigError for windows and rotary positions that llama.cpp has no words for.
    """
    epsilon = "attention.layer_norm_rms_epsilon" if config.norm == "rms" else "attention.layer_norm_epsilon"
    keys: dict[str, Any] = {
        "vocab_size": config.vocab, "context_length": config.context, "embedding_length": config.dim,
        "block_count": config.layers, "feed_forward_length": config.ffn_dim, "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads, epsilon: float(config.norm_eps),
    }  # fmt: skip
    if config.positions == "rotary":
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
                 "rope.dimension_count": config.rope.width(config.head_dim), "rope.freq_base": float(config.rope.theta),
                 **_rope_keys(config.rope, layout, notes)}  # fmt: skip
    if config.experts is not None:
        keys |= {"expert_count": config.experts.count, "expert_used_count": config.experts.active,
                 "expert_feed_forward_length": config.ffn_dim}  # fmt: skip
        if config.experts.shared_dim:
            keys["expert_shared_feed_forward_length"] = config.experts.shared_dim
    if layout.says_parallel:
        keys["use_parallel_residual"] = config.parallel != "none"
    keys |= {key: float(_number(config, name)) for name, key in layout.numbers.items()}
    if not config.causal:
        keys |= {"attention.causal": False, "pooling_type": MEAN_POOLING}
        notes.append(
            "its embedding of a text is the mean of its last layer (pooling_type 1); --pooling cls is llama.cpp's"
        )
    if layout.own_windows:
        return {**keys, **layout.more(config)}
    if layout.says_windows:
        keys |= {"attention.sliding_window": config.window,
                 "attention.sliding_window_pattern": [config.windowed(i) for i in range(config.layers)]}  # fmt: skip
    elif layout.windows and not (layout.optional_windows and config.window is None):
        _check_windows(config, layout)
        keys["attention.sliding_window"] = config.window
    elif config.window is not None and config.window < config.context:
        keys["context_length"] = config.window
        notes.append(
            f"llama.cpp has no window for {config.family}: the context is told as {config.window:,} tokens, within "
            "which nothing differs"
        )
    return {**keys, **layout.more(config)}


def _number(config: ModelConfig, name: str) -> float:
    """A field as the file says it: the scale of scores, not what its root divides by."""
    if name == "logit_factor":
        return 1 / config.logit_divisor
    return config.attention_scale if name == "query_scalar" else float(getattr(config, name))


def _field(name: str, number: float) -> tuple[str, float]:
    """The reverse of `_number`: a field of ModelConfig and its value."""
    if name == "logit_factor":
        return "logit_divisor", float(f"{1 / number:.6g}")
    return name, float(f"{number**-2:.6g}") if name == "query_scalar" else number


def _check_windows(config: ModelConfig, layout: Gguf) -> None:
    """Windows in all layers but each sixth, say, with a rotary base of their own: what llama.cpp takes for granted."""
    windowed, each = [config.windowed(i) for i in range(config.layers)], layout.windows
    if config.window is None or windowed != _windowed(config.layers, each):
        raise ConfigError(
            f"llama.cpp gives {config.family} a window in {format_count(each - 1, 'layer')} of {each}, in order; "
            "this model has no GGUF file"
        )
    near = config.window_rope or config.rope
    if layout.near_plain and near != Rope(theta=config.rope.theta):
        raise ConfigError(
            f"layers with a window turn by {near.kind} rotary positions of base {near.theta:g}; llama.cpp turns them "
            f"unstretched by {config.rope.theta:g}"
        )
    if layout.near_theta and near != Rope(theta=layout.near_theta):
        raise ConfigError(
            f"layers with a window turn by {near.kind} rotary positions of base {near.theta:g}; llama.cpp knows only "
            f"{layout.near_theta:g} there"
        )


def _windowed(layers: int, each: int) -> list[bool]:
    """For each layer whether it has a window, where each such one has none."""
    return [bool((i + 1) % each) for i in range(layers)]


def _rope_keys(rope: Rope, layout: Gguf, notes: list[str]) -> dict[str, Any]:
    if rope.kind in ("default", "llama3", "proportional"):  # the factors of these are a tensor
        return {}
    plain = Rope(rope.theta, rope.kind, rope.factor, rope.original_context, share=rope.share, neighbors=rope.neighbors)
    free: dict[str, Any] = {"beta_fast": None, "beta_slow": None, "query_growth": None, "truncate": True}
    if layout.yarn_mscale and rope.mscale == 1:
        free |= {"mscale": None, "mscale_all_dim": None}
    if abs((rope.attention_factor or 0) - _temperature(rope)) < 1e-6:  # what it is without the field
        free["attention_factor"] = None
    if rope.kind == "dynamic" or replace(rope, **free) != plain or _own_betas(rope):
        raise ConfigError(f"rotary positions of kind {rope.kind} with these settings have no words in a GGUF file")
    keys: dict[str, Any] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor or 1.0)}
    if rope.original_context:
        keys["rope.scaling.original_context_length"] = rope.original_context
    if layout.yarn_mscale and rope.mscale_all_dim:
        keys["rope.scaling.yarn_log_multiplier"] = float(rope.mscale_all_dim)
    if rope.kind == "yarn" and not rope.truncate:
        notes.append(
            "the bounds of YaRN are kept as they are (truncate false); llama.cpp rounds them, in every such file"
        )
    return keys


def _temperature(rope: Rope) -> float:
    """What YaRN multiplies cos and sin by where nothing else is said."""
    return 0.1 * math.log(rope.factor or 1.0) + 1.0


def _own_betas(rope: Rope) -> bool:
    return rope.beta_fast not in (None, 32) or rope.beta_slow not in (None, 1)


def rope_factors(rope: Rope, head_dim: int, context: int) -> Array | None:
    """What each pair's frequency is divided by, float32 [head_dim / 2]; None for kinds that keys say.

    Args:
        rope: Of llama3's kind, or proportional (pairs that stand still are divided by 1e30).
        head_dim: Of the layers that turn so.
        context: Of the model.
    """
    if rope.kind == "proportional":
        turning = int(rope.share * head_dim // 2)
        return np.array([rope.factor or 1.0] * turning + [1e30] * (head_dim // 2 - turning), np.float32)
    if rope.kind != "llama3":
        return None
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factor, low, high = rope.factor or 1.0, rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
    turns = (rope.original_context or context) * inverse / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: Array = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


class _Keys:
    """The keys of one architecture, each asked for with its type and range."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.file, self.arch = file, arch

    def value(self, name: str) -> Any:
        return self.file.fields.get(f"{self.arch}.{name}")

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.value(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            self.wrong(name, value, "a whole number from 1")
        assert isinstance(value, int)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.value(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            self.wrong(name, value, "a number above 0")
        assert isinstance(value, (int, float))
        return float(np.float32(value).astype(str)) if isinstance(value, float) else float(value)

    def wrong(self, name: str, value: Any, expected: str) -> None:
        what = "is missing" if value is None else f"is {value!r:.40}"
        raise CheckpointError(f"{self.file.path}: {self.arch}.{name} {what}; expected {expected}")


def read_shape(file: GgufFile) -> tuple[ModelConfig, Family, Gguf]:
    """The model that a file holds, from its keys and from which tensors are there.

    Raises:
        CheckpointError: For an architecture that is not known, a key that is missing or wrong, or one that says what
            lapis does not compute.
    """
    arch = file.fields.get("general.architecture")
    known = {layout.arch: (kind, family, layout) for family in reversed(FAMILIES)
             for kind, layout in reversed(list(family.gguf.items())) if layout.imported}  # fmt: skip
    if arch not in known:
        raise CheckpointError(
            f"{file.path}: general.architecture is {arch!r:.40}; lapis imports {', '.join(sorted(known))}"
        )
    kind, family, layout = known[str(arch)]
    keys = _Keys(file, str(arch))
    has: Callable[[str], bool] = file.tensors.__contains__
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: holds no token_embd.weight; it is no language model")
    mixture = bool(keys.value("expert_count"))
    dim, heads, layers = (keys.whole(n) for n in ("embedding_length", "attention.head_count", "block_count"))
    if layers > len(file.tensors):
        raise CheckpointError(
            f"{file.path}: claims {layers:,} blocks, and holds {format_count(len(file.tensors), 'tensor')}"
        )
    if dim % heads and keys.value("attention.key_length") is None:
        raise CheckpointError(f"{file.path}: embedding_length {dim} is not a multiple of {heads} heads")
    context, head_dim = keys.whole("context_length"), keys.whole("attention.key_length", dim // heads)
    fields: dict[str, Any] = {
        "family": kind, "dim": dim, "layers": layers, "heads": heads, "head_dim": head_dim,
        "kv_heads": keys.whole("attention.head_count_kv", heads), "ffn_dim": keys.whole("feed_forward_length"),
        "vocab": embedding.shape[0], "context": context, "bias": _bias(file, layers),
        "tied": not has("output.weight"), "qk_norm": has("blk.0.attn_q_norm.weight"),
        **{name: values[0] for name, values in layout.computes.items()
           if name not in ("bias", "query_scalar", "tied") and "." not in name},
        **dict(_field(name, keys.number(key)) for name, key in layout.numbers.items()),
        "nope_layers": layout.nope_layers(layers), **layout.means,
    }  # fmt: skip
    if layout.says_parallel and keys.value("use_parallel_residual") is False:
        fields["parallel"] = "none"
    if fields["norm"] == "rms":
        fields["norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    else:
        fields["norm_eps"] = keys.number("attention.layer_norm_epsilon")
    if fields["positions"] == "rotary":
        neighbors = layout.computes.get("rope.neighbors", (False,))[0]
        fields["rope"] = {**_read_rope(file, keys, head_dim, context, layout.partial), "neighbors": neighbors}
    if mixture:
        fields |= _read_experts(keys, layout)
    if arch == "llama" and mixture:
        fields["family"] = "mixtral"
    if (position := file.tensors.get("position_embd.weight")) is not None:
        fields["context"] = position.shape[0]
    if (types := file.tensors.get("token_types.weight")) is not None:
        fields["types"] = types.shape[0]
    elif arch == "bert":
        fields |= {"family": "distilbert", "class_dense": "relu"}
    if each := layout.windows:
        windowed = _windowed(layers, each)
        fields |= {"window": keys.whole("attention.sliding_window"),
                   "window_rope": {"theta": layout.near_theta} if layout.near_theta else None,
                   "window_layers": tuple(i for i in range(layers) if windowed[i])}  # fmt: skip
        if keys.value("attention.sliding_window_pattern") not in (None, each, windowed):
            raise CheckpointError(f"{file.path}: {arch}.attention.sliding_window_pattern is not one layer of {each}")
    elif arch == "olmo2" and keys.value("attention.sliding_window"):  # OLMo 3, under the same name
        each, plain = OLMO3_PATTERN, {"theta": fields["rope"]["theta"]}
        fields |= {"family": "olmo3", "window": keys.whole("attention.sliding_window"),
                   "window_rope": None if "kind" not in fields["rope"] else plain,
                   "window_layers": tuple(i for i, near in enumerate(_windowed(layers, each)) if near)}  # fmt: skip
    elif arch == "llama" and (window := keys.value("attention.sliding_window")):
        fields |= {"family": "mistral", "window": window}
    try:
        config = ModelConfig.of(fields)
        family = family_of(config)
        return config, family, family.gguf[config.family]
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def _read_experts(keys: "_Keys", layout: Gguf) -> dict[str, Any]:
    """`experts`, and the width of one; files of some families say it as that of an ordinary MLP."""
    shared = keys.value("expert_shared_feed_forward_length")
    return {
        "experts": {
            "count": keys.whole("expert_count"), "active": keys.whole("expert_used_count"),
            "normalized": layout.normalized,
            "shared_dim": keys.whole("expert_shared_feed_forward_length") if shared else 0,
        },
        "ffn_dim": keys.whole("expert_feed_forward_length", keys.whole("feed_forward_length")),
    }  # fmt: skip


def _bias(file: GgufFile, layers: int) -> str:
    """Which linear layers have a bias, from the tensors of the first block."""
    has = {name for name in ("attn_q", "attn_qkv", "attn_output", "ffn_up") if f"blk.0.{name}.bias" in file.tensors}
    attention = bool(has & {"attn_q", "attn_qkv"})
    if attention and "attn_output" not in has:
        return "qkv"
    return {(False, False): "none", (True, False): "attention", (False, True): "mlp", (True, True): "all"}[
        attention, "ffn_up" in has
    ]


def _read_rope(file: GgufFile, keys: _Keys, head_dim: int, context: int, partial: bool) -> dict[str, Any]:
    turning = keys.whole("rope.dimension_count", head_dim)
    if turning != head_dim and (not partial or int(head_dim * (turning / head_dim)) != turning):
        keys.wrong("rope.dimension_count", turning, f"the whole head, {head_dim}")
    rope: dict[str, Any] = {"theta": keys.number("rope.freq_base", 10_000.0), "share": turning / head_dim}
    if (tensor := file.tensors.get(ROPE_FACTORS)) is not None:
        if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
            raise CheckpointError(f"{file.path}: {ROPE_FACTORS} is no vector of {head_dim // 2} float32 numbers")
        return rope | _llama3_of(file.read(tensor, 0, 1).view(np.float32)[0], rope["theta"], head_dim, str(file.path))
    kind = keys.value("rope.scaling.type") or "none"
    linear = keys.value("rope.scale_linear")
    if kind == "none" and linear not in (None, 1.0):
        return rope | {"kind": "linear", "factor": float(linear)}
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        keys.wrong("rope.scaling.type", kind, "none, linear or yarn")
    rope |= {"kind": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_context"] = keys.whole("rope.scaling.original_context_length", context)
        odd = [name for name in ("attn_factor", "yarn_log_multiplier", "yarn_attn_factor", "yarn_beta_fast",
                                 "yarn_beta_slow", "yarn_ext_factor")
               if keys.value(f"rope.scaling.{name}") is not None]  # fmt: skip
        if odd:
            keys.wrong(f"rope.scaling.{odd[0]}", keys.value(f"rope.scaling.{odd[0]}"), "no such key: it is not read")
    return rope


def _llama3_of(factors: Array, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """llama3's settings from the tensor of factors that they gave.

    The blend is a line over how often a pair turns, so two pairs between the ends give its slope and height. Any one of
    the lengths that are consistent with it gives the same model; 8192 is taken, with which Llama 3.1 was trained.
    """
    original = 8192
    factor = float(factors.max())
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * inverse / (2 * math.pi)
    for low, high in ((1.0, 4.0), _line(factors.astype(np.float64), turns, factor)):
        rope: dict[str, Any] = {"kind": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_context": original}  # fmt: skip
        again = rope_factors(Rope(theta, **rope), head_dim, original) if high > low > 0 else None
        if again is not None and np.allclose(again, factors, rtol=1e-4):
            return rope
    raise CheckpointError(f"{where}: {ROPE_FACTORS} holds no factors that llama3's rotary positions give")


def _line(factors: Array, turns: Array, factor: float) -> tuple[float, float]:
    """low and high of the blend, any that give these factors; (0, 0) where none do.

    turns: how often each pair turns in the original context, falling.
    """
    if factor <= 1:
        return 0.0, 0.0
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    slow, fast = turns[smooth <= 1e-3], turns[smooth >= 1 - 1e-3]
    between = np.flatnonzero((smooth > 1e-3) & (smooth < 1 - 1e-3))
    below, above = float(slow.max(initial=turns.min() / 2)), float(fast.min(initial=turns.max() * 2))
    if len(between) == 0:
        return below, above
    first, last = between[0], between[-1]
    turn, height = float(turns[first]), float(smooth[first])
    if first == last:
        width = min((turn - below) / height, (above - turn) / (1 - height))
    else:
        width = float((turns[first] - turns[last]) / (smooth[first] - smooth[last]))
    return turn - height * width, turn + (1 - height) * width
