"""Prompts in, gates out: for each layer and expert the vector that a token's is multiplied with.

An expert's gate is what its positive prompts are in the base's stream less what its negative ones are, of length 1.
Leaves out: the forward pass of `hidden`, which is whoever builds models' (`lapis.prompt_states`).

Shapes: L layers, E experts with the shared one, D width.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.errors import ConfigError
from lapis.families.base import Part
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.engine.sources import Stored, read_rows
from lapis.weights.merge.mixture.recipe import DRAWN, MixtureRecipe
from lapis.wording import format_count

PromptStates = Callable[[Sequence[Sequence[int]]], Tensor]
"""Ids of prompts -> [L, D]: what stands for them in the stream before each layer."""
StatesOf = Callable[[Checkpoint], PromptStates]
"""A model -> the same for it."""

PARALLEL = 5.0  # a condition number above which gates can hardly tell experts apart


def gates_of(recipe: MixtureRecipe, base: Checkpoint, layers: int, dim: int, states: StatesOf | None) -> Tensor:
    """The gates, [L, E, D] in float32.

    Raises:
        ConfigError: Where `gate_mode` is hidden and nobody gave what runs a model.
    """
    if recipe.gate_mode in DRAWN:
        random = torch.Generator().manual_seed(recipe.seed)
        shape = (layers, len(recipe.everyone), dim)
        if recipe.gate_mode == "random":
            return torch.randn(shape, generator=random)
        return (torch.rand(shape, generator=random) * 2 - 1) * math.sqrt(1 / dim)
    if recipe.gate_mode == "hidden":
        if states is None:
            raise ConfigError("merge: gate_mode: hidden runs the base; give states=lapis.prompt_states")
        vectors = states(base)
    else:
        vectors = _embedded(base, layers)
    tokenizer = Tokenizer.open(base)
    lead = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)

    def mean(prompts: Sequence[str]) -> Tensor:
        return vectors([tokenizer.encode(lead + prompt, special=True) for prompt in prompts])

    gates = []
    for expert in recipe.everyone:
        gate = mean(expert.positive)
        if expert.negative:
            gate = gate - mean(expert.negative)
        gates.append(gate / gate.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    return torch.stack(gates, 1)


def parallel_note(gates: Tensor) -> list[str]:
    """A line where gates of some layers can hardly tell experts apart."""
    conditions = torch.linalg.cond(gates.float())
    layers = [layer for layer, condition in enumerate(conditions.tolist()) if not condition <= PARALLEL]
    if not layers:
        return []
    where = "all layers" if len(layers) == len(gates) else f"{len(layers)} of {format_count(len(gates), 'layer')}"
    return [
        f"gates are nearly parallel in {where} (condition number up to {float(conditions.max()):.3g}): some experts "
        "will hardly be chosen; give prompts that differ more"
    ]


def _embedded(base: Checkpoint, layers: int) -> PromptStates:
    name = next(name for name in base.names if base.part(name) == Part(None, "embed", "weight"))
    source = Stored("base", base, name)

    def vectors(prompts: Sequence[Sequence[int]]) -> Tensor:
        total = read_rows(source, [i for ids in prompts for i in ids]).float().sum(0, keepdim=True)
        length: Tensor = total.norm(dim=-1, keepdim=True)
        return (total / length.clamp(min=1e-8)).repeat(layers, 1)

    return vectors
