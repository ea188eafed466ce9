"""StableLM 2 (Stability AI 2024, arXiv:2402.17834): Llama's table with LayerNorms; a quarter of each head turns.

Leaves out: the norms of each head's own (`qk_layernorm`, of the 12B model), which are refused.
"""

from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import rules
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import BLOCK, RULES, llama_like, preset, read_decoder, write_decoder
from lapis.families.rotary import read_rope, write_share

SHARE = 0.25  # of a head that turns, where config.json does not say
OTHER = {"norm.attn", "norm.mlp", "norm.final", "attn.q_norm", "attn.k_norm"}
OWN = (
    *rules(BLOCK + "input_layernorm", "norm.attn", "weight bias"),
    *rules(BLOCK + "post_attention_layernorm", "norm.mlp", "weight bias"),
    *rules("norm", "norm.final", "weight bias"),
)


def read_config(fields: Fields) -> dict[str, Any]:
    fields.only("qk_layernorm", False)
    fields.keep("hidden_dropout")
    rope = read_rope(fields, fields.integer("max_position_embeddings"), share=SHARE)
    return {
        **read_decoder(fields, eps="layer_norm_eps", rope=rope),
        "norm": "layer",
        "bias": "qkv" if fields.flag("use_qkv_bias", False) else "none",
        "parallel": "shared" if fields.flag("use_parallel_residual", False) else "none",
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    if config.head_dim * config.heads != config.dim:
        raise ConfigError(f"head_dim {config.head_dim} has no place in a stablelm folder; it is dim / heads there")
    result = write_decoder(
        config, "StableLm", norm=("layer",), bias=("none", "qkv"), parallel=("none", "shared"),
        **{"rope.share": (config.rope.share,)},
    )  # fmt: skip
    del result["rms_norm_eps"]
    return {
        **write_share(result, config.rope),
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": config.bias == "qkv",
        "use_parallel_residual": config.parallel == "shared",
    }


FAMILY = llama_like(
    name="stablelm",
    model_types=("stablelm",),
    rules=tuple(r for r in RULES if r.component not in OTHER and not ("mlp" in r.disk and r.kind == "bias")) + OWN,
    reader=read_config,
    writer=write_config,
    gguf={"stablelm": Gguf(
        "stablelm", computes={**ROTARY, "norm": ("layer",), "mlp": ("swiglu",)}, says_parallel=True, partial=True,
        means={"parallel": "shared"},
    )},
    defaults={"stablelm": {"norm": "layer", "norm_eps": 1e-5, "rope": {"share": SHARE}}},
    presets={
        "stablelm-2-1.6b": {
            **preset("stablelm", 2048, 24, 32, 32, 5632, 100352, 4096),
            "layer_norm_eps": 1e-5, "use_qkv_bias": True, "partial_rotary_factor": SHARE,
        },
        "stablelm-3b-4e1t": {
            **preset("stablelm", 2560, 32, 32, 32, 6912, 50304, 4096),
            "layer_norm_eps": 1e-5, "use_qkv_bias": False, "partial_rotary_factor": SHARE,
        },
    },
)  # fmt: skip
