"""What a run would take on GPUs that are not here: arithmetic on the shape of the model, with every weight sharded.

The arithmetic of fully sharded data parallel training (Zhao et al. 2023, arXiv:2304.11277): each GPU keeps a share of
the weights, gradients and optimizer (in float32, or as `weights` says), gathers a block's weights in bfloat16 (or
float32, as `precision` says) before it computes with them, forward and backward, and gets its share of the summed
gradients. Gathering the next block goes on while one computes, so a step takes the longer of the two. After that Muon
has every GPU gather the updates of all matrices inside blocks, and make them orthogonal (optim/muon.py). Leaves out:
tensor and pipeline parallelism, evaluations, input, checkpoints, failures.
"""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from lapis.errors import TrainingError
from lapis.families import parameter_shapes, part_of
from lapis.families.config import ModelConfig
from lapis.model.size import activation_bytes, measure
from lapis.training.config import TrainConfig
from lapis.training.forecast.options import EFFICIENCY, GPU_MEMORY, ForecastOptions
from lapis.training.optim.footprint import copied_size, optimizer_size
from lapis.training.optim.muon import orthogonalize_flops

WEIGHT = {"float32": 4, "bf16": 2}  # bytes of a weight, its gradient and each number of the optimizer
WIRE = {"auto": 2, "bf16": 2, "float32": 4}  # bytes of a weight on the wire, and of an activation
SUM = 4  # bytes of a gradient on the wire
RECOMPUTED = {"none": 0.0, "selective": 0.5, "whole": 1.0}  # the share of forward passes that are done again
BUFFERS = 3  # blocks whose whole weights are on a GPU at once: one computes, one comes, one's gradients go


@dataclass(frozen=True)
class PaperForecast:
    """A step on `gpus` GPUs, and a run of `steps` of them.

    Attributes:
        seconds_per_step: The longer of `computing` and `communicating`, but for what of both is `updating`, which comes
            after.
        updating: Gathering Muon's updates and making them orthogonal, one after the other; 0 with another optimizer.
        tokens_per_second: Of each GPU.
        mfu: Of the FLOPs that the GPUs could do, the share that the model needs (without recomputing).
        bytes_per_step: That a GPU sends, and receives.
        bytes_by_part: Of these: `weights` that are gathered, `gradients` that are summed, and `updates` of Muon.
        memory_bytes: Of a GPU: `held` (weights, gradients, optimizer, its share), `gathered` (whole blocks) and
            `activations` of a micro-batch.
        checkpoint_bytes: Of one checkpoint, in all.
        levers: What would help where it does not fit.
    """

    gpus: int
    parameters: int
    steps: int | None
    tokens_per_step: int
    seconds_per_step: float
    computing: float
    communicating: float
    updating: float
    tokens_per_second: float
    mfu: float
    bytes_per_step: float
    bytes_by_part: dict[str, float]
    memory_bytes: dict[str, int]
    checkpoint_bytes: int
    levers: str

    @property
    def fits(self) -> bool:
        return not self.levers

    def to_json(self) -> dict[str, Any]:
        """The object that `lapis train --plan-only --gpus N --json` prints."""
        run = None if self.steps is None else self.seconds_per_step * self.steps
        return {**asdict(self), "seconds": run, "fits": self.fits, "memory_total": sum(self.memory_bytes.values())}


