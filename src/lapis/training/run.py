"""A training run from settings alone: what `lapis train CONFIG.yaml key=value` does.

    objective: causal
    new: {dim: 256, layers: 6, heads: 4, ffn_dim: 704, tied: true}     # or model: FOLDER, to go on training it
    tokenizer: runs/tokenizer
    data: [corpus/en, corpus/ms]                                       # or by weights, {corpus/en: 0.7, corpus/ms: 0.3}
    context: 256
    out: runs/base
    steps: 500

A key is a field of TrainConfig (how to train), of RunConfig (what on what), or an option of the objective, by its own
name and with its own default (a new language model has the defaults of FRESH in setup/start.py). An unknown key is
refused with the nearest of all three.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.commit import check_output
from lapis.config import build, nearest
from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer
from lapis.parsing import quoted
from lapis.text.corpus.files import refuse_replacing
from lapis.text.rows.rows import MANIFEST, Rows
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.distributed import parallel
from lapis.training.distributed.sharding import choose_sharding, least_memory
from lapis.training.forecast.budget import Budget
from lapis.training.forecast.measured import Forecast, forecast
from lapis.training.forecast.options import ForecastOptions
from lapis.training.forecast.paper import PaperForecast, on_paper
from lapis.training.loop.changes import check_allowed
from lapis.training.loop.loop import train
from lapis.training.loop.progress import LogLines, Silent, Watch, live, watcher
from lapis.training.loop.tracking import check_installed
from lapis.training.objectives import OBJECTIVES, objective_class, options
from lapis.training.objectives.objective import Objective
from lapis.training.result import TrainResult
from lapis.training.setup.lora import LoraConfig, read_names
from lapis.training.setup.select import select_parts
from lapis.training.setup.start import FRESH, preset_shape, start_model

ON_PAPER = ("causal", "chat", "masked", "classify")  # objectives whose step reads each row once


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig):
    """TrainConfig, and what to train on what.

    Args:
        objective: What is learned; a key of OBJECTIVES.
        out: The folder of the result.
        data: Files, folders, globs, or one folder of packed rows.
        model: A folder to go on from.
        new: The shape of a model made anew (ModelConfig; vocab, context and what the family settles may be left out),
            or a preset's name, such as gpt2.
        tokenizer: A folder; by default the model's.
        context: Tokens of a row; by default the objective's.
        zero_init: Of a new model; see setup/start.py.
        device: "auto" takes a GPU where there is one.
        lora: Train an adapter (LoraConfig), which is then the result.
        tune: Patterns of the parts to train (setup/select.py).
        freeze: Patterns of the parts not to train.
        tokens: The rows of the embedding that are trained though the rest of it is not.
        share_rows: Whether these rows learn from tokens of the same characters, too; for many new tokens.
        plan: A file of `lapis plan`: what it chose is tuned, or adapted.
        options: The objective's own, by name.
    """

    objective: str
    out: str
    data: Any = None
    model: str | None = None
    new: dict[str, Any] | str | None = None
    tokenizer: str | None = None
    context: int | None = None
    zero_init: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    lora: LoraConfig | None = None
    tune: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    tokens: tuple[int | str, ...] = ()
    share_rows: bool = False
    plan: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is {quoted(self.objective)}; {nearest(self.objective, OBJECTIVES)}")
        if (self.model is None) == (self.new is None):
            raise ConfigError("train: give one of model (a folder) and new (the shape of a model to make)")
        if self.eval_every and self.options.get("valid", "") is None:
            raise ConfigError(
                f"train: eval_every is {self.eval_every}, and nothing is held out; give valid, or leave eval_every out"
            )

    @property
    def origin(self) -> dict[str, Any]:
        """Where the model comes from and which parts of it are trained, as JSON; what says nothing is left out."""
        names = ("model", "new", "tokenizer", "zero_init", "tune", "freeze", "tokens", "share_rows", "plan")
        given = {name: getattr(self, name) for name in names if name != "zero_init" or self.new is not None}
        given["lora"] = None if self.lora is None else dataclasses.asdict(self.lora)
        return {name: value for name, value in given.items() if value}


def read_settings(settings: Mapping[str, Any], where: str) -> RunConfig:
    """A run's settings from the flat mapping of a file, in which the objective's options are among the rest.

    Raises ConfigError for an unknown key (the nearest is named), or a value of another type.
    """
    name = settings.get("objective")
    if not isinstance(name, str) or name not in OBJECTIVES:
        why = f"objective is {quoted(name)}; {nearest(str(name), OBJECTIVES)}" if name else '"objective" is missing'
        raise ConfigError(f"{where}: {why}")
    own = options(objective_class(name))
    shared = {entry.name for entry in dataclasses.fields(RunConfig)} - {"options"}
    for key in settings:
        if key not in own and key not in shared:
            raise ConfigError(f'{where}: unknown key "{key}"; {nearest(str(key), [*shared, *own])}')
    typed = dataclasses.make_dataclass(
        "Options",
        [(key, kind, field(default=entry.default)) for key, (kind, entry) in own.items() if key not in shared],
        kw_only=True,
    )
    values: Any = build(typed, {key: value for key, value in settings.items() if key not in shared}, where)
    rest = {key: value for key, value in settings.items() if key in shared}
    if isinstance(rest.get("lora"), Mapping):
        rest["lora"] = read_names(rest["lora"], where)
    if settings.get("new") is not None and "optimizer" not in settings and objective_class(name).head == "language":
        rest = {**FRESH, **rest}
    return build(RunConfig, {**rest, "options": vars(values)}, where)


def run(
    config: RunConfig, *, overwrite: bool = False, fresh: bool = False, allow_change: Collection[str] = (),
    watch: Watch | None = None,
) -> TrainResult:  # fmt: skip
    """Makes or opens the model, reads the data, trains. Raises what these do.

    Args:
        config: The run's.
        overwrite: Replace a folder at `out`.
        fresh: Forget an interrupted run.
        allow_change: Keys in which this run may differ from the one that it goes on with.
        watch: What shows progress.
    """
    if fresh and allow_change:
        raise ConfigError(
            f"train: --fresh forgets the run before, so that --allow-change {' '.join(allow_change)} has no effect; "
            "leave one out"
        )
    world = parallel.join()
    keys = {entry.name for entry in dataclasses.fields(TrainConfig)} | {*config.options}
    world.together(lambda: check_allowed(allow_change, keys))
    world.together(lambda: check_installed(config.track))
    settings = TrainConfig(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(TrainConfig)})
    starting = watch or (LogLines(Path(config.out).name) if world.leads and not sys.stderr.isatty() else Silent())
    memory = least_memory(world)
    try:
        objective, model, device = world.together(lambda: _start(config, overwrite, world, memory, starting))
    finally:
        if starting is not watch:
            starting.close()
    watch = watch or (watcher(Path(config.out).name) if world.leads else Silent())
    try:
        for line in objective.coverage():
            watch.note(f"data: {line}")
        for note in model.notes:
            watch.note(f"model: {note}")
        result = train(model, objective, settings, config.out, overwrite=overwrite, fresh=fresh,
                       allow_change=allow_change, watch=watch, device=device, origin=config.origin)  # fmt: skip
    finally:
        watch.close()
    parallel.disconnect()
    return result


def plan(
    config: RunConfig, budget: Budget | None = None, *, choose_batch: bool = False, watch: Watch | None = None
) -> Forecast:
    """What the run would take on this machine, by its first steps; nothing is written. Raises what `run` does, too.

    Args:
        config: The run's.
        budget: Steps, or how a step is cut, are chosen so that the run keeps within.
        choose_batch: A budget of time or FLOPs chooses the batch of a new language model, too.
        watch: What shows progress.

    Raises:
        ConfigError: Where torchrun has started several processes.
    """
    _check_alone()
    alone = config.new is not None and objective_class(config.objective).head == "language"
    settings = TrainConfig(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(TrainConfig)})
    shown = watch or watcher(Path(config.out).name)
    try:
        return forecast(
            lambda: _start(config, True, parallel.Processes(), 0, shown)[:2], settings, shown, budget,
            choose_batch=choose_batch and alone, out=Path(config.out),
        )  # fmt: skip
    finally:
        if shown is not watch:
            shown.close()


def plan_on_paper(config: RunConfig, machines: ForecastOptions) -> PaperForecast:
    """What the run would take on GPUs that are not here; neither weights nor data are read.

    Args:
        config: The run's; its model is a folder, a hub id or a shape.
        machines: How many GPUs, and what one does.

    Raises:
        ConfigError: Where the shape is not known without a tokenizer, or only a part of the model is trained; for
            settings of which this arithmetic knows nothing; and under torchrun.
    """
    from lapis.model.check import read_config

    _check_alone()
    if config.objective not in ON_PAPER:
        raise ConfigError(
            f"train: on paper a step reads each row once, and {config.objective} does more; give one of "
            f"{', '.join(ON_PAPER)}, or plan on this machine, without --gpus"
        )
    if config.shard in ("none", "hybrid"):
        raise ConfigError(f"train: shard is {config.shard}, and on paper each GPU holds its share; give shard: full")
    if config.weights == "bf16" and machines.gpus != 1:
        raise ConfigError(
            "train: weights: bf16 are not shared out, since updates are rounded at random over whole matrices, and on "
            "paper each GPU holds its share; give weights: float32, or --gpus 1"
        )
    if config.lora or config.tune or config.freeze or config.plan:
        raise ConfigError("train: on paper all weights are trained; leave out lora, tune, freeze and plan")
    if config.model is not None:
        shape = read_config(config.model)
    else:
        assert config.new is not None
        shape = preset_shape(config.new) or build(ModelConfig, _sized(config), "train: new")
    context = config.context or min(objective_class(config.objective).context, shape.context)
    settings = TrainConfig(**{entry.name: getattr(config, entry.name) for entry in dataclasses.fields(TrainConfig)})
    return on_paper(shape, context, settings, machines)


def _check_alone() -> None:
    """Raises ConfigError where torchrun has started several processes: a plan is one process' own."""
    if (size := parallel.join().size) > 1:
        raise ConfigError(
            f"train: --plan-only measures one process, and torchrun has started {size}; start it without torchrun, "
            "with --gpus N for several, on paper"
        )


