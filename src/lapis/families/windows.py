"""Sliding windows in config.json: how far a token looks back, and in which layers."""

from typing import Any

from lapis.families.config import ModelConfig
from lapis.families.fields import Fields

FULL, WINDOWED = "full_attention", "sliding_attention"


def read_layer_types(fields: Fields, layers: int) -> tuple[int, ...] | None:
    """The layers that have a window by `layer_types`; None where the field is not there."""
    types = fields.layer_types(layers, (FULL, WINDOWED))
    if types is None:
        return None
    return tuple(i for i, name in enumerate(types) if name == WINDOWED)


def read_window(
    fields: Fields, layers: int, chosen: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...] | None]:  # fmt: skip
    """ModelConfig's `window` and `window_layers`, by `sliding_window` and `layer_types`.

    Args:
        fields: Of config.json.
        layers: Of the model.
        chosen: The layers that have the window where `layer_types` is not there.
    """
    window, types = fields.optional("sliding_window"), read_layer_types(fields, layers)
    chosen = chosen if types is None else types
    if not window or not chosen:
        return None, None
    return window, None if len(chosen) == layers else chosen


def write_layer_types(config: ModelConfig) -> list[str]:
    """`layer_types`: for each layer, whether it has the window."""
    return [WINDOWED if config.windowed(i) else FULL for i in range(config.layers)]


def write_window(config: ModelConfig, *, null: bool = True) -> dict[str, Any]:
    """`sliding_window` and `layer_types`.

    Args:
        config: Of the model.
        null: Whether transformers reads a null; it does not in families that make the mask of a window in any case.
    """
    window = config.window or (None if null else config.context)
    return {"sliding_window": window, "layer_types": write_layer_types(config)}
