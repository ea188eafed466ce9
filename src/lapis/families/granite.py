"""Granite 3 (IBM 2024): Llama's table, with four multipliers: of embeddings, scores, residuals and logits."""

from math import sqrt
from typing import Any

from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import (
    BIASES,
    RULES,
    llama_like,
    preset,
    read_biases,
    read_decoder,
    write_biases,
    write_decoder,
)

DIGITS = "{:.12g}".format  # a factor that is read as a divisor is then written as the same number


def read_config(fields: Fields) -> dict[str, Any]:
    return {
        **read_decoder(fields),
        "bias": read_biases(fields),
        "query_scalar": float(DIGITS(fields.number("attention_multiplier", 1.0) ** -2)),
        "embed_scale": fields.number("embedding_multiplier", 1.0),
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "logit_divisor": fields.number("logits_scaling", 1.0),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    free = ("query_scalar", "embed_scale", "residual_scale", "logit_divisor")
    return {
        **write_decoder(config, "Granite", bias=BIASES, **{name: (getattr(config, name),) for name in free}),
        **write_biases(config),
        "attention_multiplier": float(DIGITS(1 / sqrt(config.query_scalar or config.head_dim))),
        "embedding_multiplier": config.embed_scale or 1.0,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
    }


FAMILY = llama_like(
    name="granite",
    model_types=("granite",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    block="granite",
    defaults={"granite": {"tied": True, "embed_scale": 12.0, "residual_scale": 0.22, "logit_divisor": 8.0}},
    gguf={"granite": Gguf(
        "granite", permuted=True, computes={**ROTARY, "mlp": ("swiglu",)},
        numbers={"query_scalar": "attention.scale", "embed_scale": "embedding_scale",
                 "residual_scale": "residual_scale", "logit_divisor": "logit_scale"},
    )},
    presets={
        "granite-3.3-2b": preset("granite", 2048, 40, 32, 8, 8192, 49159, 131072, theta=1e7, tied=True,
                                 embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22,
                                 logits_scaling=8.0),
    },
)  # fmt: skip
