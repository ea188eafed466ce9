"""The chat vector: onto + scale * (chat - base), tensor by tensor, on disk (Huang et al., 2310.04799).

What is added: every tensor of the blocks, biases and unknown components included. What is not: norms (unless
norms="add") and what belongs to tokens. Embedding and head stay `onto`'s, for it has learned its own language's words,
except the rows of the chat template's tokens, which nobody trained in `onto`: these are `chat`'s, unscaled (the
published script takes the base's, and shrinks them). embeddings="add" adds the difference for the tokens that all
models share, matched by string. Rows that are padding stay, unless the template has tokens that `onto` lacks: these
move in. Where `onto` is the one that was taught to chat, and the difference what somebody read, template="onto" leaves
it the rows of its template.

Everything is proved from headers, configs and tokenizers before a weight is read (layout.py). Leaves out: building
a model, so the last proof, that the output talks, belongs to the caller (cli/graft.py).
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from lapis.checkpoint.commit import check_output
from lapis.checkpoint.store import INDEX
from lapis.weights.engine.job import MergeResult, count, produce, write_account
from lapis.weights.engine.outputs import Account
from lapis.weights.graft.layout import GraftPlan, Model, ScaleLike, changed_config, plan_graft
from lapis.weights.tokenizer_files import carry, write_index


def graft(
    base: Model,
    chat: Model | Sequence[Model],
    onto: Model,
    out: str | os.PathLike[str],
    scale: ScaleLike | Sequence[ScaleLike] = 1.0,
    embeddings: Literal["keep", "add"] | None = None,
    norms: Literal["keep", "add"] = "keep",
    *,
    template: Literal["chat", "onto"] = "chat",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes onto + scale * (chat - base) as a model folder at `out`.

    base, chat, onto: folders or opened checkpoints; several chats are stacked, each with its scale. scale: a number, a
    number per layers or components, or a YAML file (scale.py). embeddings: None is keep, or what a plan in
    such a file says. template: whose rows the chat template's tokens have; onto where it is the one that can chat, and
    what is added is knowledge. progress(done, total) is called in bytes.
    Computes in float32, rounds once to onto's dtype, resumes where a killed run of the same graft stopped.
    Raises CheckpointError with all problems of the inputs at once, OutputError where `out` cannot be written.
    """
    started = time.perf_counter()
    plan = plan_graft(base, chat, onto, scale, embeddings, norms, template)
    needs = {"disk_bytes": plan.disk_bytes, "memory_bytes": plan.memory_bytes}
    result = MergeResult(
        str(out), count(plan.entries), needs=needs, vocabulary=plan.vocabulary, notes=plan.notes, dry_run=dry_run
    )
    if dry_run:
        folders = [checkpoint.root for checkpoint in plan.inputs.values()]
        check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=folders)
        result.seconds = time.perf_counter() - started
        return result

    def beside(folder: Path, account: Account) -> None:
        _write_beside(plan, folder)
        write_account(
            folder, "graft", plan.recipe, plan.inputs, plan.entries, account.figures, plan.notes,
            vocabulary=plan.vocabulary,
        )  # fmt: skip

    produce(
        result, plan.files, plan.inputs, [plan.recipe, plan.vocabulary], beside,
        overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=progress,
    )  # fmt: skip
    result.seconds = time.perf_counter() - started
    return result


def _write_beside(plan: GraftPlan, folder: Path) -> None:
    """Everything that is not a weight."""
    onto, words = plan.inputs["onto"], plan.words
    config = changed_config(onto.config, plan)
    talks = plan.recipe["template"]  # whose template it is: chat's or onto's
    chat, chat_words = plan.inputs[talks], words[talks]
    plan.notes += carry(
        onto, folder, chat=chat, words=words["onto"], chat_words=chat_words, config=config, new_tokens=plan.new_tokens
    )
    if onto.file(INDEX):
        write_index(folder, plan.files)
