"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): a norm on both sides of each half, a window in every other layer.

Scores of attention and logits are capped: cap tanh(x / cap).
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import rules
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import (
    BLOCK,
    RULES,
    llama_like,
    preset,
    read_biases,
    read_decoder,
    write_biases,
    write_decoder,
)
from lapis.families.windows import read_window, write_window

OTHER = {"norm.mlp", "attn.q_norm", "attn.k_norm"}
RULES_BOTH_SIDES = (  # with norms before and after each half
    *(rule for rule in RULES if rule.component not in OTHER and not (rule.kind == "bias" and "mlp" in rule.disk)),
    *rules(BLOCK + "post_attention_layernorm", "norm.attn_out"),
    *rules(BLOCK + "pre_feedforward_layernorm", "norm.mlp"),
    *rules(BLOCK + "post_feedforward_layernorm", "norm.mlp_out"),
)
CAPS = {"attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
EACH = 2  # every second layer sees everything, where config.json does not say


def read_config(fields: Fields) -> dict[str, Any]:
    fields.only("use_bidirectional_attention", False, None)
    for name in ("sliding_window", *CAPS.values()):
        if name not in fields.config:
            raise CheckpointError(f"config.json: {name} is missing; write null where there is none")
    layers, fields.config = fields.layers("num_hidden_layers"), _renamed(fields.config)
    window, window_layers = read_window(fields, layers, tuple(i for i in range(layers) if (i + 1) % EACH))
    shape = read_decoder(fields, head_dim=256, tied=True)
    scalar = fields.number("query_pre_attn_scalar", 256)
    return {
        **shape,
        **{ours: read_cap(fields, theirs) for ours, theirs in CAPS.items()},
        "query_scalar": 0.0 if scalar == shape["head_dim"] else scalar,
        "bias": read_biases(fields, mlp=False),
        "window": window,
        "window_layers": window_layers,
    }


def read_cap(fields: Fields, name: str) -> float:
    """A soft cap; 0 where the field is null or not there."""
    fields.known.add(name)
    return 0.0 if fields.config.get(name) is None else fields.number(name)


def _renamed(config: Any) -> dict[str, Any]:
    """With `hidden_act` under the name that other families have; Gemma's own counts where both are there."""
    named = config.get("hidden_activation") or config.get("hidden_act")
    others = {name: value for name, value in config.items() if name != "hidden_activation"}
    return {**others, "hidden_act": named}


def write_config(config: ModelConfig) -> dict[str, Any]:
    if config.dim % config.heads:
        raise ConfigError(f"dim {config.dim} has no place in a gemma2 folder; it is a multiple of heads there")
    free = {name: (getattr(config, name),) for name in (*CAPS, "query_scalar")}
    result = write_decoder(config, "Gemma2", bias=("none", "attention"), **free)
    scalar = config.query_scalar or config.head_dim
    return {
        **result,
        **write_biases(config, mlp=False),
        **write_window(config, null=False),
        **{theirs: getattr(config, ours) or None for ours, theirs in CAPS.items()},
        "hidden_activation": result["hidden_act"],
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
    }


def _preset(dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, **fields: Any) -> dict[str, Any]:
    return {
        **preset("gemma2", dim, layers, heads, kv_heads, ffn_dim, 256_000, 8192, eps=1e-6, tied=True,
                 head_dim=fields.pop("head_dim", 256), sliding_window=4096, query_pre_attn_scalar=256,
                 attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        "hidden_act": "gelu_pytorch_tanh", **fields,
    }  # fmt: skip


FAMILY = llama_like(
    name="gemma2",
    model_types=("gemma2",),
    rules=RULES_BOTH_SIDES,
    reader=read_config,
    writer=write_config,
    block="gemma3",
    gguf={
        "gemma2": Gguf(
            "gemma2",
            norm_offset=1.0,
            windows=EACH,
            numbers=CAPS,
            computes={**ROTARY, "mlp": ("geglu_tanh",), "bias": ("none",), "query_scalar": (0.0,), "tied": (True,)},
        )
    },
    defaults={"gemma2": {"mlp": "geglu_tanh", "tied": True, "attention_cap": 50.0, "logit_cap": 30.0}},
    presets={
        "gemma-2-2b": _preset(2304, 26, 8, 4, 9216),
        "gemma-2-9b": _preset(3584, 42, 16, 8, 14336),
        "gemma-2-27b": _preset(4608, 46, 32, 16, 36864, head_dim=128, query_pre_attn_scalar=144),
    },
)
