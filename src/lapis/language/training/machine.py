"""What an adaptation finds out about the machine, once: how fast it trains, and in how many parts a step has room.

Both stay in plan.yaml, so that a run that goes on later is the same run, however busy the machine is then.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lapis.config import load_yaml
from lapis.generation.ready import choose_device
from lapis.language.plan import PLAN, AdaptPlan, whole_path
from lapis.model.check import read_config
from lapis.model.load import load
from lapis.model.size import activation_bytes, measure
from lapis.training.setup.probe import available, training_speed

_HELD = 4  # float32 numbers for each parameter: its weight, its gradient and two of AdamW
_MEMORY = {"accumulate", "checkpointing"}  # settings of a training by which somebody has chosen already


def with_earlier_measures(plan: AdaptPlan, out: Path, note: Callable[[str], None]) -> AdaptPlan:
    """The plan with what an earlier call of the same adaptation has found out, where it does not say so itself; without
    it where the plan has another model, or a batch that does not divide so, for plan.yaml holds both."""
    if not (out / PLAN).is_file():
        return plan
    before = load_yaml(out / PLAN)
    speed, train = before.get("tokens_per_second"), before.get("train")
    parts = train.get("accumulate") if isinstance(train, dict) else None
    models = {name: before.get(name) for name in ("base", "chat")}
    models = {name: whole_path(value) if isinstance(value, str) else value for name, value in models.items()}
    is_other = before.get("onto") != plan.onto or models != {"base": plan.base, "chat": plan.chat}
    sizes = [name for name in ("context", "batch") if before.get(name) != getattr(plan, name)]
    if is_other and plan.tokens_per_second is not None and plan.tokens_per_second == speed:
        note(f"tokens_per_second: {speed:,g} is of another model; it is measured anew")
        plan = replace(plan, tokens_per_second=None)
    if "batch" in sizes and isinstance(parts, int) and plan.train.get("accumulate") == parts and plan.batch % parts:
        note(f"accumulate: batch {plan.batch} does not divide into {parts} parts; the number is chosen anew")
        plan = replace(plan, train={name: value for name, value in plan.train.items() if name != "accumulate"})
    if is_other or sizes:
        return plan
    if plan.tokens_per_second is None and isinstance(speed, (int, float)) and speed > 0:
        plan = replace(plan, tokens_per_second=float(speed))
    if not _MEMORY & plan.train.keys() and isinstance(parts, int):
        plan = replace(plan, train={**plan.train, "accumulate": parts})
    return plan


def with_measures(plan: AdaptPlan) -> AdaptPlan:
    """The plan with what it does not say, measured: `tokens_per_second`, to three digits, and `accumulate`.

    Rows of a step are computed in so many parts that a part fits into half of the free memory, beside the weights and
    what is kept for each. The result is the same.
    """
    if plan.tokens_per_second is None:
        threads, precision = plan.train.get("threads", 0), plan.train.get("precision", "auto")
        speed = training_speed(load(plan.source, torch.float32).train(), threads, precision)
        plan = replace(plan, tokens_per_second=float(f"{speed:.3g}"))
    if not _MEMORY & plan.train.keys():
        plan = replace(plan, train={**plan.train, "accumulate": _parts(plan)})
    return plan


def _parts(plan: AdaptPlan) -> int:
    config = read_config(plan.source)
    device = plan.train.get("device", "auto")
    free = available(choose_device(None if device == "auto" else device)) / 2
    row = activation_bytes(config, min(plan.context, config.context), torch.float32.itemsize)
    most = max(1, int(free - _HELD * torch.float32.itemsize * measure(config).total) // row)
    return next(parts for parts in range(1, plan.batch + 1) if plan.batch % parts == 0 and plan.batch // parts <= most)
