"""One run in several processes, as torchrun starts them: each computes its share of a step; they add up gradients.

    torchrun --nproc-per-node 2 -m lapis train run.yaml

A step has accumulate x size micro-batches in one stream, and rank r computes the micro-batches r, r + size, ... Model
and most objectives know nothing of it (policies need `own_parts` and `sum_over_processes`). gloo on CPUs, NCCL for
gradients on GPUs; besides tensors, processes send each other JSON. One that dies, is stopped, or computes without an
end ends all (liveness.py).
Leaves out: sharing out the weights (sharding.py), processes that come and go.
"""

import datetime
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lapis.config import environment_number
from lapis.errors import ConfigError, LapisError, OutputError, TrainingError
from lapis.training.distributed.forward import waiting
from lapis.training.distributed.liveness import ProcessWatch, meet, watch_processes

T = TypeVar("T")

_BUCKET = 1 << 23  # elements added up in one message
_SHORT = 2000  # bytes that most messages fit into
_BROKEN = re.compile("gloo|NCCL|[Cc]onnection (closed|reset)")
_PATIENCE = datetime.timedelta(hours=2)  # for the others while one process saves or evaluates
_watches: list[ProcessWatch] = []  # over the processes: none, or one, which belongs to torch's one process group


class StepLeft(BaseException):
    """Another process has left the step, for a stop or a fault, before it was whole; what it says comes at the step's
    end. Not an Exception, so that no code in between takes it for a fault of its own."""


