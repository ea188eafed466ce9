"""Data in, batches and their summed loss out: what is learned, one class for each kind, and their table.

Here are the objectives by name, and the options of each: what a settings file may say.
"""

import dataclasses
import typing
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapis.training.objectives.objective import Objective

# name -> module:class, imported when it is first used
OBJECTIVES = {
    "causal": "lapis.training.objectives.supervised.next_token:Causal",
    "chat": "lapis.training.objectives.supervised.next_token:Chat",
    "masked": "lapis.training.objectives.supervised.masked:Masked",
    "classify": "lapis.training.objectives.supervised.classify:Classify",
    "reward": "lapis.training.objectives.preference.preference:Reward",
    "dpo": "lapis.training.objectives.preference.preference:DPO",
    "ipo": "lapis.training.objectives.preference.preference:IPO",
    "kto": "lapis.training.objectives.preference.preference:KTO",
    "orpo": "lapis.training.objectives.preference.preference:ORPO",
    "simpo": "lapis.training.objectives.preference.preference:SimPO",
    "grpo": "lapis.training.objectives.policy.policy:GRPO",
    "rloo": "lapis.training.objectives.policy.policy:RLOO",
    "ppo": "lapis.training.objectives.policy.policy:PPO",
}


def objective_class(name: str) -> "type[Objective]":
    """The class of an objective. `name` is a key of OBJECTIVES."""
    module, _, attribute = OBJECTIVES[name].partition(":")
    objective: type[Objective] = getattr(import_module(module), attribute)
    return objective


def options(objective: "type[Objective]") -> "dict[str, tuple[Any, dataclasses.Field[Any]]]":
    """The options of an objective: name -> its type and its field, in their order."""
    types = typing.get_type_hints(objective)
    return {
        field.name: (types[field.name], field)
        for field in dataclasses.fields(objective)
        if field.init and field.name not in ("tokenizer", "data")
    }
