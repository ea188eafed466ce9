"""How each architecture looks on disk."""

from collections.abc import Mapping
from typing import Any

from lapis.families.base import Family, Part, Rule, fallback_part, part_of
from lapis.families.bert import BERT
from lapis.families.gpt2 import GPT2
from lapis.families.llama import LLAMA
from lapis.families.vit import VIT

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2, BERT, VIT)


def find(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json, by its model_type; None where it is not known."""
    model_type = config.get("model_type")
    return next((family for family in FAMILIES if model_type in family.model_types), None)


__all__ = ["FAMILIES", "Family", "Part", "Rule", "fallback_part", "find", "part_of"]
