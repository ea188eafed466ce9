"""Arcee's models (AFM, 2025): Llama's block, with an MLP without a gate and ReLU squared (So et al. 2021, Primer,
arXiv:2109.08668)."""

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


def read_config(fields: Fields) -> dict[str, Any]:
    return {**read_decoder(fields, mlps={"relu2": "relu2"}), "bias": read_biases(fields)}


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config, "Arcee", mlp=("relu2",), bias=BIASES), **write_biases(config)}


def _preset(vocab: int) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096}
    return preset(
        "arcee", 2560, 36, 20, 4, 18432, vocab, 65536, head_dim=128, hidden_act="relu2", rope_scaling=yarn
    )  # fmt: skip


FAMILY = llama_like(
    name="arcee",
    model_types=("arcee",),
    rules=tuple(rule for rule in RULES if rule.component != "mlp.gate"),
    reader=read_config,
    writer=write_config,
    defaults={"arcee": {"mlp": "relu2"}},
    gguf={"arcee": Gguf("arcee", permuted=True, computes={**ROTARY, "mlp": ("relu2",)})},
    presets={"afm-4.5b": _preset(128005), "afm-4.5b-base": _preset(128004)},
)
