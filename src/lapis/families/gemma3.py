"""Gemma 3, text (Gemma Team 2025, arXiv:2503.19786): a norm on both sides of each half, windows in five layers of six.

Layers with a window turn by a rotary base of their own. Of a folder with pictures (model_type "gemma3") the language
model is run; what lapis saves of it is "gemma3_text".
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import WRAPPED, Family, refuse_shape, rules
from lapis.families.config import ModelConfig, complete
from lapis.families.fields import TOKENS, Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import GATE_NAMES, GATES, HEADS, write_sizes
from lapis.families.rotary import read_ropes, write_ropes
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
    *rules(BLOCK + "post_attention_layernorm", "norm.attn_out"),
    *rules(BLOCK + "pre_feedforward_layernorm", "norm.mlp"),
    *rules(BLOCK + "mlp.gate_proj", "mlp.gate"),
    *rules(BLOCK + "mlp.up_proj", "mlp.up"),
    *rules(BLOCK + "mlp.down_proj", "mlp.down"),
    *rules(BLOCK + "post_feedforward_layernorm", "norm.mlp_out"),
    *rules("norm", "norm.final"),
    *rules("lm_head", "head", outside=True),
    *rules("score", "head.classes", outside=True),
)
CLASSES = {
    "lm": "Gemma3ForCausalLM",
    "classes": "Gemma3TextForSequenceClassification",
    "scalar": "Gemma3TextForSequenceClassification",
    "none": "Gemma3TextModel",
}
PATTERN = 6  # every sixth layer sees everything, where config.json does not say


def read_config(fields: Fields) -> dict[str, Any]:
    head, context = fields.head(HEADS, "lm"), fields.integer("max_position_embeddings", 131_072)
    classes = fields.labels() if head == "classes" else 0
    layers, head_dim = fields.layers("num_hidden_layers"), fields.integer("head_dim", 256)
    scalar = fields.number("query_pre_attn_scalar", 256)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        fields.only(name, None)
    fields.only("use_bidirectional_attention", False, None)
    fields.only("partial_rotary_factor", 1.0, None)
    fields.keep(*TOKENS, "initializer_range", "attention_dropout")
    window, window_layers = _read_window(fields, layers)
    rope, window_rope = read_ropes(fields, context, 1e6, 1e4, "rope_local_base_freq")
    return {
        "family": "gemma3_text",
        "dim": fields.integer("hidden_size"),
        "layers": layers,
        "heads": fields.integer("num_attention_heads", 8),
        "kv_heads": fields.integer("num_key_value_heads", 4),
        "head_dim": head_dim,
        "query_scalar": 0.0 if scalar == head_dim else scalar,
        "ffn_dim": fields.integer("intermediate_size"),
        "vocab": fields.integer("vocab_size", 262_208),
        "context": context,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "mlp": fields.choice("hidden_activation", GATES, "gelu_pytorch_tanh"),
        "rope": rope,
        "window_rope": None if window_rope == rope else window_rope,
        "window": window,
        "window_layers": window_layers,
        "bias": "attention" if fields.flag("attention_bias", False) else "none",
        "qk_norm": True,
        "tied": fields.flag("tie_word_embeddings", True),
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
    }


def _read_window(fields: Fields, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The window and the layers that have it, by layer_types or by the pattern of older folders."""
    if "sliding_window" not in fields.config:
        raise CheckpointError("config.json: sliding_window is missing; write null where there is none")
    older = [fields.optional(name) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
    pattern = next((number for number in older if number), PATTERN)
    return read_window(fields, layers, tuple(i for i in range(layers) if (i + 1) % pattern))


def write_config(config: ModelConfig) -> dict[str, Any]:
    refuse_shape(config, {
        "norm": ("rms",), "norm_place": ("pre",), "positions": ("rotary",), "causal": (True,), "qk_norm": (True,),
        "mlp": tuple(GATE_NAMES), "bias": ("none", "attention"), "types": (0,), "image": (None,),
        "head": tuple(CLASSES), "query_scalar": (config.query_scalar,), "window_rope": (config.window_rope,),
    })  # fmt: skip
    if config.dim % config.heads:
        raise ConfigError(f"dim {config.dim} has no place in a gemma3_text folder; it is a multiple of heads there")
    scalar = config.query_scalar or config.head_dim
    near = config.window_rope or config.rope
    written = {
        "architectures": [CLASSES[config.head]],
        "model_type": "gemma3_text",
        **write_sizes(config),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "hidden_activation": GATE_NAMES[config.mlp],
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias == "attention",
        "tie_word_embeddings": config.tied,
        **write_window(config),
        **write_ropes(config.rope, near),
        "rope_local_base_freq": near.theta,
    }
    return complete(config, written)


def _preset(dim: int, layers: int, heads: int, ffn_dim: int) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 256,
        "query_pre_attn_scalar": 256, "intermediate_size": ffn_dim, "vocab_size": 262_144, "sliding_window": 512,
        "sliding_window_pattern": PATTERN, "max_position_embeddings": 32_768, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }  # fmt: skip


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    wrappers=("gemma3",),
    spellings=WRAPPED,
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="model.",
    ignored=(r"rotary_emb\.\w*inv_freq$",),
    block="gemma3",
    defaults={"gemma3_text": {"qk_norm": True, "mlp": "geglu_tanh", "tied": True, "rope": {"theta": 1e6},
                              "window_rope": {"theta": 1e4}}},
    gguf={"gemma3_text": Gguf(
        "gemma3", norm_offset=1.0, windows=6, near_theta=1e4,
        computes={**ROTARY, "mlp": ("geglu_tanh",), "bias": ("none",), "query_scalar": (0.0,)},
    )},
    presets={"gemma-3-270m": _preset(640, 18, 4, 2048), "gemma-3-1b": _preset(1152, 26, 4, 6912)},
)  # fmt: skip
