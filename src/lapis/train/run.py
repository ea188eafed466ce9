"""A training run from settings alone: what `lapis train CONFIG.yaml key=value` does.

    objective: causal
    new: {dim: 256, layers: 6, heads: 4, ffn_dim: 704, tied: true}     # or model: FOLDER, to go on training it
    tokenizer: runs/tokenizer
    data: [corpus/en, corpus/ms]
    context: 256
    out: runs/base
    steps: 500

Leaves out: LoRA, freeze lists.
"""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from lapis.checkpoint.commit import check_output
from lapis.config import build
from lapis.errors import ConfigError
from lapis.model import ModelConfig, Transformer, load
from lapis.text.rows import MANIFEST, Rows
from lapis.text.tokenizer import Tokenizer
from lapis.train.config import TrainConfig
from lapis.train.loop import TrainResult, train
from lapis.train.objectives import OBJECTIVES, Objective
from lapis.train.watch import Watch, watcher


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """TrainConfig, and what to train on what.

    model: a folder to go on from; new: the shape of a model made anew (ModelConfig; vocab and context may be left
    out). tokenizer: a folder, by default the model's. data: files, folders, globs, or one folder of packed rows.
    context: tokens of a row. too_long: of a chat longer than a row.
    """

    objective: Literal["causal", "chat"]
    out: str
    data: str | list[str]
    model: str | None = None
    new: dict[str, Any] | None = None
    tokenizer: str | None = None
    context: int = 512
    too_long: Literal["cut", "drop"] = "cut"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.new is None):
            raise ConfigError("train: give one of model (a folder) and new (the shape of a model to make)")
        if self.new is not None and self.tokenizer is None:
            raise ConfigError("train: a new model needs tokenizer, a folder; make one with: lapis tokenizer train")


def run(config: RunConfig, *, overwrite: bool = False, fresh: bool = False, watch: Watch | None = None) -> TrainResult:
    """Make or open the model, read the data, train. The errors are those of the rooms that are asked."""
    inputs = [Path(place) for place in (config.model, config.tokenizer) if place is not None]
    check_output(Path(config.out), overwrite=overwrite, inputs=inputs)
    tokenizer = Tokenizer.open(config.tokenizer or config.model or "")
    model = _new(config, tokenizer) if config.new is not None else load(str(config.model), dtype=torch.float32)
    tokenizer.check_rows(model.config.vocab)
    if config.context > model.config.context:
        raise ConfigError(
            f"train: context is {config.context}; the model has {model.config.context}, give that or less"
        )
    settings = TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})
    objective = _objective(config, tokenizer)
    watch = watch or watcher(Path(config.out).name)
    watch.note(
        "data: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in objective.describe()["counts"].items())
    )
    return train(model, objective, settings, config.out, overwrite=overwrite, fresh=fresh, watch=watch)


def _new(config: RunConfig, tokenizer: Tokenizer) -> Transformer:
    shape = {"vocab": tokenizer.rows, "context": config.context, **(config.new or {})}
    built = build(ModelConfig, shape, "train: new")
    torch.manual_seed(config.seed)
    return Transformer(built)


def _objective(config: RunConfig, tokenizer: Tokenizer) -> Objective:
    """The objective with those of its options that the settings name."""
    make = OBJECTIVES[config.objective]
    data: Any = config.data
    if isinstance(data, str) and (Path(data) / MANIFEST).is_file():
        data = Rows.open(data)
        if data.length != config.context:
            raise ConfigError(f"train: context is {config.context}; {config.data} was packed with {data.length}")
    takes = inspect.signature(make).parameters
    options = {name: getattr(config, name) for name in ("context", "too_long") if name in takes}
    return make(tokenizer, data, **options)
