"""Llama 1 to 3, Mistral, Qwen2, Qwen2.5 and Qwen3: one table, four ways to say it in config.json.

RMSNorm before each half of a block, rotary positions, grouped-query attention, a gated MLP. They differ in biases
(Qwen2 has them on q, k and v), in a norm over each head's q and k (Qwen3), and in the sliding window (Mistral, Qwen2).
Leaves out: Llama 4, Qwen3's experts, and windows that alternate in another order than config.json's layer_types.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Family, refuse_shape, rules
from lapis.families.config import ModelConfig, Rope
from lapis.families.fields import TOKENS, Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.parsing import quoted

BLOCK = "layers.{layer}."
RULES = (
    *rules("embed_tokens", "embed"),
    *rules(BLOCK + "input_layernorm", "norm.attn"),
    *rules(BLOCK + "self_attn.q_proj", "attn.q", "weight bias"),
    *rules(BLOCK + "self_attn.k_proj", "attn.k", "weight bias"),
    *rules(BLOCK + "self_attn.v_proj", "attn.v", "weight bias"),
    *rules(BLOCK + "self_attn.o_proj", "attn.o", "weight bias"),
    *rules(BLOCK + "self_attn.q_norm", "attn.q_norm"),
    *rules(BLOCK + "self_attn.k_norm", "attn.k_norm"),
    *rules(BLOCK + "post_attention_layernorm", "norm.mlp"),
    *rules(BLOCK + "mlp.gate_proj", "mlp.gate", "weight bias"),
    *rules(BLOCK + "mlp.up_proj", "mlp.up", "weight bias"),
    *rules(BLOCK + "mlp.down_proj", "mlp.down", "weight bias"),
    *rules("norm", "norm.final"),
    *rules("lm_head", "head", outside=True),
    *rules("score", "head.classes", outside=True),
)

GATES = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
GATE_NAMES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}
HEADS = {"ForCausalLM": "lm", "ForSequenceClassification": "classes", "Model": "none"}
HEAD_NAMES = {
    "lm": "ForCausalLM",
    "classes": "ForSequenceClassification",
    "scalar": "ForSequenceClassification",
    "none": "Model",
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def read_config(fields: Fields) -> dict[str, Any]:
    kind = str(fields.config["model_type"])
    dim, heads, layers = (
        fields.integer("hidden_size"),
        fields.integer("num_attention_heads"),
        fields.layers("num_hidden_layers"),
    )
    context = fields.integer("max_position_embeddings")
    head_dim = fields.optional("head_dim") or (128 if kind == "qwen3" else 0)
    if not head_dim and dim % heads:
        raise CheckpointError(f"config.json: hidden_size {dim} is not a multiple of num_attention_heads {heads}")
    head = fields.head(HEADS, "lm")
    classes = fields.labels() if head == "classes" else 0
    fields.keep(*TOKENS, "initializer_range", "attention_dropout")
    window, window_layers = _read_window(fields, kind, layers)
    return {
        "family": kind,
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "kv_heads": fields.optional("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "ffn_dim": fields.integer("intermediate_size"),
        "vocab": fields.integer("vocab_size"),
        "context": context,
        "norm": "rms",
        "norm_eps": fields.number("rms_norm_eps"),
        "norm_place": "pre",
        "mlp": fields.choice("hidden_act", GATES),
        "positions": "rotary",
        "rope": read_rope(fields, context),
        "window": window,
        "window_layers": window_layers,
        "bias": _read_bias(fields, kind),
        "qk_norm": kind == "qwen3",
        "tied": fields.flag("tie_word_embeddings", False),
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    kind = config.family
    qkv_only, qk_norm = kind == "qwen2", kind == "qwen3"
    biases = {
        "qwen2": ("qkv",),
        "mistral": ("none",),
        "llama": ("none", "attention", "mlp", "all"),
        "qwen3": ("none", "attention"),
    }
    refuse_shape(config, {
        "norm": ("rms",), "norm_place": ("pre",), "positions": ("rotary",), "causal": (True,), "qk_norm": (qk_norm,),
        "mlp": tuple(GATE_NAMES), "bias": biases[kind], "types": (0,), "image": (None,), "head": tuple(HEAD_NAMES),
    })  # fmt: skip
    result: dict[str, Any] = {
        "architectures": [CLASSES[kind] + HEAD_NAMES[config.head]],
        "model_type": kind,
        **write_sizes(config),
        "hidden_act": GATE_NAMES[config.mlp],
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **write_rope(config.rope),
        **config.extra,
    }
    if kind in ("llama", "qwen3"):
        result["attention_bias"] = config.bias in ("attention", "all")
    if kind == "llama":
        result["mlp_bias"] = config.bias in ("mlp", "all")
    for name in TOKENS:
        result.setdefault(name, None)  # transformers' own defaults for absent ids are those of other models
    if config.classes:
        result["num_labels"] = config.classes
    return {**result, **_write_window(config, qkv_only or qk_norm)}


def _read_bias(fields: Fields, kind: str) -> str:
    if kind == "qwen2":
        fields.only("attention_bias", True)
        fields.only("use_mrope", False)
        return "qkv"
    if kind == "mistral":
        fields.only("attention_bias", False)
        return "none"
    attention, mlp = fields.flag("attention_bias", False), kind == "llama" and fields.flag("mlp_bias", False)
    return {(False, False): "none", (True, False): "attention", (False, True): "mlp", (True, True): "all"}[
        attention, mlp
    ]


def _read_window(fields: Fields, kind: str, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The window and the layers that have it. Mistral: all; Qwen: those that layer_types or max_window_layers say."""
    if kind == "llama":
        fields.only("sliding_window", None)
        return None, None
    window = fields.optional("sliding_window")
    if kind == "mistral":
        if "sliding_window" not in fields.config:
            raise CheckpointError("config.json: sliding_window is missing; write null where there is none")
        return window, None
    used = fields.flag("use_sliding_window", False)
    first = fields.integer("max_window_layers", layers, least=0)
    chosen = read_layer_types(fields, layers)
    if chosen is None:
        chosen = tuple(range(first, layers)) if used else ()
    if not window or not chosen or not used:
        return None, None
    return window, None if len(chosen) == layers else chosen


