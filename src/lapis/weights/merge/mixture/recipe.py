"""A recipe of a mixture of experts, in the YAML of mergekit-moe.

    merge_method: moe
    base_model: runs/base
    gate_mode: hidden          # or cheap_embed, random, uniform_random
    experts_per_token: 2
    experts:
      - {source_model: runs/malay, positive_prompts: ["Apa khabar?", "Terangkan"]}
      - {source_model: runs/code, positive_prompts: ["def main():"], negative_prompts: ["Dear Sir"]}
    dtype: bfloat16

A file with `experts` and no merge_method is one, too. Keys of lapis's own: `merge_method`, `seed`. Leaves out: which
tensors that makes (layout.py), and gates (gates.py).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lapis.config import load_yaml_documents, nearest
from lapis.errors import ConfigError
from lapis.families.config import MOST_EXPERTS
from lapis.parsing import quoted
from lapis.weights.merge.recipes.parameters import only
from lapis.weights.merge.recipes.recipe import Recipe, read_dtype, read_list, read_text, read_whole
from lapis.weights.merge.recipes.stages import RecipeLike
from lapis.wording import format_count

METHOD = "moe"
GATE_MODES = {
    "hidden": "the last token's vectors before each layer, mean over a prompt list, positive less negative",
    "cheap_embed": "the sum of the embeddings of all tokens, positive less negative, the same in each layer",
    "random": "normal numbers",
    "uniform_random": "as a new linear layer's",
}
DRAWN = ("random", "uniform_random")
KEYS = {
    "merge_method", "base_model", "experts", "shared_experts", "gate_mode", "experts_per_token", "dtype",
    "architecture", "seed", "name",
}  # fmt: skip


@dataclass(frozen=True)
class Expert:
    """A model that gives its MLPs. noise: of the standard deviation; residual: what down is multiplied by."""

    model: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise: float = 0.0
    residual: float = 1.0


@dataclass(frozen=True)
class MixtureRecipe:
    """A recipe that was read and checked as far as that goes without its models. written: as the user gave it."""

    base: str
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    gate_mode: str = "hidden"
    active: int = 2
    dtype: str | None = None
    architecture: str | None = None
    seed: int = 0
    written: Mapping[str, Any] = field(default_factory=dict)

    @property
    def everyone(self) -> tuple[Expert, ...]:
        """The experts, and the shared one behind them: the order of the gates."""
        return (*self.experts, *self.shared)

    @property
    def models(self) -> list[str]:
        """Every model that is named, the base first."""
        return list(dict.fromkeys([self.base, *(expert.model for expert in self.everyone)]))


def is_mixture(document: Mapping[str, Any]) -> bool:
    """Whether a recipe is of a mixture of experts."""
    return document.get("merge_method") == METHOD or ("merge_method" not in document and "experts" in document)


def open_mixture(recipe: RecipeLike) -> MixtureRecipe | None:
    """A recipe of a mixture from whatever a user gives; None where it is of another kind."""
    if isinstance(recipe, Recipe):
        return None
    if isinstance(recipe, Mapping):
        documents, where = [dict(recipe)], "recipe"
    else:
        where = os.fspath(recipe)
        documents = load_yaml_documents(where) if where.endswith((".yaml", ".yml")) or os.path.isfile(where) else []
    return parse_mixture(documents[0], where) if len(documents) == 1 and is_mixture(documents[0]) else None


def parse_mixture(document: Mapping[str, Any], where: str = "recipe") -> MixtureRecipe:
    """A recipe as a mapping, as YAML gives it. Raises ConfigError with the place in it."""
    only(document, KEYS, where)
    experts = _experts(document, "experts", where)
    shared = _experts(document, "shared_experts", where) if document.get("shared_experts") else ()
    mode = document.get("gate_mode", "hidden")
    if not isinstance(mode, str) or mode not in GATE_MODES:
        raise ConfigError(f"{where}: gate_mode is {quoted(mode)}; {nearest(str(mode), GATE_MODES)}")
    active = read_whole(document.get("experts_per_token", 2), f"{where}: experts_per_token")
    if not 1 <= active <= len(experts):
        raise ConfigError(
            f"{where}: experts_per_token is {active} of {format_count(len(experts), 'expert')}; give at most "
            f"{len(experts)}"
        )
    if mode not in DRAWN:
        _check_prompts(experts, shared, mode, where)
    architecture = document.get("architecture")
    if architecture is not None and not isinstance(architecture, str):
        raise ConfigError(f"{where}: architecture is {quoted(architecture)}; expected mixtral, qwen2_moe or qwen3_moe")
    return MixtureRecipe(
        read_text(document.get("base_model"), f"{where}: base_model"),
        experts,
        shared,
        mode,
        active,
        read_dtype(document, where),
        architecture,
        read_whole(document.get("seed", 0), f"{where}: seed"),
        dict(document),
    )


def _experts(document: Mapping[str, Any], key: str, where: str) -> tuple[Expert, ...]:
    listed = read_list(document, key, where)
    if len(listed) > MOST_EXPERTS:
        raise ConfigError(f"{where}: {key} holds {len(listed):,}; the limit is {MOST_EXPERTS:,}")
    return tuple(_expert(entry, f"{where}: {key}[{i}]") for i, entry in enumerate(listed))


def _expert(entry: Any, where: str) -> Expert:
    only(entry, {"source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"}, where)
    return Expert(
        read_text(entry.get("source_model"), f"{where}: source_model"),
        _prompts(entry, "positive_prompts", where),
        _prompts(entry, "negative_prompts", where),
        _number(entry, "noise_scale", 0.0, where),
        _number(entry, "residual_scale", 1.0, where),
    )


def _prompts(entry: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = entry.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(prompt, str) and prompt for prompt in value):
        raise ConfigError(f"{where}: {key} is {quoted(value)}; expected a list of texts")
    return tuple(value)


def _number(entry: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = entry.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where}: {key} is {quoted(value)}; expected a number")
    return float(value)


def _check_prompts(experts: tuple[Expert, ...], shared: tuple[Expert, ...], mode: str, where: str) -> None:
    for key, each in (("experts", experts), ("shared_experts", shared)):
        for i, expert in enumerate(each):
            if not expert.positive:
                raise ConfigError(
                    f"{where}: {key}[{i}] ({expert.model}) has no positive_prompts, from which gate_mode: {mode} makes "
                    "its gate; give some, or gate_mode: random"
                )
    if len(experts) > 1 and len({(expert.positive, expert.negative) for expert in experts}) == 1:
        raise ConfigError(f"{where}: all experts have the same prompts, so that the gates cannot tell them apart")
