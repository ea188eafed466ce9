"""Qwen's mixtures of experts: Qwen3's attention and experts alone, or Qwen2's with a shared one beside them.

Some layers may have an ordinary MLP (decoder_sparse_step, mlp_only_layers).
"""

from typing import Any

from lapis.families.base import rules
from lapis.families.config import ModelConfig
from lapis.families.experts import MLPS, expert_rules, read_experts, write_experts
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import (
    BLOCK,
    llama_like,
    preset,
    read_biases,
    read_decoder,
    write_biases,
    write_decoder,
)
from lapis.families.windows import read_window, write_window

CLASSES = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
SHARED = "shared_expert_intermediate_size"
RULES = (
    *expert_rules("mlp", MLPS),
    *(rule for here, disk in MLPS.items() for rule in rules(f"{BLOCK}mlp.{disk}", f"mlp.{here}")),
    *rules(BLOCK + "mlp.shared_expert_gate", "mlp.shared_gate"),
    *(rule for here, disk in MLPS.items() for rule in rules(f"{BLOCK}mlp.shared_expert.{disk}", f"mlp.shared.{here}")),
)


def read_config(fields: Fields) -> dict[str, Any]:
    kind = str(fields.config["model_type"])
    experts = read_experts(fields, "num_experts", 0.001, shared=SHARED if kind == "qwen2_moe" else "",
                           layers=fields.layers("num_hidden_layers"))  # fmt: skip
    shape = {
        **read_decoder(fields),
        "experts": {**experts, "normalized": fields.flag("norm_topk_prob", False)},
        "ffn_dim": fields.integer("moe_intermediate_size"),
    }
    if shape["ffn_dim"] != fields.integer("intermediate_size"):
        fields.keep("intermediate_size")  # of layers with an ordinary MLP, of which there are none
    shape["window"], shape["window_layers"] = _read_window(fields, kind, shape["layers"])
    if kind == "qwen3_moe":
        return {**shape, "qk_norm": True, "bias": read_biases(fields, mlp=False)}
    return {**shape, "bias": "qkv" if fields.flag("qkv_bias", True) else "none"}


def _read_window(fields: Fields, kind: str, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """Qwen2's window is in each second of the first max_window_layers; Qwen3's in all, whatever that field says."""
    if not fields.flag("use_sliding_window", False):
        fields.known.update(("sliding_window", "max_window_layers"))
        return None, None
    first = fields.integer("max_window_layers", 28, least=0)
    if kind == "qwen3_moe":
        return fields.optional("sliding_window"), None
    return read_window(fields, layers, tuple(range(0, min(first, layers), 2)))


def write_config(config: ModelConfig) -> dict[str, Any]:
    kind, own = config.family, config.family == "qwen3_moe"
    result = {
        **write_decoder(
            config, CLASSES[kind], qk_norm=(own,), bias=("none", "attention" if own else "qkv"),
            experts=(config.experts,), **({"window_layers": (None,)} if own else {}),
        ),
        **write_experts(config, "num_experts", shared=not own, dense=True),
        "moe_intermediate_size": config.ffn_dim,
        "use_sliding_window": config.window is not None,
    }  # fmt: skip
    if own:
        return {**result, **write_biases(config, mlp=False), "sliding_window": config.window}
    assert config.experts is not None
    return {**result, **write_window(config), "qkv_bias": config.bias == "qkv", SHARED: config.experts.shared_dim}


def _preset(dim: int, layers: int, heads: int, width: int, *, active: int = 8) -> dict[str, Any]:
    return preset(
        "qwen3_moe", dim, layers, heads, 4, 3 * dim, 151936, 40960, theta=1e6, eps=1e-6, head_dim=128,
        moe_intermediate_size=width, num_experts=128, num_experts_per_tok=active, norm_topk_prob=True,
        router_aux_loss_coef=0.001,
    )  # fmt: skip


FAMILY = llama_like(
    name="qwen_moe",
    model_types=tuple(CLASSES),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    block="experts",
    gguf={
        "qwen2_moe": Gguf("qwen2moe", computes={**ROTARY, "mlp": ("swiglu",)}, normalized=False),
        "qwen3_moe": Gguf("qwen3moe", computes={**ROTARY, "mlp": ("swiglu",), "bias": ("none",)}),
    },
    defaults={"qwen2_moe": {"bias": "qkv"}, "qwen3_moe": {"qk_norm": True}},
    presets={
        "qwen3-30b-a3b": _preset(2048, 48, 32, 768),
        "qwen3-235b-a22b": _preset(4096, 94, 64, 1536),
        "qwen1.5-moe-a2.7b": preset(
            "qwen2_moe", 2048, 24, 16, 16, 5632, 151936, 8192, theta=1e6, eps=1e-6, moe_intermediate_size=1408,
            num_experts=60, num_experts_per_tok=4, shared_expert_intermediate_size=5632, norm_topk_prob=False,
        ),
    },
)  # fmt: skip
