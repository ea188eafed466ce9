"""Llama 1 to 3, Qwen2, Qwen2.5 and Qwen3: one table, three ways to say it in config.json.

RMSNorm before each half of a block, rotary positions, grouped-query attention, a gated MLP. They differ in biases
(Qwen2 has them on q, k and v), in a norm over each head's q and k (Qwen3), and in the sliding window (Qwen). What all
who followed Llama say alike is read and written here too. Leaves out: Llama 4, Qwen3's experts.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Family, refuse_shape, rules
from lapis.families.config import ModelConfig, complete
from lapis.families.fields import TOKENS, Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.rotary import read_rope, write_rope
from lapis.families.windows import read_window, write_window

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
BIASES = ("none", "attention", "mlp", "all")
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def read_config(fields: Fields) -> dict[str, Any]:
    kind, layers = str(fields.config["model_type"]), fields.layers("num_hidden_layers")
    window, window_layers = _read_window(fields, kind, layers)
    return {
        **read_decoder(fields, head_dim=128 if kind == "qwen3" else 0),
        "window": window,
        "window_layers": window_layers,
        "bias": _read_bias(fields, kind),
        "qk_norm": kind == "qwen3",
    }


def read_decoder(
    fields: Fields, *, head_dim: int = 0, theta: float = 10_000.0, tied: bool = False,
    eps: str = "rms_norm_eps", rope: dict[str, Any] | None = None, mlps: Mapping[str, str] = GATES,
) -> dict[str, Any]:  # fmt: skip
    """What config.json says alike in Llama and in all who followed it; ModelConfig's fields.

    Args:
        fields: Of config.json.
        head_dim: Width of a head where the field is not there; 0 = hidden_size / num_attention_heads.
        theta: Rotary base where the field is not there.
        tied: Whether the head is the embedding where the field is not there.
        eps: The field that norms' epsilon has.
        rope: Rotary positions that were read already.
        mlps: Name of an activation -> the kind of MLP that has it.
    """
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    context = fields.integer("max_position_embeddings")
    head_dim = fields.optional("head_dim") or head_dim
    if not head_dim and dim % heads:
        raise CheckpointError(f"config.json: hidden_size {dim} is not a multiple of num_attention_heads {heads}")
    head = fields.head(HEADS, "lm")
    classes = fields.labels() if head == "classes" else 0
    fields.keep(*TOKENS, "initializer_range", "attention_dropout")
    rope, kind = rope or read_rope(fields, context, theta), str(fields.config["model_type"])
    if rope.get("query_growth") and kind != "ministral3":
        raise CheckpointError("config.json: llama_4_scaling_beta changes queries; lapis reads it in ministral3 only")
    return {
        "family": kind,
        "dim": dim,
        "layers": fields.layers("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.optional("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "ffn_dim": fields.integer("intermediate_size"),
        "vocab": fields.integer("vocab_size"),
        "context": context,
        "norm_eps": fields.number(eps),
        "mlp": fields.choice("hidden_act", mlps),
        "rope": rope,
        "tied": fields.flag("tie_word_embeddings", tied),
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    kind = config.family
    biases = {"qwen2": ("qkv",), "llama": BIASES, "qwen3": ("none", "attention")}[kind]
    result = write_decoder(config, CLASSES[kind], qk_norm=(kind == "qwen3",), bias=biases)
    if kind != "qwen2":
        result |= write_biases(config, mlp=kind == "llama")
    return {**result, **_write_window(config)}


def write_decoder(config: ModelConfig, name: str, **allowed: tuple[Any, ...]) -> dict[str, Any]:
    """The reverse of `read_decoder`. Raises ConfigError for a shape that such a folder cannot say.

    Args:
        config: Of the model.
        name: What the classes of transformers begin with.
        allowed: Field of ModelConfig -> the values that the family has, where they are not Llama's.
    """
    refuse_shape(config, {
        "norm": ("rms",), "norm_place": ("pre",), "positions": ("rotary",), "causal": (True,), "qk_norm": (False,),
        "mlp": tuple(GATE_NAMES), "bias": ("none",), "types": (0,), "image": (None,), "head": tuple(HEAD_NAMES),
        **allowed,
    })  # fmt: skip
    written = {
        "architectures": [name + HEAD_NAMES[config.head]],
        "model_type": config.family,
        **write_sizes(config),
        "hidden_act": GATE_NAMES.get(config.mlp, config.mlp),
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **write_rope(config.rope),
    }
    return complete(config, written)


def _read_bias(fields: Fields, kind: str) -> str:
    if kind == "qwen2":
        fields.only("attention_bias", True)
        fields.only("use_mrope", False)
        return "qkv"
    return read_biases(fields, mlp=kind == "llama")


def read_biases(fields: Fields, *, mlp: bool = True) -> str:
    """Which linear layers have a bias, by `attention_bias` and, where the family has it, `mlp_bias`."""
    attention, mlp = fields.flag("attention_bias", False), mlp and fields.flag("mlp_bias", False)
    return {(False, False): "none", (True, False): "attention", (False, True): "mlp", (True, True): "all"}[
        attention, mlp
    ]


def write_biases(config: ModelConfig, *, mlp: bool = True) -> dict[str, Any]:
    """`attention_bias` and, where the family has it, `mlp_bias`."""
    result = {"attention_bias": config.bias in ("attention", "all")}
    return {**result, "mlp_bias": config.bias in ("mlp", "all")} if mlp else result


def _read_window(fields: Fields, kind: str, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The window and the layers that have it: those that layer_types or max_window_layers say."""
    if kind == "llama":
        fields.only("sliding_window", None)
        return None, None
    used = fields.flag("use_sliding_window", False)
    first = fields.integer("max_window_layers", layers, least=0)
    window = read_window(fields, layers, tuple(range(first, layers)))
    return window if used else (None, None)


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


