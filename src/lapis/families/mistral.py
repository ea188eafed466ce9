"""Mistral, Ministral and Ministral 3, text: Llama's table, with a sliding window.

Mistral's window is in every layer, Ministral's in those that `layer_types` names, and Ministral 3's queries grow with
their position. Of a folder with pictures (model_type "mistral3") the language model is run.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import WRAPPED
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import RULES, llama_like, preset, read_decoder, write_decoder
from lapis.families.windows import read_window, write_window

CLASSES = {"mistral": "Mistral", "ministral": "Ministral", "ministral3": "Ministral3"}


def read_config(fields: Fields) -> dict[str, Any]:
    kind, layers = str(fields.config["model_type"]), fields.layers("num_hidden_layers")
    fields.only("attention_bias", False)
    if "sliding_window" not in fields.config:
        raise CheckpointError("config.json: sliding_window is missing; write null where there is none")
    window, chosen = fields.optional("sliding_window"), None
    if kind == "ministral":
        window, chosen = read_window(fields, layers, tuple(range(layers)))
    if kind == "ministral3" and not fields.config.get("rope_parameters"):
        raise CheckpointError("config.json: rope_parameters is missing; fetch the file again")
    return {**read_decoder(fields), "window": window, "window_layers": chosen}


def write_config(config: ModelConfig) -> dict[str, Any]:
    result = write_decoder(config, CLASSES[config.family])
    if config.family == "ministral":
        return {**result, **write_window(config, null=False)}
    if config.window_layers is not None:
        raise ConfigError(f"window_layers has no place in a {config.family} folder; family=ministral has one")
    return {**result, "sliding_window": config.window}


def _growth(config: ModelConfig) -> dict[str, Any]:
    """How queries grow with their position, where they do."""
    return {"attention.temperature_scale": config.rope.query_growth} if config.rope.query_growth else {}


def _stretched(dim: int, layers: int, ffn_dim: int, *, tied: bool = False) -> dict[str, Any]:
    """Of Ministral 3 the language model."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1}  # fmt: skip
    return preset("ministral3", dim, layers, 32, 8, ffn_dim, 131072, 262144, theta=1e6, tied=tied, head_dim=128,
                  rope_parameters=yarn, sliding_window=None)  # fmt: skip


FAMILY = llama_like(
    name="mistral",
    model_types=tuple(CLASSES),
    wrappers=("mistral3",),
    spellings=WRAPPED,
    rules=RULES,
    reader=read_config,
    writer=write_config,
    presets={
        "mistral-7b": preset("mistral", 4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096),
        "ministral-8b": preset("ministral", 4096, 36, 32, 8, 12288, 131072, 32768, theta=1e8, head_dim=128,
                               sliding_window=32768),
        "ministral-3-3b": _stretched(3072, 26, 9216, tied=True),
        "ministral-3-8b": _stretched(4096, 34, 14336),
    },
    gguf={
        **{kind: Gguf("llama", permuted=True, computes={**ROTARY, "mlp": ("swiglu",)})
           for kind in ("mistral", "ministral")},
        "ministral3": Gguf(
            "mistral3", permuted=True, yarn_mscale=True, imported=False, more=_growth,
            computes={**ROTARY, "mlp": ("swiglu",), "bias": ("none",)},
        ),
    },
)  # fmt: skip
