"""TrainConfig: every option of a run, in one place. The options of an objective are its own fields."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lapis.config import check_numbers, nearest
from lapis.errors import ConfigError
from lapis.parsing import quoted

Shape = Literal["wsd", "constant", "cosine", "linear"]


TRACKERS = ("tensorboard", "wandb", "trackio")
# options on which no trained weight depends
WITHOUT_EFFECT = ("save_every", "keep", "log_every", "sample_every", "save_dtype", "shard", "certify", "track")


@dataclass(frozen=True)
class GuardOptions:
    """What is done with a batch whose loss or gradient is not finite, or jumps. It is named with the last good
    checkpoint.

    Args:
        nan: A loss or a gradient that is NaN or infinite: "stop" ends the run, "skip" leaves the batch out.
        spike: A loss or a norm of the gradient that jumps: "warn" only names it, "off" does not look.
        deviations: Standard deviations above the mean of the steps before, from which it jumps.
        window: Steps before that are looked at.
        most: Batches in a row that may be left out; one more ends the run.
    """

    nan: Literal["stop", "skip"] = "stop"
    spike: Literal["warn", "skip", "stop", "off"] = "warn"
    deviations: float = 7.0
    window: int = 100
    most: int = 10

    def __post_init__(self) -> None:
        check_numbers(self, "train: guards")
        for name, least in (("deviations", 0), ("window", 20), ("most", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"train: guards: {name} is {getattr(self, name)}; give at least {least}")


@dataclass(frozen=True)
class MuonOptions:
    """Steps beyond Muon as it was published.

    Args:
        coefficients: Of the rounds that make an update orthogonal: Jordan et al.'s, or Polar Express' (optim/muon.py).
        by_neuron: Updates of equal size for each row of a matrix, by a running mean of squares (NorMuon).
        cautious: Weight decay only where the update makes a weight smaller, too.
        falling: Weight decay falls with the schedule once more, and not by the learning rate alone.
    """

    coefficients: Literal["jordan", "polar"] = "jordan"
    by_neuron: bool = False
    cautious: bool = False
    falling: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Give one of steps, epochs or minutes.

    Args:
        steps: Updates of the weights.
        epochs: Times that the data is read.
        minutes: Budget of time. The last part of it is the decay.
        batch: Rows of one step.
        accumulate: Parts in which the rows of a step are computed, to save memory; the result is the same.
        optimizer: Muon takes the matrices inside blocks, AdamW the rest.
        muon: Variants of its update.
        lr: Peak learning rate. Muon's updates are scaled so that AdamW's rate fits it too.
        rates: Peak learning rates of some parts, by pattern (optim/rates.py); the rest has lr.
        weight_decay: Of matrices.
        warmup: Steps, at most a tenth of the run.
        schedule: How the rate goes on after the warm-up (optim/optimizers.py).
        decay: The share of the run over which "wsd" falls to zero.
        clip: Largest norm of the gradient; 0 = none.
        ema: Decay of a running average of the weights, which is then the result; 0 = none.
        seed: Of the data's order, of new weights, of dropout.
        precision: "auto" measures which is faster.
        threads: 0 measures how many are fastest.
        weights: "bf16" has no float32 copy of the weights; updates are rounded at random (optim/rounding.py).
        checkpointing: Compute the activations of every second block, or of all, twice, to save memory.
        compile: torch.compile for the blocks; "auto" where the run is long enough and it proves faster, and never where
            it is shared out ("full", "hybrid"). "on" is refused for experts, and where replies are generated.
        shard: Of several processes each holds a share of weights, gradients and optimizer ("full"; "hybrid": within a
            machine), or all of it ("none"); "auto" shares out what does not fit whole.
        save_every: Steps between checkpoints; 0 = every five minutes.
        keep: Checkpoints that are kept.
        log_every: Steps per entry of the learning curve.
        sample_every: Seconds between samples of text; 0 = none.
        save_dtype: Of the result.
        eval_every: Steps between held-out evaluations; 0 = at the end only.
        watch_metric: The held-out metric that early_stop and best look at, by default the first. Less is better for a
            loss, nll, perplexity, error, kl or bits per byte; more for any other.
        early_stop: Stop after so many evaluations without a better value; 0 = never.
        best: End with the weights of the best evaluation.
        limits: Held-out metric -> how far it may go: a value, or a share of its value at the start, such as "3%", by
            which it may become worse. The run ends at the first evaluation beyond, with the weights of the last within.
        guards: What is done with a batch that is not finite, or that jumps.
        certify: Whether certificate.json has checks that are computed on the run's own model; "auto" where the run has
            at least 50 steps in one process.
        track: Where the curve is sent beside log.jsonl: tensorboard, wandb, trackio (the extra "track").
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch: int = 16
    accumulate: int = 1
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    muon: MuonOptions = MuonOptions()
    lr: float = 3e-4
    rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.1
    warmup: int = 50
    schedule: Shape = "wsd"
    decay: float = 0.4
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"
    threads: int = 0
    weights: Literal["float32", "bf16"] = "float32"
    checkpointing: Literal["none", "selective", "whole"] = "none"
    compile: Literal["auto", "on", "off"] = "auto"
    shard: Literal["auto", "none", "full", "hybrid"] = "auto"
    save_every: int = 0
    keep: int = 2
    log_every: int = 10
    sample_every: float = 30.0
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    eval_every: int = 0
    watch_metric: str = ""
    early_stop: int = 0
    best: bool = False
    limits: dict[str, float | str] = field(default_factory=dict)
    guards: GuardOptions = GuardOptions()
    certify: Literal["auto", "on", "off"] = "auto"
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self, "train")
        bounds = [self.steps, self.epochs, self.minutes]
        if sum(bound is not None for bound in bounds) != 1:
            raise ConfigError("train: give one of steps, epochs or minutes")
        if any(bound is not None and bound <= 0 for bound in bounds):
            raise ConfigError("train: steps, epochs and minutes must be above 0")
        for name in ("batch", "accumulate", "keep", "log_every", "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train: {name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "weight_decay",
            "warmup",
            "clip",
            "threads",
            "save_every",
            "sample_every",
            "eval_every",
            "early_stop",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"train: {name} is {getattr(self, name)}; it must not be below 0")
        if self.muon != MuonOptions() and self.optimizer != "muon":
            raise ConfigError(f"train: muon is set, and optimizer is {self.optimizer}; set optimizer: muon")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"train: ema is {self.ema}; it is a decay, from 0 to below 1, such as 0.999")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"train: decay is {self.decay}; it is a share of the run, from 0 to 1")
        if (self.early_stop or self.best) and not self.eval_every:
            raise ConfigError("train: early_stop and best need eval_every, the steps between evaluations")
        if self.watch_metric and not (self.early_stop or self.best):
            raise ConfigError(
                f"train: watch_metric is {quoted(self.watch_metric)}, and nothing looks at it; give early_stop or best"
            )
        if self.decay != TrainConfig.decay and self.schedule != "wsd":
            raise ConfigError(
                f"train: decay is {self.decay}, and schedule is {self.schedule}; give schedule: wsd, or leave decay out"
            )
        if self.limits and not self.eval_every:
            raise ConfigError("train: limits need eval_every, the steps between evaluations")
        for name, limit in self.limits.items():
            if isinstance(limit, str) and not re.fullmatch(r"\d+(\.\d+)? ?%", limit):
                raise ConfigError(f'train: limits: {name} is {quoted(limit)}; give a value, or a share such as "3%"')
        for name in self.track:
            if name not in TRACKERS:
                raise ConfigError(f"train: track is {quoted(name)}; {nearest(name, TRACKERS)}")
        if self.batch % self.accumulate:
            raise ConfigError(
                f"train: batch {self.batch} does not divide into accumulate {self.accumulate} equal parts; give "
                f"batch={-(-self.batch // self.accumulate) * self.accumulate}"
            )

    def decisive(self) -> dict[str, Any]:
        """The options that the weights depend on; a rerun that differs in one of them is another run."""
        options = {name: value for name, value in vars(self).items() if name not in WITHOUT_EFFECT}
        groups = {"guards": (options.pop("guards"), GuardOptions()), "muon": (options.pop("muon"), MuonOptions())}
        return {**options, **{name: asdict(given) for name, (given, plain) in groups.items() if given != plain}}
