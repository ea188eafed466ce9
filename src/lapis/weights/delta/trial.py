"""A delta beside the exact difference: base + delta and base + (chat - base) as models that are computed as read."""

import os
from dataclasses import replace

from lapis.checkpoint import Checkpoint
from lapis.weights.delta.apply import plan_apply
from lapis.weights.delta.file import open_delta
from lapis.weights.fuse.opening import computed_checkpoint
from lapis.weights.graft.graft import changed_config
from lapis.weights.graft.layout import plan_graft
from lapis.weights.matching import Model, open_models
from lapis.weights.options import GraftOptions


def trial_models(base: Model, chat: Model, delta: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    """(base + delta, base + (chat - base)), norms included; both speak as the chat model does. Nothing is written.

    Args:
        base: What the delta was extracted from.
        chat: Its chat version.
        delta: The folder.

    Raises:
        CheckpointError: Where one of them was changed since.
    """
    options = GraftOptions(allow_unrelated=True, same_tokens=True, norms="add")
    opened = open_models({"base": base, "chat": chat}, "delta")
    file, parent = open_delta(delta), opened["base"]
    plans = plan_apply(file, parent, 1.0, options), plan_graft(parent, opened["chat"], parent, 1.0, options)
    stored, exact = (
        replace(computed_checkpoint(parent, plan.files, file.root), config=changed_config(parent.config, plan))
        for plan in plans
    )
    return stored, exact
