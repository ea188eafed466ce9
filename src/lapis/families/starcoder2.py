"""StarCoder2 (BigCode 2024, arXiv:2402.19173): rotary positions and grouped queries, with GPT-2's norms and MLP."""

from typing import Any

from lapis.families.base import rules
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import BLOCK, RULES, llama_like, preset, read_decoder, write_decoder

ACTIVATION_NAMES = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
ACTIVATIONS = {name: kind for kind, name in ACTIVATION_NAMES.items()} | {"gelu_new": "gelu_tanh"}
OTHER = {"norm.attn", "norm.mlp", "norm.final", "mlp.gate", "mlp.up", "mlp.down", "attn.q_norm", "attn.k_norm"}
OWN = (
    *rules(BLOCK + "input_layernorm", "norm.attn", "weight bias"),
    *rules(BLOCK + "post_attention_layernorm", "norm.mlp", "weight bias"),
    *rules(BLOCK + "mlp.c_fc", "mlp.up", "weight bias"),
    *rules(BLOCK + "mlp.c_proj", "mlp.down", "weight bias"),
    *rules("norm", "norm.final", "weight bias"),
)


def read_config(fields: Fields) -> dict[str, Any]:
    fields.keep("residual_dropout", "embedding_dropout", "norm_type", "mlp_type")
    return {
        **read_decoder(fields, tied=True, eps="norm_epsilon", mlps=ACTIVATIONS),
        "norm": "layer",
        "bias": "all" if fields.flag("use_bias", True) else "none",
        "window": fields.optional("sliding_window"),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    result = write_decoder(
        config, "Starcoder2", norm=("layer",), bias=("none", "all"), mlp=tuple(ACTIVATION_NAMES), window_layers=(None,)
    )
    del result["rms_norm_eps"]
    return {
        **result,
        "hidden_act": ACTIVATION_NAMES[config.mlp],
        "norm_epsilon": config.norm_eps,
        "use_bias": config.bias == "all",
        "sliding_window": config.window,
    }


FAMILY = llama_like(
    name="starcoder2",
    model_types=("starcoder2",),
    rules=tuple(rule for rule in RULES if rule.component not in OTHER) + OWN,
    reader=read_config,
    writer=write_config,
    gguf={"starcoder2": Gguf(
        "starcoder2", computes={**ROTARY, "norm": ("layer",), "mlp": ("gelu_tanh",), "bias": ("all",)},
    )},
    defaults={"starcoder2": {"norm": "layer", "norm_eps": 1e-5, "mlp": "gelu_tanh", "bias": "all", "tied": True}},
    presets={
        "starcoder2-3b": {
            **preset("starcoder2", 3072, 30, 24, 2, 12288, 49152, 16384, theta=999999.4420358813, tied=True),
            "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": 4096,
        },
    },
)  # fmt: skip
