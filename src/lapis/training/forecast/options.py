"""What a forecast is asked for: the one place where its options, their defaults and their help are written."""

from dataclasses import dataclass

from lapis.config import check_numbers
from lapis.errors import ConfigError


@dataclass(frozen=True)
class ForecastOptions:
    """What a run will cost, before it is run. Raises ConfigError for a value out of range."""

    plan_only: bool = False
    """Measure some first steps, say what the whole run will take, and write nothing."""
    budget: str | None = None
    """With --plan-only: choose steps for a time ("3 min") or for FLOPs ("1e18 flops"), and for a new language model the
    batch and its parts where the settings give none; or how a step is cut for a memory ("8 GB")."""
    gpus: int | None = None
    """With --plan-only: on paper, for so many GPUs that are not here; needs --tflops and --bandwidth."""
    tflops: float | None = None
    """What a GPU does at most in bfloat16, in 10^12 FLOPs per second: 312 (A100), 989 (H100)."""
    bandwidth: float | None = None
    """Bytes that a GPU sends and receives in the slowest link between them, in GB per second: 50 is 400 Gbit/s."""
    efficiency: float = 0.4
    """The share of these FLOPs that products, attention and what lies between reach together; docs/scale.md has it
    beside published runs."""
    gpu_memory: float = 80.0
    """Of a GPU, in GB."""

    def __post_init__(self) -> None:
        check_numbers(self, "train")
        paper = [name for name in ("gpus", "tflops", "bandwidth") if getattr(self, name) is not None]
        if (self.budget is not None or paper) and not self.plan_only:
            given = "budget" if self.budget is not None else paper[0]
            raise ConfigError(f"train: --{given} is for --plan-only, which prints the settings to give; add it")
        if paper and len(paper) < 3:
            known = {"gpus": "--gpus N", "tflops": "--tflops 989 (an H100)", "bandwidth": "--bandwidth 50 (GB/s)"}
            lacking = " and ".join(text for name, text in known.items() if name not in paper)
            raise ConfigError(
                f"train: --{paper[0]} {getattr(self, paper[0]):g} is about machines that are not here and cannot be "
                f"measured; add {lacking}, as docs/scale.md has them"
            )
        if paper and self.budget is not None:
            raise ConfigError("train: --budget is for this machine; without --gpus it is measured")
        for name in (*paper, "gpu_memory"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train: {name} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"train: efficiency is {self.efficiency}; it is a share, above 0, at most 1")
