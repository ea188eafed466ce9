"""Whether a step fits into memory, before the machine finds out: on a CPU a process that takes too much is killed.

What a token keeps for the backward pass is measured on two small batches, not guessed. Leaves out: what exists for a
moment within one operation.
"""

import torch
from torch import Tensor

from lapis.errors import TrainingError
from lapis.model.size import activation_bytes, free_memory
from lapis.training.config import TrainConfig
from lapis.training.loop.state import TrainState
from lapis.training.objectives.objective import SMALL_BATCH, Objective
from lapis.training.setup.blocks import TooSlow, autocast, stoppable

_SECONDS = 5.0  # for measuring


def require_room(state: TrainState, objective: Objective, config: TrainConfig, precision: str) -> None:
    """Raises TrainingError with what helps where the gradients, the optimizer and a micro-batch exceed what is free.

    Measures only where a generous estimate comes near, and says nothing where that takes too long.
    """
    free = available(state.device)
    trained = state.optimizers.parameters
    states = {"adamw": 2, "muon": 1, "sgd": 1}[config.optimizer]
    held = sum(p.numel() * p.element_size() for p in trained) * (1 + states)
    shape = state.model.config
    length = min(shape.context, objective.context)
    if held + state.rows * activation_bytes(shape, length, 4) < free / 2:
        return
    with torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []):
        try:
            with stoppable(state.model, _SECONDS):
                (less, few), (more, many) = (
                    _saved(state, objective, precision, tokens) for tokens in (SMALL_BATCH // 8, SMALL_BATCH // 4)
                )
        except TooSlow:
            return
    per_token = (more - less) / (many - few) if many > few else more / many
    step = int(max(0.0, less - per_token * few) + per_token * state.rows * objective.tokens_per_row)
    if held + step <= free:
        return
    levers = []
    if step > held:
        if state.rows > 1:
            levers.append("raise accumulate (the result is the same)")
        if config.checkpointing != "whole":
            levers.append("set checkpointing to whole (the same result, a third slower)")
        levers.append("lower batch or context")
    else:
        levers.append("train a LoRA, or freeze a part")
        if config.weights == "float32":
            levers.append("set weights to bf16")
    raise TrainingError(
        f"train: a step needs about {(held + step) / 1e9:.1f} GB ({step / 1e9:.1f} GB for {state.rows} rows, "
        f"{held / 1e9:.1f} GB for gradients and optimizer) and {free / 1e9:.1f} GB are free; {', or '.join(levers)}"
    )


def available(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = free_memory()
    return 1 << 62 if free is None else free


def _saved(state: TrainState, objective: Objective, precision: str, tokens: int) -> tuple[int, int]:
    """Bytes that the forward pass of a small batch keeps for the backward pass, besides the weights; and its tokens."""
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with autocast(state.device, precision):
        with torch.no_grad():
            batch = objective.small_batch(state.model, state, tokens)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss, _, metrics = objective.loss(state.model, batch)
    del loss
    return sum(sizes.values()), max(1, int(metrics.get("tokens", tokens)))
