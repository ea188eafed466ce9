"""What a forecast is asked for: the one place where its options, their defaults and their help are written."""

from dataclasses import dataclass

from lapis.config import check_numbers
from lapis.errors import ConfigError
from lapis.parsing import quoted

EFFICIENCY, GPU_MEMORY = 0.4, 80.0  # where they are not given


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
    efficiency: float | None = None
    """The share of these FLOPs that products, attention and what lies between reach together, by default 0.4;
    docs/scale.md has it beside published runs."""
    gpu_memory: float | None = None
    """Of a GPU, in GB, by default 80."""

    def __post_init__(self) -> None:
        check_numbers(self, "train")
        about = {name: value for name, value in vars(self).items() if value is not None and name != "plan_only"}
        if about and not self.plan_only:
            given, option = next(iter(about)), _spelled(next(iter(about)))
            raise ConfigError(
                f"train: {option} {_shown(about[given])} is for --plan-only; add it, or leave {option} out"
            )
        paper = [name for name in about if name != "budget"]
        needed = {"gpus": "--gpus N", "tflops": "--tflops 989 (an H100)", "bandwidth": "--bandwidth 50 (GB/s)"}
        if paper and (lacking := [text for name, text in needed.items() if name not in paper]):
            raise ConfigError(
                f"train: {_spelled(paper[0])} {_shown(about[paper[0]])} is about machines that are not here and cannot "
                f"be measured; add {' and '.join(lacking)}, as docs/scale.md has them"
            )
        if paper and self.budget is not None:
            raise ConfigError("train: --budget is for this machine; without --gpus it is measured")
        for name in paper:
            if about[name] <= 0:
                raise ConfigError(f"train: {name} is {about[name]}; it must be above 0")
        if self.efficiency is not None and self.efficiency > 1:
            raise ConfigError(f"train: efficiency is {self.efficiency}; it is a share, above 0, at most 1")


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: float | str) -> str:
    return quoted(value) if isinstance(value, str) else f"{value:g}"
