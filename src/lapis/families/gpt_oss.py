"""GPT-OSS (OpenAI 2025, arXiv:2508.10925): experts with clamped gates, attention sinks, windows in every second layer.

The hub's folders hold the experts in MXFP4; they are read as bfloat16 (checkpoint/mxfp4.py), and so they are saved.
"""

from typing import Any

from lapis.errors import CheckpointError
from lapis.families.base import Rule, rules
from lapis.families.config import ModelConfig
from lapis.families.experts import read_experts, write_experts
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import BLOCK, RULES, llama_like, preset, read_decoder, write_decoder
from lapis.families.shapes import INPUTS_FIRST, SAME, Shape
from lapis.families.windows import read_window, write_window

LEAD = "blocks.{layer}."
OWN = (
    *(rule for rule in RULES if not rule.component.startswith("mlp.")),
    Rule(BLOCK + "self_attn.sinks", (LEAD + "attn.sinks",), "attn.sinks"),
    *rules(BLOCK + "mlp.router", "mlp.router", "weight bias"),
    *(
        Rule(f"{BLOCK}mlp.experts.{part}_proj{end}", (f"{LEAD}mlp.experts.{part}.{kind}",), f"mlp.experts.{part}", how)
        for part in ("gate_up", "down")
        for end, kind, how in (("", "weight", INPUTS_FIRST), ("_bias", "bias", SAME))
    ),
)
ALPHA, LIMIT = 1.702, 7.0  # of the gate: they are in the block, too


def read_config(fields: Fields) -> dict[str, Any]:
    layers = fields.layers("num_hidden_layers")
    if not (fields.config.get("rope_parameters") or fields.config.get("rope_scaling")):
        raise CheckpointError("config.json: rope_parameters and rope_scaling are missing; fetch the file again")
    fields.only("swiglu_alpha", ALPHA)
    fields.only("swiglu_limit", LIMIT)
    fields.known.update(("experts_per_token", "initial_context_length"))
    window, window_layers = read_window(fields, layers, tuple(range(0, layers, 2)))
    return {
        **read_decoder(fields, head_dim=64, theta=150_000.0),
        "experts": read_experts(fields, "num_local_experts", 0.001),
        "window": window,
        "window_layers": window_layers,
        "bias": "all" if fields.flag("attention_bias", True) else "mlp",
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config, "GptOss", bias=("mlp", "all"), mlp=("swiglu",), experts=(config.experts,)),
        **write_experts(config, "num_local_experts", always_normalized=True),
        **write_window(config, null=False),
        "attention_bias": config.bias == "all",
        "swiglu_alpha": ALPHA,
        "swiglu_limit": LIMIT,
    }


def own_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Of the parameters that no other family has: all experts of a block in one tensor, inputs first."""
    count, dim, width = config.experts.count if config.experts else 0, config.dim, config.ffn_dim
    return {
        "attn.sinks": (config.heads,),
        "mlp.experts.gate_up": (count, dim, 2 * width), "mlp.experts.gate_up.bias": (count, 2 * width),
        "mlp.experts.down": (count, width, dim), "mlp.experts.down.bias": (count, dim),
    }  # fmt: skip


def _preset(layers: int, experts: int) -> dict[str, Any]:
    stretched = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                 "original_max_position_embeddings": 4096}  # fmt: skip
    return preset(
        "gpt_oss", 2880, layers, 64, 8, 2880, 201088, 131072, theta=150_000.0, head_dim=64, sliding_window=128,
        num_local_experts=experts, num_experts_per_tok=4, attention_bias=True, rope_scaling=stretched,
    )  # fmt: skip


FAMILY = llama_like(
    name="gpt_oss",
    model_types=("gpt_oss",),
    rules=OWN,
    reader=read_config,
    writer=write_config,
    shapes=own_shapes,
    block="gpt_oss",
    gguf={"gpt_oss": Gguf(
        "gpt-oss", windows=2, imported=False, computes={**ROTARY, "bias": ("all",), "tied": (False,)},
        interleaved={"mlp.experts.gate_up": ("gate_proj", "up_proj"), "mlp.experts.down": ("down_proj",)},
    )},
    defaults={"gpt_oss": {"bias": "all", "rope": {"theta": 150_000.0, "kind": "yarn", "factor": 32.0, "truncate": False,
                                                  "original_context": 4096}}},
    presets={"gpt-oss-20b": _preset(24, 32), "gpt-oss-120b": _preset(36, 128)},
)  # fmt: skip
