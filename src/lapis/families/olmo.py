"""OLMo 2 and 3 (OLMo Team 2024, arXiv:2501.00656): norms after each half alone, and over all heads of q and of k.

OLMo 3 has windows in three layers of four; what stretches its context stretches the full layers alone.
"""

from typing import Any

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
from lapis.families.rotary import read_ropes, write_ropes
from lapis.families.windows import read_window, write_window

CLASSES = {"olmo2": "Olmo2", "olmo3": "Olmo3"}
PATTERN = 4  # every fourth layer sees everything, where config.json does not say
THETA = 500_000.0
RULES_AFTER = (  # with norms after each half, and none before
    *(rule for rule in RULES if rule.component not in ("norm.attn", "norm.mlp")),
    *rules(BLOCK + "post_attention_layernorm", "norm.attn_out"),
    *rules(BLOCK + "post_feedforward_layernorm", "norm.mlp_out"),
)


def read_config(fields: Fields) -> dict[str, Any]:
    fields.only("clip_qkv", None)
    normed = {"qk_norm": True, "qk_norm_over": "all", "bias": read_biases(fields, mlp=False)}
    if fields.config["model_type"] == "olmo2":
        return {**read_decoder(fields), **normed}
    layers, context = fields.layers("num_hidden_layers"), fields.integer("max_position_embeddings")
    window, window_layers = read_window(fields, layers, tuple(i for i in range(layers) if (i + 1) % PATTERN))
    rope, near = read_ropes(fields, context, THETA, THETA, "rope_theta")
    return {
        **read_decoder(fields, rope=rope),
        **normed,
        "window": window,
        "window_layers": window_layers,
        "window_rope": None if near == rope else near,
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    windows = {"window_rope": (config.window_rope,)} if config.family == "olmo3" else {"window": (None,)}
    result = write_decoder(
        config, CLASSES[config.family], qk_norm=(True,), qk_norm_over=("all",), bias=("none", "attention"), **windows
    ) | write_biases(config, mlp=False)
    if config.family == "olmo3":
        result |= write_window(config, null=False) | write_ropes(config.rope, config.window_rope or config.rope)
    return result


COMPUTES = {**ROTARY, "mlp": ("swiglu",), "bias": ("none",), "qk_norm_over": ("all",), "tied": (False,)}

FAMILY = llama_like(
    name="olmo",
    model_types=tuple(CLASSES),
    rules=RULES_AFTER,
    reader=read_config,
    writer=write_config,
    block="olmo",
    defaults={kind: {"qk_norm": True, "qk_norm_over": "all", "rope": {"theta": THETA}} for kind in CLASSES},
    gguf={
        "olmo2": Gguf("olmo2", computes=COMPUTES),
        "olmo3": Gguf(
            "olmo2", windows=PATTERN, optional_windows=True, near_plain=True, computes=COMPUTES
        ),
    },
    presets={
        "olmo-2-1b": preset("olmo2", 2048, 16, 16, 16, 8192, 100352, 4096, theta=THETA, eps=1e-6),
        "olmo-2-7b": preset("olmo2", 4096, 32, 32, 32, 11008, 100352, 4096, theta=THETA, eps=1e-6),
        "olmo-3-7b": preset("olmo3", 4096, 32, 32, 32, 11008, 100278, 65536, theta=THETA, eps=1e-6,
                            sliding_window=4096, rope_scaling={
                                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
                                "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1}),
    },
)  # fmt: skip
