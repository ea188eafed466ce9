"""Qwen3-Next: the layers of qwen3_5.py and Qwen2's mixtures of experts; two matrices of the delta net hold all others.

Leaves out: the layers that predict several tokens (mtp).
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from lapis.families.base import Rule
from lapis.families.config import ModelConfig
from lapis.families.experts import read_experts, write_experts
from lapis.families.fields import Fields
from lapis.families.gguf import FileTensor, Gguf, Runs
from lapis.families.llama import BLOCK
from lapis.families.qwen3_5 import COMPUTES, LEAD, PLAIN, delta_family, delta_preset, gguf_keys, write_delta
from lapis.families.qwen3_5 import read_config as read_delta
from lapis.families.qwen3_5_moe import TABLE
from lapis.families.qwen_moe import SHARED
from lapis.families.shapes import BY_KEY_HEAD, GROUPS_BY_KEY_HEAD

FUSED = {"delta.qkv", "delta.gate", "delta.beta", "delta.decay"}
OWN = (
    *(rule for rule in TABLE if rule.component not in FUSED),
    Rule(
        BLOCK + "linear_attn.in_proj_qkvz.weight", (LEAD + "delta.qkv.weight", LEAD + "delta.gate.weight"),
        "delta.qkv_gate", GROUPS_BY_KEY_HEAD,
    ),
    Rule(
        BLOCK + "linear_attn.in_proj_ba.weight", (LEAD + "delta.beta.weight", LEAD + "delta.decay.weight"),
        "delta.beta_decay", BY_KEY_HEAD,
    ),
)  # fmt: skip


def _of_all(*numbers: int) -> Callable[[ModelConfig], Runs]:
    """The rows of these parts of all heads of keys, part by part. 0 = queries, 1 = keys, 2 = values, 3 = gates."""

    def runs(config: ModelConfig) -> Runs:
        delta = config.delta
        assert delta is not None
        values = delta.values // delta.heads
        widths = (delta.head_dim, delta.head_dim, values, values)
        ends = tuple(accumulate(widths))
        return tuple(
            (head * ends[-1] + ends[n] - widths[n], head * ends[-1] + ends[n])
            for n in numbers for head in range(delta.heads)
        )  # fmt: skip

    return runs


FILE_TENSORS = {
    **PLAIN,
    "delta.qkv_gate": (
        FileTensor("blk.{layer}.attn_qkv.weight", rows=_of_all(0, 1, 2), parameter=0),
        FileTensor("blk.{layer}.attn_gate.weight", rows=_of_all(3), parameter=1),
    ),
    "delta.beta_decay": (FileTensor(),),
}
CLASSES = {"lm": "Qwen3NextForCausalLM", "classes": "Qwen3NextForSequenceClassification",
           "scalar": "Qwen3NextForSequenceClassification", "none": "Qwen3NextModel"}  # fmt: skip


def read_config(fields: Fields) -> dict[str, Any]:
    layers = fields.layers("num_hidden_layers")
    experts = read_experts(fields, "num_experts", 0.001, shared=SHARED, layers=layers)
    shape = read_delta(fields)
    if "dense_layers" not in experts:
        fields.keep("intermediate_size")  # of layers with an ordinary MLP, of which there are none
    experts["normalized"] = fields.flag("norm_topk_prob", True)
    return {**shape, "experts": experts, "ffn_dim": fields.integer("moe_intermediate_size")}


def write_config(config: ModelConfig) -> dict[str, Any]:
    written = write_delta(config, CLASSES, experts=(config.experts,))
    written |= write_experts(config, "num_experts", shared=True, dense=True)
    assert config.experts is not None
    return {**written, "moe_intermediate_size": config.ffn_dim, SHARED: config.experts.shared_dim}


FAMILY = delta_family(
    "qwen3_next",
    "qwen3_next",
    rules=OWN,
    reader=read_config,
    writer=write_config,
    gguf={"qwen3_next": Gguf("qwen3next", norm_offset=1.0, partial=True, imported=False, computes=COMPUTES,
                             tensors=FILE_TENSORS, more=gguf_keys)},
    presets={
        "qwen3-next-80b-a3b": delta_preset(
            "qwen3_next", 2048, 48, 16, 2, 5120, 151936, value_heads=32, num_experts=512, num_experts_per_tok=10,
            moe_intermediate_size=512, shared_expert_intermediate_size=512, norm_topk_prob=True,
        ),
    },
)  # fmt: skip
