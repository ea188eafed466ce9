"""A training run from settings alone: what `lapis train CONFIG.yaml key=value` does.

    objective: causal
    new: {dim: 256, layers: 6, heads: 4, ffn_dim: 704, tied: true}     # or model: FOLDER, to go on training it
    tokenizer: runs/tokenizer
    data: [corpus/en, corpus/ms]                                       # or by weights, {corpus/en: 0.7, corpus/ms: 0.3}
    context: 256
    out: runs/base
    steps: 500

A key is a field of TrainConfig (how to train), of RunConfig (what on what), or a keyword of the objective's
constructor, by its own name and with its own default (a new language model has the defaults of FRESH in start.py); an
unknown one is refused with the nearest of all three. An objective needs no word here: it is a line in OBJECTIVES, and
says by `head`, `classes`, `evaluate` and `write` what else it needs (see training/objectives/__init__.py).
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lapis.checkpoint.commit import check_output
from lapis.config import build, nearest
from lapis.errors import ConfigError
from lapis.model.transformer import Transformer
from lapis.text.rows.rows import MANIFEST, Rows
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.distributed import parallel
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent, Watch, watcher
from lapis.training.objectives.objective import OBJECTIVES, Objective, find, options
from lapis.training.result import TrainResult
from lapis.training.setup.lora import LoraConfig
from lapis.training.setup.select import settle
from lapis.training.setup.start import FRESH, start_model


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """TrainConfig, and what to train on what.

    model: a folder to go on from; new: the shape of a model made anew (ModelConfig; vocab, context and what the family
    settles may be left out). tokenizer: a folder, by default the model's. data: files, folders, globs, or one folder of
    packed rows. context: tokens of a row, by default the objective's. zero_init: of a new model, see
    start.py. device: auto takes a GPU where there is one.
    lora: train an adapter (LoraConfig), which is then the result. tune, freeze: patterns of parts (select.py), tokens:
    of which rows of the embedding are trained though the rest of it is not. plan: a file of `lapis plan`: what it
    chose is tuned, or adapted. options: the objective's own, by name.
    """

    objective: str
    out: str
    data: Any = None
    model: str | None = None
    new: dict[str, Any] | None = None
    tokenizer: str | None = None
    context: int | None = None
    zero_init: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    lora: LoraConfig | None = None
    tune: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    tokens: tuple[int | str, ...] = ()
    plan: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is {self.objective!r}; {nearest(self.objective, OBJECTIVES)}")
        if (self.model is None) == (self.new is None):
            raise ConfigError("train: give one of model (a folder) and new (the shape of a model to make)")


def read_settings(settings: Mapping[str, Any], where: str) -> RunConfig:
    """A run's settings from the flat mapping of a file: the objective's options are told from the rest by name.

    Raises ConfigError for a key that nothing knows (the nearest is named), or a value of another type.
    """
    name = settings.get("objective")
    if not isinstance(name, str) or name not in OBJECTIVES:
        said = f"objective is {name!r}; {nearest(str(name), OBJECTIVES)}" if name else '"objective" is missing'
        raise ConfigError(f"{where}: {said}")
    taken = options(find(name))
    fields = {entry.name for entry in dataclasses.fields(RunConfig)} - {"options"}
    unknown = [key for key in settings if key not in taken and key not in fields]
    if unknown:
        raise ConfigError(f'{where}: unknown key "{unknown[0]}"; {nearest(str(unknown[0]), [*fields, *taken])}')
    own = {key: parameter for key, parameter in taken.items() if key not in fields}
    shape = dataclasses.make_dataclass(
        "Options", [(key, p.annotation, field(default=p.default if p.default is not p.empty else dataclasses.MISSING))
                    for key, p in own.items()], kw_only=True,
    )  # fmt: skip
    built: Any = build(shape, {key: value for key, value in settings.items() if key in own}, where)
    rest = {key: value for key, value in settings.items() if key in fields}
    if settings.get("new") is not None and "optimizer" not in settings and _speaks(name):
        rest = {**FRESH, **rest}
    return build(RunConfig, {**rest, "options": vars(built)}, where)


def _speaks(objective: str) -> bool:
    """Whether the objective makes a language model that predicts the next token."""
    return getattr(find(objective), "head", "language") == "language"


def run(config: RunConfig, *, overwrite: bool = False, fresh: bool = False, watch: Watch | None = None) -> TrainResult:
    """Make or open the model, read the data, train. The errors are those of the rooms that are asked."""
    world = parallel.join()
    objective, model = world.together(lambda: _start(config, overwrite, world))
    settings = TrainConfig(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(TrainConfig)})
    watch = watch or (watcher(Path(config.out).name) if world.leads else Silent())
    counts = objective.describe().get("counts", {})
    if hasattr(objective, "coverage"):
        for line in objective.coverage():
            watch.note(f"data: {line}")
    elif counts:
        watch.note("data: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))
    for note in model.notes:
        watch.note(f"model: {note}")
    result = train(model, objective, settings, config.out, overwrite=overwrite, fresh=fresh, watch=watch)
    parallel.part_ways()
    return result


def _start(config: RunConfig, overwrite: bool, world: parallel.World) -> tuple[Objective, Transformer]:
    """The objective and the model. Everything that can be wrong with files and settings shows here."""
    if world.leads:
        inputs = [Path(place) for place in (config.model, config.tokenizer) if place is not None]
        check_output(Path(config.out), overwrite=overwrite, inputs=inputs)
    objective, context = _objective(config, _tokenizer(config))
    model = start_model(
        config.model, config.new, objective, context=context, seed=config.seed, zero_init=config.zero_init
    )
    settle(
        model, lora_config=config.lora, tune=config.tune, freeze=config.freeze, tokens=config.tokens, plan=config.plan,
        base=config.model, tokenizer=objective.tokenizer, seed=config.seed, device=_device(config.device),
    )  # fmt: skip
    return objective, model.to(_device(config.device))


def _device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train: device is cuda, but torch sees no GPU; use device: cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    """That of `tokenizer` or of the model; None where neither is, and the objective can do without."""
    place = config.tokenizer or config.model
    if place is not None and (config.tokenizer or not _does_without(config) or _has_tokenizer(place)):
        return Tokenizer.open(place)
    if _does_without(config):
        return None
    raise ConfigError("train: a new model needs tokenizer, a folder; make one with: lapis tokenizer train")


def _has_tokenizer(place: str) -> bool:
    return not Path(place).is_dir() or (Path(place) / "tokenizer.json").is_file()


def _does_without(config: RunConfig) -> bool:
    make: Any = find(config.objective)
    hint = typing.get_type_hints(make.__init__).get("tokenizer")
    return type(None) in typing.get_args(hint)


def _objective(config: RunConfig, tokenizer: Tokenizer | None) -> tuple[Objective, int | None]:
    """The objective with its options, and the tokens of a row; None where it knows no such thing."""
    make = find(config.objective)
    takes = options(make)
    context = config.context
    if context is None and "context" in takes:
        context = takes["context"].default
        limit = _limit(config)
        context = min(context, limit) if limit else context
    data = config.data
    if isinstance(data, str) and (Path(data) / MANIFEST).is_file():
        rows = Rows.open(data)
        context = rows.length if config.context is None else context
        if rows.length != context:
            raise ConfigError(f"train: context is {context}; {data} was packed with {rows.length}")
        data = rows
    if data is None:
        raise ConfigError('train: "data" is missing; give files, folders, or a folder of packed rows')
    shared = {name: getattr(config, name) for name in takes if name not in config.options and hasattr(config, name)}
    if "context" in takes:
        shared["context"] = context
    return make(tokenizer, data, **{**shared, **config.options}), context if "context" in takes else None


def _limit(config: RunConfig) -> int | None:
    """The largest context of the model, where that is known before it is loaded."""
    from lapis.model.check import read_config

    if config.model is not None:
        return read_config(config.model).context
    found = (config.new or {}).get("context")
    return found if isinstance(found, int) else None
