"""The chat vector: onto + scale * (chat - base), tensor by tensor, on disk (Huang et al., 2310.04799).

What is added: every tensor of the blocks, biases and unknown components included. What is not: norms (unless
norms="add") and what belongs to tokens. Embedding and head stay `onto`'s, for it has learned its own language's words,
except the rows of the chat template's tokens, which nobody trained in `onto`: these are `chat`'s, unscaled (the
published script takes the base's, and shrinks them). embeddings="add" adds the difference for the tokens that all
models share, matched by string. Rows that are padding stay, unless the template has tokens that `onto` lacks: these
move in. Where `onto` is the one that was taught to chat, and the difference what somebody read, template="onto" leaves
it the rows of its template.

Everything is proved from headers, configs and tokenizers before a weight is read (layout.py). Leaves out: building
a model, so the last proof, that the output talks, is the caller's `check` (cli/graft.py).
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint.tensor_file import INDEX
from lapis.checkpoint.towers import change_language_config
from lapis.weights.account import count, write_account
from lapis.weights.config_fields import carried_config, settled_tie
from lapis.weights.engine.fp8 import without_quantization
from lapis.weights.engine.job import MergeResult, produce, with_dtype
from lapis.weights.engine.outputs import Account
from lapis.weights.graft.layout import GraftPlan, ScaleLike, plan_graft
from lapis.weights.matching import Model
from lapis.weights.options import Dtype, GraftOptions, KeepOrAdd
from lapis.weights.tokenizer_files import copy_tokenizer_files, write_index


def graft(
    base: Model,
    chat: Model | Sequence[Model],
    onto: Model,
    out: str | os.PathLike[str],
    scale: ScaleLike | Sequence[ScaleLike] = 1.0,
    embeddings: KeepOrAdd | None = GraftOptions.embeddings,
    norms: KeepOrAdd = GraftOptions.norms,
    *,
    template: Literal["chat", "onto"] = GraftOptions.template,
    allow_unrelated: bool = GraftOptions.allow_unrelated,
    same_tokens: bool = GraftOptions.same_tokens,
    dtype: Dtype | None = GraftOptions.dtype,
    overwrite: bool = GraftOptions.overwrite,
    allow_nonfinite: bool = GraftOptions.allow_nonfinite,
    dry_run: bool = GraftOptions.dry_run,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes onto + scale * (chat - base) as a model folder.

    Computes in float32 and rounds once, to onto's dtype or to `dtype`. Goes on where a killed run of the same graft
    stopped.

    Args:
        base: The model that chat was tuned from: a folder, a model of the hub, or an opened checkpoint.
        chat: Its chat version; the differences of several are stacked.
        onto: The continuation of base that is to chat.
        out: A new folder.
        scale: 1.0, or 0-7=0.5,8-23=1, or attn=1,mlp=0.5, or a YAML file; one for all chats, or one for each.
        embeddings: This and the options after it are those of `lapis.weights.options.GraftOptions`.
        check: Called with the folder when all of it is written and nothing can be seen yet; where it raises LapisError,
            nothing is kept.
        progress: Called with (done, total) in bytes of output; a method `source(role, done, total)` of it, where it has
            one, in bytes of each model that is read from a server.

    Returns:
        What was done to the tensors, what was read and written, and notes.

    Raises:
        CheckpointError: With all problems of the models at once.
        ConfigError: For an option that cannot be.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    options = GraftOptions(
        allow_unrelated, same_tokens, overwrite, allow_nonfinite, dry_run, dtype, embeddings, norms, template
    )
    result = write_graft(plan_graft(base, chat, onto, scale, options), out, "graft", options, check, progress)
    result.seconds = time.perf_counter() - started
    return result


def write_graft(
    plan: GraftPlan,
    out: str | os.PathLike[str],
    command: str,
    options: GraftOptions,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes what was laid out as a model folder; a dry run only checks the place.

    Args:
        plan: Of `plan_graft`, or of deltas (weights/delta/apply.py).
        out: A new folder.
        command: For the account.
        options: overwrite, allow_nonfinite and dry_run count here.
        check: As `graft` has it.
        progress: Called with (done, total) in bytes of output.
    """
    needs = {"disk_bytes": plan.disk_bytes, "memory_bytes": plan.memory_bytes}
    result = MergeResult(
        str(out), count(plan.entries), needs=needs, vocabulary=plan.vocabulary, notes=plan.notes,
        dry_run=options.dry_run,
    )  # fmt: skip

    def beside(folder: Path, account: Account) -> None:
        _write_beside(plan, folder)
        write_account(
            folder, command, plan.recipe, plan.inputs, plan.entries, account.figures, plan.notes,
            vocabulary=plan.vocabulary,
        )  # fmt: skip

    produce(
        result, plan.files, plan.inputs, [plan.recipe, plan.vocabulary], beside,
        overwrite=options.overwrite, allow_nonfinite=options.allow_nonfinite, check=check, progress=progress,
    )  # fmt: skip
    return result


def _write_beside(plan: GraftPlan, folder: Path) -> None:
    """Everything that is not a weight."""
    onto, words = plan.inputs["onto"], plan.words
    carried, dropped = carried_config(onto.config)
    config, untied = settled_tie(changed_config(carried, plan), plan.models)
    plan.notes += dropped + untied
    chat, chat_words = plan.spoken, words[plan.speaker]
    plan.notes += copy_tokenizer_files(
        onto, folder, chat=chat, words=words["onto"], chat_words=chat_words, config=config, new_tokens=plan.new_tokens
    )
    if onto.file(INDEX) or len(plan.files) > 1:
        write_index(folder, plan.files)


def changed_config(config: Mapping[str, Any], plan: GraftPlan) -> dict[str, Any]:
    """config.json of the output."""
    result = dict(config)
    if "quantization_config" in plan.config:
        result = without_quantization(result)
        result = with_dtype(result, "bfloat16")
    if (dtype := plan.recipe.get("dtype")) is not None:
        result = with_dtype(result, dtype)
    if "vocab_size" in plan.config:
        result = change_language_config(result, {"vocab_size": plan.config["vocab_size"]})
    return result
