"""A config.json in, a shape, a table of names and parts out: one file for each family, and no tensor is touched."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import Family, Part, Rule, fallback_part, part_of
from lapis.families.config import ModelConfig
from lapis.families.shapes import Shape

# the files of this room that hold a FAMILY
_FILES = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gemma4",
    "smollm3",
    "olmo",
    "granite",
    "phi3",
    "apertus",
    "arcee",
    "exaone4",
    "starcoder2",
    "glm4",
    "cohere2",
    "stablelm",
    "gpt_neox",
    "qwen_moe",
    "mixtral",
    "olmoe",
    "gpt_oss",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "gpt2",
    "bert",
    "roberta",
    "distilbert",
    "modernbert",
    "vit",
)
FAMILIES: tuple[Family, ...] = tuple(import_module(f"{__name__}.{name}").FAMILY for name in _FILES)
PRESETS: dict[str, Mapping[str, Any]] = {name: fields for family in FAMILIES for name, fields in family.presets.items()}


def find(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json, by its model_type; None where it is not known."""
    model_type = config.get("model_type")
    family = next((family for family in FAMILIES if model_type in family.model_types), None)
    heads, key_heads = config.get("num_attention_heads"), config.get("linear_num_key_heads", 0)
    return family.for_heads(heads, key_heads) if family and type(heads) is type(key_heads) is int else family


def known_types() -> str:
    """Every model_type that is known, for messages."""
    return ", ".join(model_type for family in FAMILIES for model_type in family.model_types)


def family_of(config: ModelConfig) -> Family:
    """The family that a model of this shape is saved as. Raises ConfigError where there is none."""
    key_heads = 0 if config.delta is None else config.delta.heads
    family = find({
        "model_type": config.family, "num_attention_heads": config.heads, "linear_num_key_heads": key_heads,
    })  # fmt: skip
    if family is None:
        raise ConfigError(f'model: family is "{config.family}"; known: {known_types()}')
    return family


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter's name and shape, with the first block standing for all: what `Transformer` would make."""
    return family_of(config).parameter_shapes(config)


def required(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: name -> shape on disk.

    Args:
        config: The fields of config.json.

    Returns:
        Names as transformers writes them for a model with a head; `Family.canonical` gives the same name for every
        spelling. Empty where the family is not known.

    Raises:
        CheckpointError: A field of config.json is missing or wrong.
    """
    family = find(config)
    return {} if family is None else family.required(family.read_config(config))


__all__ = [
    "FAMILIES", "PRESETS", "Family", "ModelConfig", "Part", "Rule", "Shape", "fallback_part", "family_of", "find",
    "known_types", "parameter_shapes", "part_of", "required",
]  # fmt: skip
