"""Phi-3 (Microsoft 2024, arXiv:2404.14219): Llama's block; q, k and v lie in one matrix, gate and up in another.

Leaves out: LongRoPE's tables (the 128k models) and Phi-4-mini's partial rotation, which are refused.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Rule
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import BLOCK, RULES, llama_like, preset, read_decoder, write_decoder
from lapis.families.shapes import STACK

FUSED = {"attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"}
LEAD = "blocks.{layer}."
OWN = (
    Rule(BLOCK + "self_attn.qkv_proj.weight", tuple(f"{LEAD}attn.{part}.weight" for part in "qkv"), "attn.qkv", STACK),
    Rule(BLOCK + "mlp.gate_up_proj.weight", (f"{LEAD}mlp.gate.weight", f"{LEAD}mlp.up.weight"), "mlp.gate_up", STACK),
)


def read_config(fields: Fields) -> dict[str, Any]:
    window = fields.optional("sliding_window")
    fields.keep("original_max_position_embeddings", "embd_pdrop", "resid_pdrop")
    shape = read_decoder(fields)
    if shape["rope"]["kind"] != "default":
        raise CheckpointError(f"config.json: rope type is {shape['rope']['kind']}; lapis reads phi3 with default only")
    return {**shape, "window": window}


def write_config(config: ModelConfig) -> dict[str, Any]:
    if config.rope.kind != "default":
        raise ConfigError(f"rope kind {config.rope.kind} has no place in a phi3 folder; it can be default")
    return {**write_decoder(config, "Phi3", window_layers=(None,)), "sliding_window": config.window}


FAMILY = llama_like(
    name="phi3",
    model_types=("phi3",),
    rules=tuple(rule for rule in RULES if rule.component not in FUSED and rule.kind == "weight") + OWN,
    reader=read_config,
    writer=write_config,
    gguf={"phi3": Gguf("phi3", computes={**ROTARY, "mlp": ("swiglu",)})},
    presets={"phi-3-mini-4k": preset("phi3", 3072, 32, 32, 32, 8192, 32064, 4096, sliding_window=2047)},
)
