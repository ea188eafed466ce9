"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): many small experts, and norms over all heads of q and of k."""

from typing import Any

from lapis.errors import CheckpointError
from lapis.families.config import ModelConfig
from lapis.families.experts import MLPS, expert_rules, read_experts, write_experts
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import llama_like, preset, read_biases, read_decoder, write_biases, write_decoder

NORMED = {"qk_norm": True, "qk_norm_over": "all"}


def read_config(fields: Fields) -> dict[str, Any]:
    fields.only("clip_qkv", None)
    experts, shape = read_experts(fields, "num_experts", 0.01), read_decoder(fields)
    if shape["head_dim"] not in (0, shape["dim"] // shape["heads"]):
        raise CheckpointError(f"config.json: head_dim is {shape['head_dim']}; in olmoe it is hidden_size / heads")
    return {
        **shape,
        **NORMED,
        "bias": read_biases(fields, mlp=False),
        "experts": {**experts, "normalized": fields.flag("norm_topk_prob", False)},
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    result = write_decoder(
        config, "Olmoe", qk_norm=(True,), qk_norm_over=("all",), bias=("none", "attention"), window=(None,),
        head_dim=(config.dim // config.heads,), experts=(config.experts,), head=("lm", "none"),
    )  # fmt: skip
    return {**result, **write_experts(config, "num_experts"), **write_biases(config, mlp=False)}


FAMILY = llama_like(
    name="olmoe",
    model_types=("olmoe",),
    rules=expert_rules("mlp", MLPS),
    reader=read_config,
    writer=write_config,
    block="experts",
    gguf={"olmoe": Gguf(
        "olmoe", computes={**ROTARY, "mlp": ("swiglu",), "bias": ("none",)}, normalized=False, grouped=False,
        means={"qk_norm_over": "all"},
    )},
    defaults={"olmoe": NORMED},
    presets={
        "olmoe-1b-7b": preset("olmoe", 2048, 16, 16, 16, 1024, 50304, 4096, num_experts=64, num_experts_per_tok=8,
                              norm_topk_prob=False, router_aux_loss_coef=0.01),
    },
)  # fmt: skip
