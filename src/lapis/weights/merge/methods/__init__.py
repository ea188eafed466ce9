"""Blocks of several models in, a block of their merge out: the methods, one function and one line in METHODS each.

A function's signature holds its parameters, their defaults and their help; its docstring the formula and the source. It
computes on float32 blocks (block.py), which merge/kernel.py cuts from tiles.
Leaves out: recipes (weights/merge/recipes/), files (weights/engine/stream.py).
"""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lapis.weights.merge.methods import consensus, linear, matrices, sparse, spherical
from lapis.weights.merge.methods.block import Block, Elementwise, PerModel, Steps

__all__ = ["METHODS", "Block", "Elementwise", "Method", "Parameter"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method as a recipe names it. default is MISSING where a recipe must set it.

    span: the least and the most that a number can be.
    """

    name: str
    kind: Any
    per_model: bool
    default: Any
    help: str
    span: tuple[float, float] = (-math.inf, math.inf)

    MISSING: typing.ClassVar[Any] = inspect.Parameter.empty


@dataclass(frozen=True)
class Method:
    """A merge method and what it needs.

    base: "required", "optional" (used where a recipe names one), or "ignored" (a base is a model like the others).
    least, most: how many models besides a base that is used. rows: a block must hold whole rows. seeded: draws masks.
    differences: what is merged are differences from the base, where one is used. matrices: a layer's matrix is one
    block. statistics: what has to be gathered of each model first (`lapis gather`).
    """

    name: str
    function: Callable[..., Elementwise | Steps]
    base: Literal["required", "optional", "ignored"]
    least: int = 1
    most: int | None = None
    rows: bool = False
    seeded: bool = False
    differences: bool = True
    matrices: bool = False
    statistics: Literal["", "gram", "fisher"] = ""

    @property
    def takes_differences(self) -> bool:
        """Whether models are compared with a base that is their parent."""
        return self.differences and self.base != "ignored"

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """By the name that a recipe uses: `lambda_` is written `lambda`."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        parameters = {}
        for name, argument in inspect.signature(self.function).parameters.items():
            kind, words, *span = typing.get_args(hints[name])
            written = name.rstrip("_")
            per_model = kind == PerModel
            default = argument.default[0] if per_model and isinstance(argument.default, tuple) else argument.default
            parameters[written] = Parameter(written, float if per_model else kind, per_model, default, words, *span)
        return parameters

    @property
    def help(self) -> str:
        return inspect.getdoc(self.function) or ""

    def start(self, parameters: Mapping[str, Any], models: int) -> Elementwise | Steps:
        """The method with its parameters bound; a per-model parameter that is one number counts for each model."""
        bound = {}
        for name, parameter in self.parameters.items():
            value = parameters.get(name, parameter.default)
            if parameter.per_model:
                value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * models
            bound["lambda_" if name == "lambda" else name] = value
        return self.function(**bound)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", linear.linear, base="ignored"),
        Method("task_arithmetic", linear.task_arithmetic, base="required"),
        Method("ties", sparse.ties, base="required"),
        Method("dare_linear", sparse.dare_linear, base="required", seeded=True),
        Method("dare_ties", sparse.dare_ties, base="required", seeded=True),
        Method("della", sparse.della, base="required", rows=True, seeded=True),
        Method("della_linear", sparse.della_linear, base="required", rows=True, seeded=True),
        Method("breadcrumbs", sparse.breadcrumbs, base="required"),
        Method("breadcrumbs_ties", sparse.breadcrumbs_ties, base="required"),
        Method("slerp", spherical.slerp, base="required", most=1, differences=False),
        Method("nuslerp", spherical.nuslerp, base="optional", least=2, most=2, rows=True),
        Method("multislerp", spherical.multislerp, base="optional"),
        Method("karcher", spherical.karcher, base="ignored"),
        Method("model_stock", spherical.model_stock, base="required", least=2, rows=True),
        Method("nearswap", linear.nearswap, base="required", most=1),
        Method("sce", consensus.sce, base="required"),
        Method("arcee_fusion", consensus.arcee_fusion, base="required", most=1, rows=True),
        Method("ram", linear.ram, base="required"),
        Method("ramplus_tl", linear.ramplus_tl, base="required"),
        Method("tsv_m", matrices.tsv_m, base="required", matrices=True),
        Method("iso_c", matrices.iso_c, base="required", matrices=True),
        Method("wudi", matrices.wudi, base="required", matrices=True),
        Method("regmean", matrices.regmean, base="ignored", matrices=True, statistics="gram"),
        Method("fisher", linear.fisher, base="ignored", statistics="fisher"),
        Method("passthrough", linear.passthrough, base="ignored", most=1),
    )
}