def _write_window(config: ModelConfig) -> dict[str, Any]:
    if config.family == "llama":
        if config.window:
            raise ConfigError(f"window={config.window} has no place in a llama folder; family=mistral has one")
        return {}
    windowed = {i for i in range(config.layers) if config.windowed(i)}
    return {
        "use_sliding_window": bool(windowed),
        "max_window_layers": min(windowed, default=config.layers),
        **write_window(config),
    }


def preset(
    kind: str, dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab: int, context: int, *,
    theta: float = 10_000.0, eps: float = 1e-5, tied: bool = False, head_dim: int | None = None, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a config.json that shape a published model."""
    return {
        "model_type": kind, "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn_dim,
        "vocab_size": vocab, "max_position_embeddings": context, "rope_theta": theta, "rms_norm_eps": eps,
        "tie_word_embeddings": tied, "head_dim": head_dim, "hidden_act": "silu", **fields,
    }  # fmt: skip


def _stretched(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": preset("llama", 4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-3-8b": preset("llama", 4096, 32, 32, 8, 14336, 128256, 8192, theta=5e5),
    "llama-3-70b": preset("llama", 8192, 80, 64, 8, 28672, 128256, 8192, theta=5e5),
    "llama-3.1-8b": preset("llama", 4096, 32, 32, 8, 14336, 128256, 131072, theta=5e5, rope_scaling=_stretched(8.0)),
    "llama-3.2-1b": preset("llama", 2048, 16, 32, 8, 8192, 128256, 131072, theta=5e5, tied=True, head_dim=64,
                            rope_scaling=_stretched(32.0)),
    "qwen2.5-0.5b": preset("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, theta=1e6, eps=1e-6, tied=True),
    "qwen2.5-1.5b": preset("qwen2", 1536, 28, 12, 2, 8960, 151936, 131072, theta=1e6, eps=1e-6, tied=True),
    "qwen2.5-7b": preset("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072, theta=1e6, eps=1e-6),
    "qwen3-0.6b": preset("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, theta=1e6, eps=1e-6, tied=True, head_dim=128),
    "qwen3-1.7b": preset("qwen3", 2048, 28, 16, 8, 6144, 151936, 40960, theta=1e6, eps=1e-6, tied=True, head_dim=128),
}  # fmt: skip

# names under "model.", and a buffer of older folders that is computed anew
llama_like = partial(Family, prefix="model.", ignored=(r"rotary_emb\.inv_freq$",))

FAMILY = llama_like(
    name="llama",
    model_types=tuple(CLASSES),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    defaults={"qwen2": {"bias": "qkv"}, "qwen3": {"qk_norm": True}},
    presets=PRESETS,
    gguf={
        "llama": Gguf("llama", permuted=True, computes={**ROTARY, "mlp": ("swiglu",)}),
        "qwen2": Gguf("qwen2", computes={**ROTARY, "mlp": ("swiglu",)}),
        "qwen3": Gguf("qwen3", computes={**ROTARY, "mlp": ("swiglu",), "bias": ("none",)}),
    },
)
