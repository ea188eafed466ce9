"""EXAONE 4 (LG AI Research 2025, arXiv:2507.11407): OLMo 2's block, with q and k normed head by head.

The 32B model has windows in three layers of four, and the fourth turns nothing.
"""

from typing import Any

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import llama_like, preset, read_decoder, write_decoder
from lapis.families.olmo import RULES_AFTER
from lapis.families.windows import read_window, write_window

PATTERN = 4  # every fourth layer sees everything, where config.json does not say


def read_config(fields: Fields) -> dict[str, Any]:
    layers = fields.layers("num_hidden_layers")
    fields.keep("sliding_window_pattern")
    pattern = fields.config.get("sliding_window_pattern")
    each = len(pattern) if isinstance(pattern, str) else fields.optional("sliding_window_pattern", least=0)
    near = tuple(i for i in range(layers) if (i + 1) % (each or PATTERN))
    window, window_layers = read_window(fields, layers, near)
    shape = {**read_decoder(fields), "qk_norm": True, "window": window, "window_layers": window_layers}
    if fields.config.get("sliding_window"):  # then the layers without it turn nothing
        windowed = ModelConfig.of({**shape, "extra": {}}).windowed
        shape["nope_layers"] = tuple(i for i in range(layers) if not windowed(i))
    return shape


def write_config(config: ModelConfig) -> dict[str, Any]:
    result = write_decoder(config, "Exaone4", qk_norm=(True,), nope_layers=(config.nope_layers,))
    full = tuple(i for i in range(config.layers) if not config.windowed(i))
    if config.nope_layers not in ((full,) if config.window else ((), full)):
        raise ConfigError(
            f"nope_layers {config.nope_layers} has no place in an exaone4 folder; there it is the layers without a "
            f"window, {full}"
        )
    return {**result, **write_window(config, null=not config.nope_layers)}


FAMILY = llama_like(
    name="exaone4",
    model_types=("exaone4",),
    rules=RULES_AFTER,
    reader=read_config,
    writer=write_config,
    block="olmo",
    gguf={"exaone4": Gguf(
        "exaone4", windows=PATTERN, optional_windows=True, windowed_depth=64, nope_every=PATTERN, imported=False,
        computes={**ROTARY, "mlp": ("swiglu",), "bias": ("none",)},
    )},
    defaults={"exaone4": {"qk_norm": True, "rope": {"theta": 1e6}}},
    presets={
        "exaone-4.0-1.2b": preset("exaone4", 2048, 30, 32, 8, 4096, 102400, 65536, theta=1e6, tied=True, head_dim=64,
                                  sliding_window=None, layer_types=["full_attention"] * 30, rope_scaling={
                                      "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    },
)  # fmt: skip
