"""SmolLM3: Llama's table; every fourth layer turns nothing (NoPE; Yang et al. 2025, arXiv:2501.18795)."""

from typing import Any

from lapis.errors import CheckpointError
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import (
    BIASES,
    RULES,
    llama_like,
    preset,
    read_biases,
    read_decoder,
    write_biases,
    write_decoder,
)
from lapis.families.windows import read_window, write_window
from lapis.parsing import quoted

THETA = 2e6


def read_config(fields: Fields) -> dict[str, Any]:
    layers = fields.layers("num_hidden_layers")
    nope = _read_nope(fields, layers)
    window, window_layers = read_window(fields, layers, nope)
    if not fields.flag("use_sliding_window", False):
        window = window_layers = None
    fields.keep("max_window_layers")
    return {
        **read_decoder(fields, theta=THETA, tied=True),
        "nope_layers": nope,
        "window": window,
        "window_layers": window_layers,
        "bias": read_biases(fields),
    }


def _read_nope(fields: Fields, layers: int) -> tuple[int, ...]:
    """The layers without rotary positions: those whose number in `no_rope_layers` is 0, or each that the interval hits.

    The list says 1 where a layer does turn, against its name.
    """
    interval = fields.integer("no_rope_layer_interval", 4)
    fields.known.add("no_rope_layers")
    turns = fields.config.get("no_rope_layers")
    if turns is None:
        return tuple(i for i in range(layers) if (i + 1) % interval == 0)
    if not isinstance(turns, list) or len(turns) < layers or any(value not in (0, 1) for value in turns):
        raise CheckpointError(
            f"config.json: no_rope_layers is {quoted(turns)}; expected a list of {layers} numbers, each 0 or 1"
        )
    return tuple(i for i in range(layers) if not turns[i])


def write_config(config: ModelConfig) -> dict[str, Any]:
    result = write_decoder(config, "SmolLM3", bias=BIASES, nope_layers=(config.nope_layers,))
    return {
        **result,
        **write_biases(config),
        "no_rope_layers": [int(i not in config.nope_layers) for i in range(config.layers)],
        "use_sliding_window": config.window is not None,
        **write_window(config),
    }


FAMILY = llama_like(
    name="smollm3",
    model_types=("smollm3",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    defaults={"smollm3": {"tied": True, "rope": {"theta": THETA}}},
    gguf={
        "smollm3": Gguf(
            "smollm3",
            permuted=True,
            nope_every=4,
            computes={**ROTARY, "mlp": ("swiglu",), "bias": ("none",)},
        )
    },
    presets={"smollm3-3b": preset("smollm3", 2048, 36, 16, 4, 11008, 128256, 65536, theta=5e6, eps=1e-6, tied=True)},
)
