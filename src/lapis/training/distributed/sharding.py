"""Weights, gradients and optimizer of a run shared out over its processes: torch's FSDP2, a block at a time.

    shard: full       # every process holds 1/N of everything, and gathers a block's weights when it computes with them
    shard: hybrid     # so within a machine; between machines gradients are added up (HSDP)

The model and the objectives know nothing of it: `share_out` changes a model in place. What is done without gradients
runs in all processes alike, or (where replies grow token by token) on weights that are gathered for that time.
Leaves out: pieces of a matrix on several GPUs within one product (tensor parallelism), pipelines, offloading.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapis.config import environment_number
from lapis.errors import ConfigError
from lapis.model.size import activation_bytes
from lapis.model.transformer import Transformer
from lapis.training.config import TrainConfig
from lapis.training.distributed.forward import waiting
from lapis.training.distributed.parallel import Processes
from lapis.training.distributed.pieces import own, piece_like, whole
from lapis.training.optim.footprint import copy_bytes, optimizer_bytes, trained_bytes, weight_bytes

Sharded = Literal["full", "hybrid"]

_ROOM = 0.8  # of a device's memory, that a whole state may take before it is shared out
_HELD_BACK = 0.25  # of it, that whole gradients may take so that they are added up once a step
# torch 2.13 has them by new names
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def choose_sharding(
    config: TrainConfig, world: Processes, model: Transformer, context: int, memory: int
) -> Sharded | None:  # fmt: skip
    """How the run's state is shared out; None where each process holds all of it. A function of what all know.

    Args:
        config: Of the run; "auto" shares out what does not fit whole.
        world: The processes.
        model: As it will be trained; its weights may be on the meta device.
        context: Tokens of a row.
        memory: Of the process that has least (`least_memory`).

    Raises:
        ConfigError: For `hybrid` where there is one machine, or machines with different numbers of processes, and for
            weights that cannot be shared out.
    """
    if not dist.is_initialized() or config.shard == "none":
        return None
    packed = any(map(_packed, model.modules()))
    if config.shard != "auto" and (packed or config.weights == "bf16"):
        what, why, use = (
            ("lora.base nf4", "packed weights are not parameters", "lora.base: bfloat16") if packed else
            ("weights: bf16", "updates are rounded at random over whole matrices", "weights: float32")
        )  # fmt: skip
        raise ConfigError(
            f"train: {what} and shard: {config.shard} do not go together: {why}; use {use}, or shard: none"
        )
    if config.shard == "hybrid":
        local = environment_number("LOCAL_WORLD_SIZE", world.size)
        if local >= world.size or world.size % local:
            raise ConfigError(
                f"train: shard is hybrid, and {world.size} processes are not several machines with {local} each; use "
                "shard: full"
            )
        return "hybrid"
    if config.shard == "full":
        return "full"
    if world.size == 1 or packed or config.weights == "bf16":
        return None
    rows = config.batch // (config.accumulate * world.size)
    needed = state_bytes(model, config) + rows * activation_bytes(model.config, context, 4)
    return "full" if needed > _ROOM * memory else None


def state_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Bytes of weights, gradients, optimizer and copies of what is trained, as the forecast counts them."""
    beside = trained_bytes(model) + optimizer_bytes(model, config.optimizer) + copy_bytes(model, config)
    return weight_bytes(model) + beside


def gradients_fit(model: nn.Module, memory: int) -> bool:
    """Whether the gradients of all that is trained may be held whole, in float32, until the end of a step.
    memory: As in `choose_sharding`."""
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) < _HELD_BACK * memory


def least_memory(world: Processes) -> int:
    """The memory of the process that has least, by which all decide alike. All must call this together."""
    return int(min(world.gather(world.together(device_bytes))))


def device_bytes() -> int:
    """Memory of this process' GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory // max(1, environment_number("LOCAL_WORLD_SIZE", 1))


def _packed(module: nn.Module) -> bool:
    return type(module).__name__ == "Nf4Linear"


@dataclass
class Sharding:
    """A model whose weights are shared out. hold_back: add up gradients once a step, and not once a micro-batch."""

    model: Transformer
    hold_back: bool = False

    @property
    def modules(self) -> list[Any]:
        """What gathers its weights as one: each block, and the model without them."""
        return [*self.model.blocks, self.model]

    def begin_part(self, last: bool) -> None:
        """Before each micro-batch. last: of the step."""
        root: Any = self.model
        root.set_requires_gradient_sync(last or not self.hold_back)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, each process has all weights and computes on its own. All must enter and leave together."""
        modules = self.modules
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not self.model, recurse=False)
                module.reshard()

    def settle(self) -> None:
        """After passes without gradients: every parameter is a piece again."""
        for module in self.modules:
            module.reshard()

    @contextmanager
    def whole_weights(self, here: bool) -> Iterator[None]:
        """Inside, the model's parameters are whole, in memory of the CPU, to be written. All must enter together.

        here: Whether this process wants them.
        """
        self.settle()
        pieces = dict(self.model.named_parameters())
        for name, piece in pieces.items():
            tensor = whole(piece.detach())
            if here:
                _put(self.model, name, nn.Parameter(tensor.cpu(), requires_grad=piece.requires_grad))
        try:
            yield
        finally:
            if here:
                for name, piece in pieces.items():
                    _put(self.model, name, piece)


def share_out(
    model: Transformer, world: Processes, how: Sharded, precision: str, device: torch.device
) -> Sharding:  # fmt: skip
    """Shares a model's weights out over the processes, in place.

    Args:
        model: The first process' weights count; elsewhere they may be on the meta device.
        world: The processes, all of which call this.
        how: full or hybrid.
        precision: Of the forward pass; with "bf16" blocks are gathered in bfloat16. Sums of gradients are float32.
        device: Where the pieces go.

    Returns:
        What the loop needs.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh, policy = _mesh(world.size, how, device), MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    given = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(model, "hidden")
    if any(tensor.is_meta for tensor in given.values()):
        model.to_empty(device=device)
    _spread(model, given, world, device)
    sharding = Sharding(model)
    for module in sharding.modules:
        module.set_gradient_divide_factor(1.0)  # the loop divides, by what is supervised
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_all_gather(Gather())
        module.set_custom_reduce_scatter(Scatter())
    with sharding.gathered():  # memory for whole weights is first taken here, and not in inference mode
        pass
    return sharding


@torch.no_grad()
def _spread(model: Transformer, given: dict[str, Tensor], world: Processes, device: torch.device) -> None:
    """The first process' weights into the pieces of all, one tensor at a time."""
    for name, target in (*model.named_parameters(), *model.named_buffers()):
        sent = given.pop(name)
        sent = sent.to(device) if world.leads else torch.empty(sent.shape, dtype=sent.dtype, device=device)
        tensor = world.spread({name: sent.contiguous()}, device)[name]
        own(target).copy_(own(piece_like(tensor, target)))


def _mesh(size: int, how: Sharded, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if how == "full":
        return init_device_mesh(device.type, (size,))
    local = environment_number("LOCAL_WORLD_SIZE", size)
    return init_device_mesh(device.type, (size // local, local), mesh_dim_names=("replicate", "shard"))


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, last = name.rpartition(".")
    model.get_submodule(module).register_parameter(last, parameter)


class Gather:
    """FSDP2's gathering of weights, in which this process says that it waits for the others."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        with waiting():
            return _ALL_GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


class Scatter(Gather):
    """The same for the sums of gradients."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        with waiting():
            return _REDUCE_SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
