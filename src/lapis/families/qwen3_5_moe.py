"""Qwen3.5's mixtures of experts, text: the layers of qwen3_5.py, with experts and a shared one in place of each MLP.

Of a folder with pictures (model_type "qwen3_5_moe") the language model is run; what lapis saves of it is
"qwen3_5_moe_text".
"""

from typing import Any

from lapis.families.base import WRAPPED, Rule
from lapis.families.config import ModelConfig
from lapis.families.experts import read_experts, write_experts
from lapis.families.fields import Fields
from lapis.families.llama import BLOCK
from lapis.families.qwen3_5 import OWN, delta_family, delta_preset, tiled_gguf, write_delta
from lapis.families.qwen3_5 import read_config as read_delta
from lapis.families.qwen_moe import RULES, SHARED
from lapis.families.shapes import EXPERT_MATRICES, EXPERT_PAIRS

LEAD = "blocks.{layer}.mlp.experts."
STACKED = (  # as the hub's folders hold them; transformers writes each expert's own
    Rule(BLOCK + "mlp.experts.gate_up_proj", (LEAD + "{expert}.gate.weight", LEAD + "{expert}.up.weight"),
         "mlp.experts.gate_up", EXPERT_PAIRS, twin=True),
    Rule(BLOCK + "mlp.experts.down_proj", (LEAD + "{expert}.down.weight",), "mlp.experts.down", EXPERT_MATRICES,
         twin=True),
)  # fmt: skip
EXPERTS = tuple(rule for rule in RULES if rule.component.startswith("mlp."))
TABLE = (*(rule for rule in OWN if not rule.component.startswith("mlp.")), *EXPERTS)
CLASSES = {"lm": "Qwen3_5MoeForCausalLM", "none": "Qwen3_5MoeTextModel"}


def read_config(fields: Fields) -> dict[str, Any]:
    fields.known.add("intermediate_size")  # of an ordinary MLP, of which there is none
    width = fields.integer("moe_intermediate_size")
    experts = read_experts(fields, "num_experts", 0.001, shared=SHARED)
    fields.config = {**fields.config, "intermediate_size": width}
    return {**read_delta(fields), "experts": experts}


def write_config(config: ModelConfig) -> dict[str, Any]:
    written = write_delta(config, CLASSES, experts=(config.experts,))
    written |= write_experts(config, "num_experts", shared=True, always_normalized=True)
    assert config.experts is not None
    return {**written, "moe_intermediate_size": written.pop("intermediate_size"), SHARED: config.experts.shared_dim}


FAMILY = delta_family(
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    wrappers=("qwen3_5_moe",),
    spellings=WRAPPED,
    rules=(*TABLE, *STACKED),
    reader=read_config,
    writer=write_config,
    gguf={"qwen3_5_moe_text": tiled_gguf("qwen35moe")},
    presets={
        "qwen3.5-35b-a3b": delta_preset(
            "qwen3_5_moe_text", 2048, 40, 16, 2, 512, 248320, value_heads=32, num_experts=256, num_experts_per_tok=8,
            moe_intermediate_size=512, shared_expert_intermediate_size=512,
        ),
    },
)  # fmt: skip