def _sized(config: RunConfig) -> dict[str, Any]:
    """The fields of a shape that a file gives; its vocabulary is the tokenizer's where it is left out."""
    fields = dict(config.new) if isinstance(config.new, Mapping) else {}
    known = {"context": config.context or 1024}
    if "vocab" not in fields:
        known["vocab"] = _tokenizer_rows(config)
    return {**known, **fields}


def _tokenizer_rows(config: RunConfig) -> int:
    tokenizer = _tokenizer(config)
    return 0 if tokenizer is None else tokenizer.rows


def _start(
    config: RunConfig, overwrite: bool, world: parallel.Processes, memory: int, watch: Watch
) -> tuple[Objective, Transformer, torch.device]:
    """The objective, the model, and where it will be trained. Whatever is wrong with files and settings is found here.

    A model that will be shared out is whole in the first process alone, and in the memory of the machine.
    memory: Of the process that has least; one that is alone shares nothing out.
    """
    if world.leads:
        inputs = [Path(place) for place in (config.model, config.tokenizer) if place is not None]
        check_output(Path(config.out), overwrite=overwrite, inputs=inputs, option="out=FOLDER")
        refuse_replacing(config.out, _places([config.data, config.options.get("valid")]), "out=FOLDER")
    objective, context = _objective(config, _tokenizer(config))
    live(watch).stage("opening the model")
    device = _device(config.device)

    def begin(weights: bool) -> Transformer:
        return start_model(
            config.model, config.new, objective, context=context, seed=config.seed, zero_init=config.zero_init,
            weights=weights,
        )  # fmt: skip

    def select(model: Transformer) -> Transformer:
        select_parts(
            model, lora_config=config.lora, tune=config.tune, freeze=config.freeze, tokens=config.tokens,
            share_rows=config.share_rows, plan=config.plan, base=config.model, tokenizer=objective.tokenizer,
            seed=config.seed, device=device,
        )  # fmt: skip
        return model

    def is_large(model: Transformer) -> bool:
        return choose_sharding(config, world, model, min(context, model.config.context), memory) is not None

    if dist.is_initialized() and _starts_empty(config, objective):
        outline = begin(weights=False)
        if is_large(outline) and is_large(select(outline)):  # what fits whole fits when a part of it is trained
            return objective, select(begin(weights=True)) if world.leads else outline, device
    return objective, select(begin(weights=True)).to(device), device