def on_paper(model: ModelConfig, context: int, config: TrainConfig, machines: ForecastOptions) -> PaperForecast:
    """A run of this shape on so many GPUs.

    Args:
        model: Of which all weights are trained.
        context: Tokens of a row.
        config: Of the run; `batch` counts the rows of all GPUs.
        machines: What a GPU does.

    Raises:
        TrainingError: Where a step's rows cannot be shared out evenly.
    """
    gpus, tflops, bandwidth = machines.gpus, machines.tflops, machines.bandwidth
    assert gpus is not None and tflops is not None and bandwidth is not None
    if config.batch % (gpus * config.accumulate):
        raise TrainingError(
            f"train: batch {config.batch} is not {gpus} GPUs times accumulate {config.accumulate} times whole rows; "
            f"give batch={gpus * config.accumulate} or a multiple"
        )
    rows = config.batch // (gpus * config.accumulate)
    size = measure(model, context)
    tokens = config.batch * context
    needed = 3 * size.flops_per_token * tokens
    done = needed * (1 + RECOMPUTED[config.checkpointing] / 3)
    others, wire = (gpus - 1) / gpus, WIRE[config.precision]
    matrices, orthogonalizing = _hidden(model)
    muon = config.optimizer == "muon"
    # weights come twice for each micro-batch, summed gradients go in float32 once a step
    moved = {
        "weights": size.total * others * 2 * wire * config.accumulate,
        "gradients": size.total * others * SUM,
        "updates": matrices * others * wire * muon,
    }
    speed, link = tflops * 1e12 * (machines.efficiency or EFFICIENCY), bandwidth * 1e9
    alone, gathering = orthogonalizing * muon / speed, moved["updates"] / link  # every GPU does all of it
    computing, communicating = done / (gpus * speed), sum(moved.values()) / link - gathering
    seconds = max(computing, communicating) + alone + gathering
    weight = WEIGHT[config.weights]
    optimizer = weight * optimizer_size(config.optimizer, matrices, size.total - matrices)
    saved = size.total * weight + optimizer + copied_size(config, size.total, size.total * weight)
    memory = {
        "held": round((size.total * weight + saved) / gpus),
        "gathered": 0 if gpus == 1 else BUFFERS * max(size.block, size.group("embed"), size.group("head")) * wire,
        "activations": rows * _activations(model, context, config.checkpointing, wire),
    }
    return PaperForecast(
        gpus=gpus, parameters=size.total, steps=config.steps, tokens_per_step=tokens, seconds_per_step=seconds,
        computing=computing + alone, communicating=communicating + gathering, updating=alone + gathering,
        tokens_per_second=tokens / seconds / gpus, mfu=needed / (seconds * gpus * tflops * 1e12),
        bytes_per_step=sum(moved.values()), bytes_by_part=moved, memory_bytes=memory, checkpoint_bytes=saved,
        levers=_levers(memory, (machines.gpu_memory or GPU_MEMORY) * 1e9, rows, config),
    )  # fmt: skip


def _hidden(model: ModelConfig) -> tuple[int, int]:
    """Parameters in the matrices inside blocks, and the FLOPs of making them orthogonal."""
    count, flops, kinds = 0, 0, model.kinds
    for name, shape in parameter_shapes(model).items():
        if len(shape) == 2 and (layer := part_of(name).layer) is not None:
            times = kinds.count(layer)
            count, flops = count + prod(shape) * times, flops + orthogonalize_flops(min(shape), max(shape)) * times
    return count, flops


def _activations(model: ModelConfig, context: int, checkpointing: str, width: int) -> int:
    """Bytes that one row keeps: of a block that is computed again, only what enters it, and one such block whole."""
    whole = activation_bytes(model, context, width)
    logits = model.vocab * 4 * context if model.head in ("lm", "masked") else 0
    block = (whole - logits) / model.layers
    entering = context * model.dim * width
    again = RECOMPUTED[checkpointing]
    blocks = model.layers * (again * entering + (1 - again) * block) + (block if again else 0)
    return round(blocks + logits)


def _levers(memory: dict[str, int], limit: float, rows: int, config: TrainConfig) -> str:
    """What helps where a GPU has too little memory; "" where it has enough."""
    total = sum(memory.values())
    if total <= limit:
        return ""
    ways = []
    if memory["held"] + memory["gathered"] > limit:
        ways.append("more GPUs")
    elif rows > 1:
        ways.append(f"accumulate={config.accumulate * rows}")
    if config.checkpointing != "whole":
        ways.append("checkpointing=whole")
    return " or ".join(ways or ["a shorter context"])