class Processes:
    """The processes of a run: this one's rank of size. With size 1 every method is the plain thing, at no cost."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Everybody's `value` (JSON), in the order of ranks."""
        if self.size == 1:
            return [value]
        sent = json.dumps(value).encode()
        with self._connection():
            received = self._all_gather(len(sent).to_bytes(8, "big") + sent[:_SHORT], 8 + _SHORT)
            lengths = [int.from_bytes(part[:8], "big") for part in received]
            if max(lengths) > _SHORT:
                received = [b"-" * 8 + part for part in self._all_gather(sent, max(lengths))]
        return [json.loads(part[8 : 8 + length]) for part, length in zip(received, lengths, strict=True)]

    def gather_within(self, value: Any) -> list[Any]:
        """`gather` in the midst of a step. Raises StepLeft where another process is at the end of it already."""
        received = self.gather({"within": value})
        if not all("within" in each for each in received):
            raise StepLeft
        return [each["within"] for each in received]

    def gather_at_end(self, value: Any) -> list[Any]:
        """`gather` when the step is over for this process, be it whole or left; those that wait for this one in the
        midst of it (`gather_within`) are told so, and come here, too."""
        received = self.gather({"end": value})
        while not all("end" in each for each in received):
            received = self.gather({"end": value})
        return [each["end"] for each in received]

    def _all_gather(self, sent: bytes, size: int) -> list[bytes]:
        own = torch.frombuffer(bytearray(sent.ljust(size, b" ")), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [part.numpy().tobytes() for part in parts]

    def from_lead(self, value: Any) -> Any:
        """The first process' `value` (JSON)."""
        return self.gather(value if self.leads else None)[0]

    def together(self, act: Callable[[], T]) -> T:
        """`act()` in every process. An error in one is an error of all, and is shown once."""
        if self.size == 1:
            return act()
        result, error = None, None
        try:
            result = act()
        except LapisError as raised:
            error = raised
        self.raise_once(self.gather(error is not None), error)
        return result  # type: ignore[return-value]

    def raise_once(self, failed: list[bool], error: LapisError | None) -> None:
        """Ends all processes where one failed. The lowest rank that failed raises its error, the others are silent."""
        if any(failed):
            for watch in _watches:
                watch.all_know()
            if error is not None and failed.index(True) == self.rank:
                raise error
            leave()

    def add_up(self, parameters: Sequence[Tensor], without_gradient: Collection[int]) -> None:
        """Gradients become their sum over all processes, in place; one that is missing counts as zero.

        without_gradient: the numbers of parameters that have none in any process.
        """
        if self.size == 1:
            return
        with self._connection():
            for number, parameter in enumerate(parameters):
                if parameter.grad is None and number not in without_gradient:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in parameters if p.grad is not None]
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat)
                place = 0
                for gradient in bucket:
                    gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
                    place += gradient.numel()

    def spread(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The first process' tensors, everywhere. Those that are here already are filled in place."""
        if self.size == 1:
            return dict(tensors)
        shapes = self.from_lead({n: [list(t.shape), str(t.dtype), t.device.type] for n, t in tensors.items()})
        result = {}
        with self._connection():
            for name, (shape, dtype, kind) in shapes.items():
                there = tensors.get(name)
                if there is None:
                    there = torch.empty(
                        shape,
                        dtype=getattr(torch, dtype.removeprefix("torch.")),
                        device=device if kind != "cpu" else "cpu",
                    )
                sent = there.detach().contiguous()
                dist.broadcast(sent, 0)
                if sent.data_ptr() != there.data_ptr():
                    there.detach().copy_(sent)
                result[name] = there
        return result

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within a computation, too, a process that died shows as a broken connection; other errors are left alone."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or _BROKEN.search(str(error))):
                raise
            self._end_after(error)

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """A process that died shows as a broken connection in the others."""
        try:
            with waiting():
                yield
        except RuntimeError as error:
            self._end_after(error)

    def _end_after(self, error: RuntimeError) -> NoReturn:
        if any(watch.is_over() for watch in _watches):
            leave()
        if not self.leads and not any(watch.is_first_alive() for watch in _watches):
            leave()
        again = "run the same command again"
        for watch in _watches:
            watch.broken, again = True, watch.again()
        raise TrainingError(
            f"train: another process of this run has ended; {again} ({str(error).splitlines()[0][:100]})"
        ) from None


def leads() -> bool:
    """Whether this process is the one that writes, also before it joins the others and after it left them."""
    return environment_number("RANK", 0) == 0


def leave() -> NoReturn:
    """Ends this process with a failure that another one shows."""
    raise SystemExit(1)


@contextmanager
def errors_end_all(last_good: Callable[[], Path | None]) -> Iterator[None]:
    """A LapisError that leaves this block ends the other processes, too, and they say nothing, be it theirs as well.

    last_good: The newest checkpoint, for whoever tells that another process has ended, or that a disk is full.
    """
    for watch in _watches:
        watch.last_good = last_good
    try:
        yield
    except LapisError as error:
        if not all(watch.end_others() for watch in _watches):
            leave()
        newest = last_good() if type(error) is OutputError else None  # one that is in use is another run's
        if newest is None or str(newest) in str(error):
            raise
        raise OutputError(f"{error}; the last good checkpoint is {newest}") from None


def join() -> Processes:
    """The processes that torchrun started together (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or this one alone.

    Raises TrainingError where they cannot meet: the port is in use, or a process is missing.
    """
    if dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    size, rank = environment_number("WORLD_SIZE", 1), environment_number("RANK", 0)
    if size <= 1 or "RANK" not in os.environ:
        return Processes()
    if not 0 <= rank < size:
        raise ConfigError(f"train: RANK is {rank} and WORLD_SIZE {size}; torchrun sets them, unset both to run alone")
    host, port = os.environ.get("MASTER_ADDR", ""), environment_number("MASTER_PORT", 29500)
    if not host:
        raise ConfigError("train: RANK is set and MASTER_ADDR is not; torchrun sets both, unset RANK to run alone")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(environment_number("LOCAL_RANK", 0))
    try:
        store, turn = meet(rank, size, host, port)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        _watches.append(watch_processes(rank, size, host, port, turn))
    except (RuntimeError, ValueError) as error:
        if rank != 0:
            leave()
        used = "EADDRINUSE" in str(error) or "already in use" in str(error).lower()
        why = "the port is in use" if used else f"the processes cannot meet ({str(error).splitlines()[0][:120]})"
        raise TrainingError(f"train: {host}:{port}: {why}; give torchrun another port: --master-port N") from None
    return Processes(dist.get_rank(), dist.get_world_size())


def disconnect() -> None:
    """Closes the connections, so that the process ends without a warning."""
    if dist.is_initialized():
        while _watches:
            _watches.pop().stop()
        dist.destroy_process_group()


def check_shares(batch: int, accumulate: int, size: int) -> None:
    """Raises ConfigError where a step's rows do not divide over the processes, with the numbers of them that do."""
    each = batch // accumulate  # rows of a part, which a process computes alone or shares
    if each % size:
        works = [count for count in range(1, each + 1) if each % count == 0]
        near = [*[count for count in works if count < size][-1:], *[count for count in works if count > size][:1]]
        parts = accumulate * size
        raise ConfigError(
            f"train: batch {batch} does not divide over {size} processes (accumulate {accumulate}); start "
            f"{' or '.join(map(str, near))} of them, or give batch={-(-batch // parts) * parts}, to which an "
            "interrupted run changes with --allow-change batch"
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """torch's generators for a step of a process that is not the first: a function of the three, so never saved."""
    mixed = (seed * 1_000_003 + step) * 65_537 + rank
    torch.manual_seed(mixed % 2**63)


def own_parts(parts: int) -> list[int]:
    """The micro-batches of a step that this process computes: rank, rank + size, ..."""
    world = join()
    return list(range(world.rank, parts, world.size))


def sum_over_processes(sums: Tensor) -> Tensor:
    """The vector, summed over all processes; every process must call this within a step. Raises StepLeft where one has
    left it."""
    world = join()
    if world.size == 1:
        return sums
    shares = torch.tensor(world.gather_within(sums.tolist()), dtype=sums.dtype, device=sums.device)
    return shares.sum(0)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    room = _BUCKET
    for gradient in gradients:
        if bucket and (gradient.numel() > room or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, room = [], _BUCKET
        bucket.append(gradient)
        room -= gradient.numel()
    if bucket:
        yield bucket
