"""How to compute a step fastest on this machine, and whether it fits into its memory.

Both are measured on small batches, without a trace in the run: the seconds of a step with several threads and
precisions, and the bytes that a token keeps for the backward pass. On a CPU a process that takes too much is killed, so
the refusal comes before. Leaves out: what exists for a moment within one operation.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lapis.config import environment_number
from lapis.errors import TrainingError
from lapis.model.size import activation_bytes, free_memory
from lapis.model.threads import choose_threads, thread_counts, threads
from lapis.model.transformer import Transformer
from lapis.training.config import TrainConfig
from lapis.training.loop.progress import Watch, live
from lapis.training.loop.state import TrainState
from lapis.training.loop.update import out_of_memory_named
from lapis.training.objectives.objective import SMALL_BATCH, Objective
from lapis.training.objectives.supervised.next_token import summed_cross_entropy
from lapis.training.optim.footprint import optimizer_size
from lapis.training.optim.muon import hidden_matrices
from lapis.training.setup.blocks import TooSlow, autocast, compiled, compiler_failed, stoppable
from lapis.training.setup.remedies import either, for_a_step, for_the_state
from lapis.wording import format_count

Precision = Literal["float32", "bf16"]
Compile = Literal["auto", "on", "off"]
Compute = Callable[[], Tensor]

_FEW = 64  # tokens of the first measurement, which decides whether SMALL_BATCH can be afforded
_PASSES = 12  # at most: four ways, three times each
SECONDS = 10.0  # for all measuring, compiling apart
_MEMORY_SECONDS = 5.0  # for measuring memory

# the share of a step that compiling the blocks may save, and the seconds that it takes, on the safe side
_GAIN = {"cpu": 0.1, "cuda": 0.3}
_COST = {"cpu": 60.0, "cuda": 60.0}


@dataclass
class Probe:
    """Measures forward and backward of a small batch. Gradients are dropped and random generators put back, so that a
    run is the same whether it was measured or not.

    Args:
        model: What is trained.
        compute: The loss of a small batch; it must not advance the data.
        rounds: How often a way is measured, after one time that warms up.
        budget: Seconds for all measuring. When they are spent, the best way so far is taken.
        share: How many small batches a micro-batch of the run is.
    """

    model: Transformer
    compute: Compute
    rounds: int = 2
    budget: float = SECONDS
    share: float = 1.0
    spent: float = field(default=0.0, init=False)

    def seconds(self, count: int, precision: str, limit: float = math.inf) -> float:
        """The shortest of `rounds` with so many threads; infinite where even the first takes more than `limit`, or than
        what is left of the budget."""
        device = next(self.model.parameters()).device
        times: list[float] = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), threads(count):
            while len(times) <= self.rounds and self.spent < self.budget:
                start = time.perf_counter()
                try:
                    with stoppable(self.model, min(limit, self.budget - self.spent)):
                        with autocast(device, precision):
                            loss = self.compute()
                        loss.backward()  # type: ignore[no-untyped-call]
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
                    times.append(time.perf_counter() - start)
                except TooSlow:
                    break
                finally:
                    self.spent += time.perf_counter() - start
                    self.model.zero_grad(set_to_none=True)
        return min(times[1:] or times or [math.inf])

    def fastest(self, precision: str, count: int) -> tuple[int, Precision, float | None]:
        """Threads and precision with the shortest time, and that time in seconds.

        Args:
            precision: "auto" is to be chosen.
            count: 0 is to be chosen.

        Returns:
            The seconds are None where there was nothing to choose, or no time to measure it.
        """
        device = next(self.model.parameters()).device
        counts = [count] if count else thread_counts() if device.type == "cpu" else [torch.get_num_threads()]
        precisions: list[Precision] = ["bf16" if precision == "bf16" else "float32"]
        if precision == "auto":  # a CPU without instructions for bfloat16 may take many times as long
            precisions = ["float32", "bf16"] if device.type == "cpu" else ["bf16", "float32"]
        ways = [(n, each) for each in precisions for n in counts]
        if len(ways) == 1:
            return *ways[0], None
        best, chosen = math.inf, ways[0]
        for way in ways:
            # the first time also warms up, so it may be slow; what takes three times the best is slower than that. Half
            # of what is left is kept for other ways: threads of a busy machine wait long for each other
            seconds = self.seconds(*way, limit=min(3 * best, (self.budget - self.spent) / 2))
            if seconds < best:
                best, chosen = seconds, way
        return *chosen, best if math.isfinite(best) else None

    def compiling_pays(
        self, mode: Compile, count: int, precision: str, parts: int, budget: float | None
    ) -> tuple[bool, str | None]:
        """Whether to compile the blocks.

        Args:
            mode: "auto" estimates from the time of a micro-batch and the length of the run, then tries.
            count: Threads.
            precision: Of the forward pass.
            parts: Micro-batches of the run, where their number is known.
            budget: Else its seconds.

        Returns:
            The answer, and a sentence that says why where it was measured.
        """
        if mode == "off":
            return False, None
        if mode == "on":
            self._seconds_compiled(count, precision)
            return True, None
        kind = next(self.model.parameters()).device.type
        least = 2 * _COST.get(kind, 60.0) / _GAIN.get(kind, 0.1)  # seconds of a run that make it worth a try
        if parts < 100 if budget is None else budget < least:
            return False, None
        plain = self.seconds(count, precision)
        if not math.isfinite(plain) or (budget is None and plain * self.share * parts < least):
            return False, None
        try:
            faster = self._seconds_compiled(count, precision)
        except TrainingError as error:
            return False, str(error)
        line = f"a small batch takes {faster * 1000:,.0f} ms compiled, {plain * 1000:,.0f} ms as it is"
        return faster < 0.97 * plain, line

    def _seconds_compiled(self, count: int, precision: str) -> float:
        """Raises TrainingError where the blocks do not compile (no C++ compiler, for one)."""
        try:
            with compiled(self.model, True):
                return replace(self, budget=math.inf).seconds(count, precision)
        except (torch.OutOfMemoryError, TrainingError):
            raise
        except Exception as error:
            raise compiler_failed(error) from None


def measure_speed(state: TrainState, config: TrainConfig, watch: Watch) -> dict[str, Any]:
    """How a step is computed, as configured or as measured on a small batch.

    Returns:
        threads, precision, compile; and where it was measured seconds_per_token, roughly.

    Raises:
        TrainingError: Where a step does not fit into memory.
    """
    model, objective = state.model, state.objective
    live(watch).stage("measuring how to compute a step")

    def compute(tokens: int) -> Compute:
        small: list[Any] = []

        def loss() -> Tensor:
            if not small:
                with torch.no_grad():
                    small.append(objective.small_batch(model, state, tokens))
            return objective.loss(model, small[0])[0]

        return loss

    with out_of_memory_named(state, config):
        likely = "float32" if state.device.type == "cpu" else "bf16"
        require_room(state, objective, config, likely if config.precision == "auto" else config.precision)
        tokens, probe = _FEW, Probe(model, compute(_FEW), budget=SECONDS / 2)
        count, precision, seconds = probe.fastest(config.precision, config.threads)
        if seconds is not None and seconds * SMALL_BATCH / _FEW * _PASSES < SECONDS / 2:
            tokens, probe = SMALL_BATCH, Probe(model, compute(SMALL_BATCH), budget=SECONDS / 2)
            count, precision, seconds = probe.fastest(config.precision, config.threads)
        probe.share = max(1.0, state.rows * objective.tokens_per_row / tokens)
        parts = (state.schedule.total or 0) * config.accumulate
        budget = config.minutes * 60 if config.minutes else None
        mode = config.compile if objective.compiles else "off"
        compile_, why = probe.compiling_pays(mode, count, precision, parts, budget)
    if seconds is not None:
        threads = format_count(count, "thread")
        watch.note(f"train: computes with {threads} in {precision}: the fastest on {tokens} tokens")
    if why:
        watch.note(f"train: compile is {'on' if compile_ else 'off'}: {why}")
    state.optimizers.clear()
    facts: dict[str, Any] = {"threads": count, "precision": precision, "compile": compile_}
    return facts if seconds is None else {**facts, "seconds_per_token": seconds / tokens}


def threads_of_begin(model: Transformer, objective: Objective, config: TrainConfig) -> AbstractContextManager[None]:
    """Those with which an objective computes before the steps are measured."""
    device = next(model.parameters()).device
    if not objective.computes_first or device.type != "cpu":
        return nullcontext()
    return threads(config.threads or choose_threads(device))


def settled(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """How a step is computed where nothing is measured, as each process would measure something else."""
    local = environment_number("LOCAL_WORLD_SIZE", 1)
    count = max(1, (os.cpu_count() or 1) // local) if device.type == "cpu" else torch.get_num_threads()
    precision = config.precision if config.precision != "auto" else "float32" if device.type == "cpu" else "bf16"
    return {"threads": config.threads or count, "precision": precision, "compile": config.compile == "on"}


def training_speed(model: Transformer, threads: int = 0, precision: str = "auto") -> float:
    """Tokens per second that this machine trains, roughly: forward and backward of a small batch of random tokens.

    Args:
        model: Whose parameters need gradients.
        threads: 0 takes the fastest number.
        precision: "auto" takes the faster one.
    """
    device, length = next(model.parameters()).device, min(SMALL_BATCH, model.config.context)
    ids_BT = torch.randint(model.config.vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(device)

    def compute() -> Tensor:
        return summed_cross_entropy(model, model.hidden(ids_BT).flatten(0, 1), ids_BT.flatten())

    probe = Probe(model, compute)
    count, chosen, seconds = probe.fastest(precision, threads)
    if seconds is None:  # nothing to choose, or the machine is so busy that the budget was spent on choosing
        seconds = replace(probe, budget=math.inf).seconds(count, chosen)
    return length / seconds


def require_room(state: TrainState, objective: Objective, config: TrainConfig, precision: str) -> None:
    """Raises TrainingError with what helps where gradients, optimizer, copies and a micro-batch exceed what is free,
    of which each process of this machine has its share.

    Measures only where a generous estimate comes near, and says nothing where that takes too long.
    """
    sharing = environment_number("LOCAL_WORLD_SIZE", 1) if state.device.type == "cpu" else 1
    free = available(state.device) // sharing
    trained = state.optimizers.parameters
    matrices = sum(p.nbytes for p in hidden_matrices(state.model))
    whole = sum(p.nbytes for p in trained)
    later = config.best + bool(config.limits)  # an average is there already
    held = whole * (1 + later) + optimizer_size(config.optimizer, matrices, whole - matrices)
    what = "gradients, optimizer and copies" if later else "gradients and optimizer"
    shape = state.model.config
    length = min(shape.context, objective.context)
    if held + state.rows * activation_bytes(shape, length, 4) < free / 2:
        return
    with torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []):
        try:
            with stoppable(state.model, _MEMORY_SECONDS):
                (less, few), (more, many) = (
                    _saved(state, objective, precision, tokens) for tokens in (SMALL_BATCH // 8, SMALL_BATCH // 4)
                )
        except TooSlow:
            return
    per_token = (more - less) / (many - few) if many > few else more / many
    step = int(max(0.0, less - per_token * few) + per_token * state.rows * objective.tokens_per_row)
    if held + step <= free:
        return
    smaller = for_a_step(config, state.rows)
    ways = smaller if step > held else for_the_state(config, state.model) or smaller
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    raise TrainingError(
        f"train: a step needs about {(held + step) / 1e9:.1f} GB ({step / 1e9:.1f} GB for "
        f"{format_count(state.rows, 'row')}, {held / 1e9:.1f} GB for {what}) and {free / 1e9:.1f} GB "
        f"are free{each}; {either(ways)}"
    )


def available(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine or its container."""
    if device.type == "cuda":
        in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + in_reserve
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
