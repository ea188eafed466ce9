"""plan.yaml: which parts of a model to tune or merge, as `lapis plan` writes it and `lapis train` and `graft` read it.

    format: lapis-plan/1
    model: {family: llama, dim: 576, layers: 30, ...}      # the shape that it was made for
    tune: [{layer: 3, component: mlp}, ...]                 # for training
    tokens: ["<|im_start|>"]                                # and the rows of these tokens
    scales: [{layers: [3], components: [mlp], scale: 1.0}]  # for a graft; what no line names has the default

Leaves out how a plan is made (planning/), and what a scale does to a tensor (weights/graft/scale.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapis.config import dump_yaml, load_yaml
from lapis.errors import ConfigError
from lapis.families.config import ModelConfig

FORMAT = "lapis-plan/1"
# not the vocabulary: what holds of layers holds when tokens were added
SHAPE = ("family", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim")


@dataclass(frozen=True)
class PlanFile:
    """What a plan.yaml holds.

    goal, budget, made_from: how it was made. model: the shape of the model. tune, control: lines of layer and
    component: the choice, and a random one of its size. tokens: whose rows are trained with either. embeddings: "add"
    where a graft is to add to the token tables too, else "keep". default, scales: as weights/graft/scale.py reads them.
    scores: a row of figures for each layer. source: the file that it was read from.
    """

    model: Mapping[str, Any]
    tune: tuple[Mapping[str, Any], ...]
    tokens: tuple[str, ...] = ()
    control: tuple[Mapping[str, Any], ...] = ()
    goal: str = ""
    budget: float = 0.0
    made_from: Mapping[str, Any] = field(default_factory=dict)
    embeddings: str = "keep"
    default: float = 0.0
    scales: tuple[Mapping[str, Any], ...] = ()
    scores: tuple[Mapping[str, Any], ...] = ()
    source: str = "plan"

    @classmethod
    def read(cls, path: str | Path) -> "PlanFile":
        """The plan in a file.

        Raises:
            ConfigError: The file is not there, is no plan, or a line of it is not what it should be.
        """
        settings, place = load_yaml(path), str(path)
        if settings.get("format") != FORMAT:
            raise ConfigError(f"{place}: is no plan ({FORMAT}); make one with: lapis plan")
        if not isinstance(settings.get("model"), dict):
            raise ConfigError(f"{place}: model is missing: the shape of the model that the plan was made for")
        if not isinstance(settings.get("tune"), list) or not settings["tune"]:
            raise ConfigError(f"{place}: tune must list what to tune, as {{layer, component}}")
        for i, line in enumerate(settings["tune"]):
            _check_line(line, f"{place}: tune[{i}]")
        tokens = settings.get("tokens") or []
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ConfigError(f"{place}: tokens must be a list of tokens, as text")
        known: dict[str, Any] = {
            name: settings[name]
            for name in ("goal", "budget", "made_from", "embeddings", "default")
            if name in settings
        }
        known |= {name: tuple(settings.get(name) or ()) for name in ("control", "scales", "scores")}
        return cls(settings["model"], tuple(settings["tune"]), tuple(tokens), source=place, **known)

    def to_yaml(self) -> str:
        """The text of the file; figures of the scores are rounded to five digits."""
        settings = {
            "format": FORMAT,
            "goal": self.goal,
            "budget": self.budget,
            "made_from": dict(self.made_from),
            "model": dict(self.model),
            "tune": list(self.tune),
            "tokens": list(self.tokens),
            "control": list(self.control),
            "embeddings": self.embeddings,
            "default": self.default,
            "scales": list(self.scales),
            "scores": [_rounded(row) for row in self.scores],
        }
        return dump_yaml(settings)

    @property
    def patterns(self) -> tuple[str, ...]:
        """What to tune, as patterns (families/patterns.py): `layers.3.mlp`, `embed`."""
        return tuple(_pattern(line.get("layer"), line.get("component")) for line in self.tune)

    def check_shape(self, config: ModelConfig) -> None:
        """Raises ConfigError where the plan was made for a model of another shape."""
        if problem := shape_problem(self.model, {name: getattr(config, name) for name in SHAPE}):
            raise ConfigError(f"{self.source}: was made for another model ({problem}); plan for this one")


def shape_problem(planned: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """In which fields a plan's model and another one differ, as `layers 30 there, 24 here; ...`; "" where in none."""
    return "; ".join(
        f"{name} {planned[name]} there, {actual[name]} here"
        for name in SHAPE
        if name in planned and name in actual and planned[name] != actual[name]
    )


def _pattern(layer: int | None, component: str | None) -> str:
    pieces = ([] if layer is None else ["layers", str(layer)]) + ([] if component is None else [component])
    return ".".join(pieces)


def _check_line(line: Any, where: str) -> None:
    layer, component = (line.get(name) if isinstance(line, dict) else None for name in ("layer", "component"))
    numbered = layer is None or (isinstance(layer, int) and not isinstance(layer, bool))
    if not numbered or not isinstance(component, str | None) or (layer is None and component is None):
        raise ConfigError(f"{where}: expected {{layer: NUMBER, component: NAME}}")


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
