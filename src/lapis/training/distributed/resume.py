"""How the processes of a run come to one state: shared out or not, from a checkpoint or from the first of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint.commit import MANIFEST, inode, verify
from lapis.checkpoint.files import read_json
from lapis.errors import TrainingError
from lapis.model.transformer import Transformer
from lapis.training.config import TrainConfig
from lapis.training.distributed.parallel import Processes
from lapis.training.distributed.sharded_state import cut_checkpoint, has_shards, put_tensors, read_shards
from lapis.training.distributed.sharding import Sharding, choose_sharding, gradients_fit, least_memory, share_out
from lapis.training.loop.changes import completed, differences
from lapis.training.loop.progress import Watch
from lapis.training.loop.state import STATE, CheckpointJournal, TrainState, restore, restore_numbers, weights_digest
from lapis.training.objectives.objective import Objective
from lapis.training.optim.optimizers import Schedule
from lapis.training.setup import lora
from lapis.training.setup.probe import settled
from lapis.training.setup.select import describe


def earlier_run(
    model: Transformer, objective: Objective, config: TrainConfig, world: Processes, journal: CheckpointJournal | None,
    watch: Watch,
) -> tuple[dict[str, Any], dict[str, Any], Path | None]:  # fmt: skip
    """What this run must agree with, what an interrupted one recorded, and its newest checkpoint.

    Empty in all processes but the first. Raises TrainingError where that was another run, or the processes read
    different data.
    """
    description = json.loads(json.dumps(objective.describe()))
    if world.size > 1 and any(other != description for other in world.gather(description)):
        raise TrainingError("train: the processes of this run do not read the same data; give each the same files")
    if journal is None:
        while sent := world.from_lead(None):
            world.gather(_verify_share(world, Path(sent[0]), sent[1]))
        return {}, {}, None
    start = {"model": weights_digest(model), **describe(model)}
    identity = json.loads(json.dumps({"config": config.decisive(), **start, **description}))
    facts = journal.earlier(identity) or {}
    newest = journal.newest(partial(_verify_together, world)) if facts else None
    if newest is not None:
        numbers = read_json(newest / STATE)
        changes = differences(completed(numbers["facts"].get("wanted", {}), identity, []), identity)
        if numbers["cursor"] is not None:
            objective.check_changes({change.name: change.line for change in changes}, numbers["cursor"])
        journal.begin(facts)
    world.from_lead(None)
    for warning in journal.warnings:
        watch.note(f"train: {warning}")
    return identity, facts, newest


def _verify_together(world: Processes, folder: Path) -> list[str]:
    """The files of a checkpoint that are damaged, in the first process; each process reads a share of them."""
    if world.size == 1:
        return verify(folder)
    number = inode(folder / MANIFEST)
    world.from_lead([str(folder), number])
    doubtful = any(world.gather(_verify_share(world, folder, number)))
    return verify(folder) if doubtful else []  # what another one does not see, or finds damaged, may be on its own disk


def _verify_share(world: Processes, folder: Path, number: int | None) -> list[str]:
    """The same of this process' share. number: what tells that it is the first one's folder and no copy."""
    try:
        return verify(folder, (world.rank, world.size)) if inode(folder / MANIFEST) == number else [MANIFEST]
    except (OSError, ValueError, KeyError, TypeError):
        return [MANIFEST]


def shared_out(
    model: Transformer, objective: Objective, config: TrainConfig, world: Processes, facts: Mapping[str, Any],
    newest: Path | None, device: torch.device,
) -> Sharding | None:  # fmt: skip
    """Shares the state out over the processes, where the settings say so or it does not fit whole; else None.

    facts, newest: What `earlier_run` gives. device: Where the pieces go. Raises what `choose_sharding` does.
    """
    context, memory = min(objective.context, model.config.context), least_memory(world)
    how = world.together(lambda: choose_sharding(config, world, model, context, memory))
    if how is None:
        return None
    precision = world.from_lead(facts.get("precision") or settled(config, device)["precision"])
    if newest is not None and not has_shards(newest):
        lora.restore(model, newest)  # while its tensors are whole
    sharding = share_out(model, world, how, precision, device)
    sharding.hold_back = config.accumulate > 1 and gradients_fit(model, memory)
    return sharding


def go_on(state: TrainState, world: Processes, newest: Path | None, planned: Schedule | None = None) -> None:
    """Puts a checkpoint into the state of all processes, or the first one's state into that of the others.

    Args:
        state: As it is at the start of this run.
        world: The processes, all of which call this.
        newest: The checkpoint, in the first process; None where there is none. The weights of one that holds whole
            tensors are in a model that was shared out already.
        planned: The schedule to go on with, where it is not the checkpoint's.
    """
    if state.sharding is not None:
        place, cut = world.from_lead([str(newest), has_shards(newest)] if newest else [None, False])
        if place is not None:
            if cut:
                world.together(lambda: put_tensors(state, read_shards(state, Path(place))))
            else:
                put_tensors(state, cut_checkpoint(state, world, newest))
    elif newest is not None and has_shards(newest):
        put_tensors(state, read_shards(state, newest))
    elif newest is not None:
        restore(state, newest)
    if newest is not None and (state.sharding is not None or has_shards(newest)):
        restore_numbers(state, newest)
    state.schedule = planned or state.schedule
    if world.size > 1:
        _take_over(state, world)


def _take_over(state: TrainState, world: Processes) -> None:
    """Copies the first process' place, and what every process holds whole."""
    tensors = {}
    if state.sharding is None:
        world.spread(dict(state.model.state_dict()), state.device)
        tensors = world.spread(state.optimizers.tensors(), state.device)
    of_objective = world.spread(state.objective.state_tensors(), state.device)
    numbers = [state.step, state.cursor, state.seconds, state.tokens, asdict(state.schedule), state.log]
    state.step, state.cursor, state.seconds, state.tokens, shape, state.log = world.from_lead(numbers)
    state.guard.restore(world.from_lead(state.guard.to_json()))  # all judge a step alike
    evaluations = world.from_lead(state.evaluations())
    if world.leads:
        return
    weights = state.best.weights, state.within.weights
    state.take_evaluations(evaluations)
    state.best.weights, state.within.weights = weights
    state.schedule = Schedule(**shape)
    if state.sharding is None:
        state.optimizers.restore(tensors)
    if of_objective:
        state.objective.restore_tensors(of_objective)
