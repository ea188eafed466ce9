"""Apertus (Swiss AI 2025, arXiv:2509.14233): an MLP without a gate, whose activation, xIELU, is learned."""

from typing import Any

from lapis.errors import CheckpointError
from lapis.families.base import Rule, rules
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

XIELU = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}  # numbers of each activation, and their shapes
OTHER = {"norm.attn", "norm.mlp", "mlp.gate"}
OWN = (
    *rules(BLOCK + "attention_layernorm", "norm.attn"),
    *rules(BLOCK + "feedforward_layernorm", "norm.mlp"),
    *(Rule(f"{BLOCK}mlp.act_fn.{name}", (f"blocks.{{layer}}.mlp.act.{name}",), f"mlp.act.{name}") for name in XIELU),
)


def read_config(fields: Fields) -> dict[str, Any]:
    if not fields.config.get("rope_parameters") and not fields.config.get("rope_scaling"):
        raise CheckpointError("config.json: rope_parameters is missing; fetch the file again")
    return {
        **read_decoder(fields, theta=1.2e7, mlps={"xielu": "xielu"}),
        "qk_norm": True,
        "bias": read_biases(fields, mlp=False),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    result = write_decoder(
        config, "Apertus", qk_norm=(True,), bias=("none", "attention"), mlp=("xielu",), head=("lm", "none")
    )
    return {**result, **write_biases(config, mlp=False)}


FAMILY = llama_like(
    name="apertus",
    model_types=("apertus",),
    rules=tuple(rule for rule in RULES if rule.component not in OTHER) + OWN,
    reader=read_config,
    writer=write_config,
    shapes=lambda config: {f"mlp.act.{name}": shape for name, shape in XIELU.items()},
    block="apertus",
    gguf={"apertus": Gguf(
        "apertus", lists={f"mlp.act.{name}": f"xielu.{name}" for name in XIELU}, imported=False,
        computes={**ROTARY, "mlp": ("xielu",), "bias": ("none",), "tied": (False,)},
    )},
    defaults={"apertus": {"qk_norm": True, "mlp": "xielu"}},
    presets={  # with beta and eps, which transformers counts as buffers
        "apertus-8b": preset("apertus", 4096, 32, 32, 8, 21504, 131072, 65536, theta=1.2e7, hidden_act="xielu",
                             rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    },
)  # fmt: skip
