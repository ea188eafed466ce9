"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with experts, whose matrices are called w1, w2 and w3."""

from typing import Any

from lapis.families.config import ModelConfig
from lapis.families.experts import expert_rules, read_experts, write_experts
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import llama_like, preset, read_decoder, write_decoder


def read_config(fields: Fields) -> dict[str, Any]:
    fields.only("attention_bias", False)
    fields.only("router_jitter_noise", 0.0, None)
    return {
        **read_decoder(fields, theta=1e6),
        "window": fields.optional("sliding_window"),
        "experts": read_experts(fields, "num_local_experts", 0.001),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config, "Mixtral", experts=(config.experts,), window_layers=(None,)),
        **write_experts(config, "num_local_experts", always_normalized=True),
        "sliding_window": config.window,
    }


def _preset(dim: int, layers: int, heads: int, width: int, vocab: int, context: int, balance: float) -> dict[str, Any]:
    return preset(
        "mixtral", dim, layers, heads, 8, width, vocab, context, theta=1e6, num_local_experts=8, num_experts_per_tok=2,
        router_aux_loss_coef=balance, sliding_window=None,
    )  # fmt: skip


FAMILY = llama_like(
    name="mixtral",
    model_types=("mixtral",),
    rules=expert_rules("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    reader=read_config,
    writer=write_config,
    block="experts",
    gguf={"mixtral": Gguf("llama", permuted=True, computes={**ROTARY, "mlp": ("swiglu",)})},
    defaults={"mixtral": {"rope": {"theta": 1e6}}},
    presets={
        "mixtral-8x7b": _preset(4096, 32, 32, 14336, 32000, 32768, 0.02),
        "mixtral-8x22b": _preset(6144, 56, 48, 16384, 32000, 65536, 0.001),
    },
)