def _starts_empty(config: RunConfig, objective: Objective) -> bool:
    """Whether weights may come to the processes after they were shared out: nothing needs them whole before."""
    packed = config.lora is not None and config.lora.base == "nf4"
    adapter = config.model is not None and open_checkpoint(config.model, adapters=True).adapter is not None
    return type(objective).begin is Objective.begin and not packed and not adapter


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train: device is cuda, but torch sees no GPU; use device: cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    """That of `tokenizer` or of the model; None where there is none and the objective needs none."""
    optional = not objective_class(config.objective).needs_tokenizer
    place = config.tokenizer or config.model
    if place is not None and (config.tokenizer or not optional or _has_tokenizer(place)):
        return Tokenizer.open(place)
    if optional:
        return None
    raise ConfigError("train: a new model needs tokenizer, a folder; make one with: lapis tokenizer train")


def _places(data: Any) -> list[str | Path]:
    """Every path that `data` or `valid` names, however they are written (text/rows/data_sources.py)."""
    if isinstance(data, (str, Path)):
        return [data]
    if isinstance(data, Mapping):
        return [place for key, value in data.items() for place in (*_places(key), *_places(value))]
    return [place for each in data for place in _places(each)] if isinstance(data, (list, tuple)) else []


def _has_tokenizer(place: str) -> bool:
    return not Path(place).is_dir() or (Path(place) / "tokenizer.json").is_file()


def _objective(config: RunConfig, tokenizer: Tokenizer | None) -> tuple[Objective, int]:
    """The objective with its options, and the tokens of a row."""
    objective = objective_class(config.objective)
    context = config.context
    if context is None:
        context = min(objective.context, _context_limit(config) or objective.context)
    data = config.data
    if data is None:
        raise ConfigError('train: "data" is missing; give files, folders, or a folder of packed rows')
    if isinstance(data, str) and (Path(data) / MANIFEST).is_file():
        data = Rows.open(data)
        context = data.length if config.context is None else context
        if data.length != context:
            raise ConfigError(f"train: context is {context}; {config.data} was packed with {data.length}")
    return objective(tokenizer, data, context=context, **config.options), context


def _context_limit(config: RunConfig) -> int | None:
    """The largest context of the model, where that is known before it is loaded."""
    from lapis.model.check import read_config

    if config.model is not None:
        return read_config(config.model).context
    assert config.new is not None
    limit = None if isinstance(config.new, str) else config.new.get("context")
    if limit is None and (preset := preset_shape(config.new)) is not None:
        return preset.context
    return limit if isinstance(limit, int) else None
