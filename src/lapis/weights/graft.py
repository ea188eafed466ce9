"""The chat vector: onto + scale * (chat - base), tensor by tensor, on disk (Huang et al., 2310.04799).

What is added: every tensor of the blocks, biases and unknown components included. What is not: norms (unless
norms="add") and what belongs to tokens. Embedding and head stay `onto`'s, for it has learned its own language's words,
except the rows of the chat template's tokens, which nobody trained in `onto`: these are `chat`'s, unscaled (the
published script takes the base's, and shrinks them). embeddings="add" adds the difference for the tokens that all models
share, matched by string. Rows that are padding stay, unless the template has tokens that `onto` lacks: these move in.

Everything is proved from headers, configs and tokenizers before a weight is read (graft_plan.py). Leaves out: building
a model, so the last proof, that the output talks, belongs to the caller (cli/graft.py).
"""

import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from lapis import __version__
from lapis.checkpoint.commit import check_output, commit
from lapis.checkpoint.store import INDEX
from lapis.weights.account import MergeResult, count, lost_in_all, write_account
from lapis.weights.carry import carry, write_json
from lapis.weights.graft_plan import GraftPlan, Model, ScaleLike, changed_config, plan_graft
from lapis.weights.journal import Journal
from lapis.weights.stream import Output, stream
from lapis.weights.tiles import TILE


def graft(
    base: Model,
    chat: Model | Sequence[Model],
    onto: Model,
    out: str | os.PathLike[str],
    scale: ScaleLike | Sequence[ScaleLike] = 1.0,
    embeddings: Literal["keep", "add"] = "keep",
    norms: Literal["keep", "add"] = "keep",
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes onto + scale * (chat - base) as a model folder at `out`.

    base, chat, onto: folders or opened checkpoints; several chats are stacked, each with its scale. scale: a number, a
    number per layers or components, or a YAML file (weights/scale.py). progress(done, total) is called in bytes.
    Computes in float32, rounds once to onto's dtype, resumes where a killed run of the same graft stopped.
    Raises CheckpointError with all problems of the inputs at once, OutputError where `out` cannot be written.
    """
    started = time.perf_counter()
    plan = plan_graft(base, chat, onto, scale, embeddings, norms)
    target = Path(out)
    folders = [checkpoint.root for checkpoint in plan.inputs.values()]
    needs = {"disk_bytes": plan.disk_bytes, "memory_bytes": plan.memory_bytes}
    result = MergeResult(
        str(out), count(plan.entries), needs=needs, vocabulary=plan.vocabulary, notes=plan.notes, dry_run=dry_run
    )
    if dry_run:
        check_output(Path(os.path.abspath(target)), overwrite=overwrite, inputs=folders)
        result.seconds = time.perf_counter() - started
        return result
    with commit(target, overwrite=overwrite, needs_bytes=plan.disk_bytes, inputs=folders, resumable=True) as staging:
        journal = Journal(staging.path, _job(plan, allow_nonfinite))
        try:
            account = stream(
                dict(plan.files), staging.path, journal, allow_nonfinite=allow_nonfinite, progress=progress
            )
        finally:
            journal.close()
        _write_beside(plan, staging.path)
        write_account(
            staging.path, "graft", plan.recipe, plan.inputs, plan.entries, account.figures, plan.notes,
            vocabulary=plan.vocabulary,
        )  # fmt: skip
        staging.digests.update(account.digests)
    result.bytes_read, result.bytes_written = account.bytes_read, account.bytes_written
    result.bytes_resumed = account.bytes_resumed
    result.lost_to_rounding = lost_in_all(account.figures)
    result.nonfinite = sum(seen.nonfinite for seen in account.figures.values())
    result.sha256 = staging.manifest_sha256
    result.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.seconds = time.perf_counter() - started
    return result


def write_index(folder: Path, files: Mapping[str, Sequence[Output]]) -> None:
    """model.safetensors.index.json for a model in several files."""
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    names = {output.name: file for file, outputs in files.items() for output in outputs}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def _write_beside(plan: GraftPlan, folder: Path) -> None:
    """Everything that is not a weight."""
    onto, words = plan.inputs["onto"], plan.words
    config = changed_config(onto.config, plan)
    chat, chat_words = plan.inputs["chat"], words["chat"]
    plan.notes += carry(
        onto, folder, chat=chat, words=words["onto"], chat_words=chat_words, config=config, new_tokens=plan.new_tokens
    )
    if onto.file(INDEX):
        write_index(folder, plan.files)


def _job(plan: GraftPlan, allow_nonfinite: bool) -> str:
    """A digest of all that decides the output's bytes: a journal of another job is not gone on with."""
    stamps = {}
    for role, checkpoint in plan.inputs.items():
        files = sorted({info.file for info in checkpoint.index.values()})
        stamps[role] = [checkpoint.digest(), [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]]
    everything = [__version__, TILE, plan.recipe, stamps, plan.vocabulary, allow_nonfinite]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
