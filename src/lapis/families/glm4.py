"""GLM-4 (Zhipu 2025): a norm on both sides of each half; half of each head turns, in pairs of neighbors.

Gate and up lie in one matrix.
"""

from typing import Any

from lapis.families.base import Rule, rules
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import BLOCK, RULES, llama_like, preset, read_decoder, write_decoder
from lapis.families.rotary import read_rope, write_share
from lapis.families.shapes import STACK

SHARE = 0.5  # of a head that turns, where config.json does not say
OTHER = {"norm.mlp", "attn.q_norm", "attn.k_norm", "mlp.gate", "mlp.up"}
LEAD = "blocks.{layer}."
OWN = (
    *rules(BLOCK + "post_self_attn_layernorm", "norm.attn_out"),
    *rules(BLOCK + "post_attention_layernorm", "norm.mlp"),
    *rules(BLOCK + "post_mlp_layernorm", "norm.mlp_out"),
    Rule(BLOCK + "mlp.gate_up_proj.weight", (f"{LEAD}mlp.gate.weight", f"{LEAD}mlp.up.weight"), "mlp.gate_up", STACK),
)


def read_config(fields: Fields) -> dict[str, Any]:
    rope = read_rope(fields, fields.integer("max_position_embeddings"), share=SHARE)
    return {
        **read_decoder(fields, head_dim=128, rope={**rope, "neighbors": True}),
        "bias": "qkv" if fields.flag("attention_bias", True) else "none",
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    turns = {"rope.share": (config.rope.share,), "rope.neighbors": (True,)}
    result = write_decoder(config, "Glm4", bias=("none", "qkv"), **turns)
    return {**write_share(result, config.rope), "attention_bias": config.bias == "qkv"}


FAMILY = llama_like(
    name="glm4",
    model_types=("glm4",),
    rules=tuple(rule for rule in RULES if rule.component not in OTHER and "mlp.down_proj.bias" not in rule.disk) + OWN,
    reader=read_config,
    writer=write_config,
    block="glm4",
    gguf={"glm4": Gguf("glm4", computes={**ROTARY, "mlp": ("swiglu",), "rope.neighbors": (True,)}, partial=True)},
    defaults={"glm4": {"bias": "qkv", "rope": {"share": SHARE, "neighbors": True}}},
    presets={
        "glm-4-9b-0414": preset("glm4", 4096, 40, 32, 2, 13696, 151552, 32768, eps=1e-5, head_dim=128,
                                attention_bias=True, partial_rotary_factor=SHARE),
        "glm-4-32b-0414": preset("glm4", 6144, 61, 48, 2, 23040, 151552, 32768, eps=1e-5, head_dim=128,
                                 attention_bias=False, partial_rotary_factor=SHARE),
    },
)  # fmt: skip
