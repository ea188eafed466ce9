"""Command R7B and Command A (Cohere 2024, 2025): both halves of a block read one norm; windows in three layers of four.

Layers with a window turn, in pairs of neighbors; the others have no positions. LayerNorm has no bias, the head is the
embedding, and logits are multiplied by a number.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import (
    RULES,
    llama_like,
    preset,
    read_biases,
    read_decoder,
    write_biases,
    write_decoder,
)
from lapis.families.windows import read_window, write_window

PATTERN = 4  # every fourth layer sees everything, where config.json does not say
OTHER = {"norm.mlp", "attn.q_norm", "attn.k_norm", "head.classes"}


def read_config(fields: Fields) -> dict[str, Any]:
    fields.only("use_qk_norm", False, None)
    fields.only("use_parallel_block", True, None)
    fields.only("use_embedding_sharing", True, None)
    fields.only("use_gated_activation", True, None)
    fields.only("use_parallel_embedding", False, None)
    fields.only("position_embedding_type", "rope_gptj", None)
    fields.only("rotary_pct", 1.0, None)
    fields.keep("layer_switch", "order_of_interleaved_layers", "cache_implementation")
    layers, each = fields.layers("num_hidden_layers"), fields.optional("sliding_window_pattern") or PATTERN
    if fields.config.get("sliding_window") is None:
        raise CheckpointError("config.json: sliding_window is missing; layers with it are those that turn")
    window, window_layers = read_window(fields, layers, tuple(i for i in range(layers) if (i + 1) % each))
    shape = read_decoder(fields, tied=True, eps="layer_norm_eps")
    near = window_layers if window_layers is not None else tuple(range(layers) if window else ())
    return {
        **shape,
        "rope": {**shape["rope"], "neighbors": True},
        "norm": "layer",
        "norm_bias": False,
        "parallel": "shared",
        "bias": read_biases(fields, mlp=False),
        "window": window,
        "window_layers": window_layers,
        "nope_layers": tuple(i for i in range(layers) if i not in near),
        "logit_divisor": 1 / fields.number("logit_scale", 0.0625),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    full = tuple(i for i in range(config.layers) if not config.windowed(i))
    result = write_decoder(
        config, "Cohere2", norm=("layer",), norm_bias=(False,), parallel=("shared",), bias=("none", "attention"),
        logit_divisor=(config.logit_divisor,), nope_layers=(full,), head=("lm", "none"), **{"rope.neighbors": (True,)},
    )  # fmt: skip
    if config.head_dim * config.heads != config.dim:
        raise ConfigError(f"head_dim {config.head_dim} has no place in a cohere2 folder; it is dim / heads there")
    del result["rms_norm_eps"]
    return {
        **result,
        **write_biases(config, mlp=False),
        **write_window(config, null=False),
        "layer_norm_eps": config.norm_eps,
        "logit_scale": 1 / config.logit_divisor,
    }


FAMILY = llama_like(
    name="cohere2",
    model_types=("cohere2",),
    rules=tuple(r for r in RULES if r.component not in OTHER and not ("mlp" in r.disk and r.kind == "bias")),
    reader=read_config,
    writer=write_config,
    block="cohere",
    gguf={"cohere2": Gguf(
        "cohere2", windows=PATTERN, nope_every=PATTERN, numbers={"logit_factor": "logit_scale"},
        means={"norm_bias": False, "parallel": "shared"},
        computes={**ROTARY, "norm": ("layer",), "mlp": ("swiglu",), "bias": ("none",), "tied": (True,),
                  "rope.neighbors": (True,)},
    )},
    defaults={"cohere2": {"norm": "layer", "norm_bias": False, "norm_eps": 1e-5, "parallel": "shared", "tied": True,
                          "logit_divisor": 16.0, "rope": {"theta": 5e4, "neighbors": True}}},
    presets={
        "command-r7b": {
            **preset("cohere2", 4096, 32, 32, 8, 14336, 256000, 16384, theta=5e4, tied=True),
            "layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": 4096, "sliding_window_pattern": PATTERN,
        },
    },
)  # fmt: skip