def read_layer_types(fields: Fields, layers: int) -> tuple[int, ...] | None:
    """The layers that have a window by `layer_types`; None where the field is not there."""
    fields.known.add("layer_types")
    types = fields.config.get("layer_types")
    if types is None:
        return None
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= known:
        raise CheckpointError(f"config.json: layer_types must name {layers} times one of {', '.join(sorted(known))}")
    return tuple(i for i, name in enumerate(types) if name == "sliding_attention")


def write_sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes under the names that they have in config.json, in that order."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
    }


def write_layer_types(config: ModelConfig) -> list[str]:
    """`layer_types`: for each layer, whether it has the window."""
    return ["sliding_attention" if config.windowed(i) else "full_attention" for i in range(config.layers)]


def _write_window(config: ModelConfig, by_layer: bool) -> dict[str, Any]:
    if config.family == "llama":
        if config.window:
            raise ConfigError(f"window={config.window} has no place in a llama folder; family=mistral has one")
        return {}
    if not by_layer:
        if config.window_layers is not None:
            raise ConfigError("window_layers has no place in a mistral folder; family=qwen2 has one")
        return {"sliding_window": config.window}
    windowed = {i for i in range(config.layers) if config.windowed(i)}
    return {
        "use_sliding_window": bool(windowed),
        "sliding_window": config.window,
        "max_window_layers": min(windowed, default=config.layers),
        "layer_types": write_layer_types(config),
    }


ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(fields: Fields, context: int) -> dict[str, Any]:
    """Rope's fields from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Where a folder has both, `rope_scaling` counts alone, in every version of transformers.
    """
    theta = fields.number("rope_theta", 10_000.0)
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    written = scaling or parameters
    inner = Fields(written)
    if scaling and "rope_theta" not in {*scaling, *fields.config} and parameters.get("rope_theta", theta) != theta:
        raise CheckpointError(
            "config.json: rope_theta stands in rope_parameters alone, which rope_scaling replaces; write it beside both"
        )
    kind = str(written.get("rope_type") or written.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise CheckpointError(f"config.json: rope type is {quoted(kind)}; lapis reads {', '.join(ROPE_KINDS)}")
    if written.get("partial_rotary_factor", 1.0) != 1.0 or fields.config.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor is not 1; lapis rotates whole heads only")
    rope: dict[str, Any] = {"theta": inner.number("rope_theta", theta), "kind": kind}
    needed = {"linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())  # fmt: skip
    for name in needed:
        rope[name] = inner.number(name)
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if written.get(name):
                rope[name] = inner.number(name)
        rope["truncate"] = inner.flag("truncate", True)
    if kind in ("yarn", "llama3"):
        rope["original_context"] = inner.integer("original_max_position_embeddings", context)
    return rope


def write_rope(rope: Rope) -> dict[str, Any]:
    """Both spellings: `rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for those before."""
    scaling: dict[str, Any] = {}
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind}
        names = {"yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(rope.kind, ("factor",))  # fmt: skip
        scaling |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
        if rope.kind == "yarn" and not rope.truncate:
            scaling["truncate"] = False
        if rope.original_context:
            scaling["original_max_position_embeddings"] = rope.original_context
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": "default", **scaling},
    }


def _preset(
    kind: str, dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab: int, context: int, *,
    theta: float = 10_000.0, eps: float = 1e-5, tied: bool = False, head_dim: int | None = None, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    return {
        "model_type": kind, "architectures": [f"{name}ForCausalLM"], "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn_dim,
        "vocab_size": vocab, "max_position_embeddings": context, "rope_theta": theta, "rms_norm_eps": eps,
        "tie_word_embeddings": tied, "head_dim": head_dim, "hidden_act": "silu", **fields,
    }  # fmt: skip


def _stretched(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _preset("llama", 4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-3-8b": _preset("llama", 4096, 32, 32, 8, 14336, 128256, 8192, theta=5e5),
    "llama-3.1-8b": _preset("llama", 4096, 32, 32, 8, 14336, 128256, 131072, theta=5e5, rope_scaling=_stretched(8.0)),
    "llama-3.2-1b": _preset("llama", 2048, 16, 32, 8, 8192, 128256, 131072, theta=5e5, tied=True, head_dim=64,
                            rope_scaling=_stretched(32.0)),
    "mistral-7b": _preset("mistral", 4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096),
    "qwen2.5-0.5b": _preset("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, theta=1e6, eps=1e-6, tied=True),
    "qwen2.5-1.5b": _preset("qwen2", 1536, 28, 12, 2, 8960, 151936, 131072, theta=1e6, eps=1e-6, tied=True),
    "qwen2.5-7b": _preset("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072, theta=1e6, eps=1e-6),
    "qwen3-0.6b": _preset("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, theta=1e6, eps=1e-6, tied=True, head_dim=128),
    "qwen3-1.7b": _preset("qwen3", 2048, 28, 16, 8, 6144, 151936, 40960, theta=1e6, eps=1e-6, tied=True, head_dim=128),
}  # fmt: skip

FAMILY = Family(
    name="llama",
    model_types=tuple(CLASSES),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="model.",
    ignored=(r"rotary_emb\.inv_freq$",),
    defaults={"qwen2": {"bias": "qkv"}, "qwen3": {"qk_norm": True}},
    presets=PRESETS,
    gguf={
        "llama": Gguf("llama", permuted=True, computes={**ROTARY, "mlp": ("swiglu",)}),
        "mistral": Gguf("llama", permuted=True, computes={**ROTARY, "mlp": ("swiglu",)}),
        "qwen2": Gguf("qwen2", computes={**ROTARY, "mlp": ("swiglu",)}),
        "qwen3": Gguf("qwen3", computes={**ROTARY, "mlp": ("swiglu",), "bias": ("none",)}),
    },
)
