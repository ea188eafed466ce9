"""A mixture of experts from models of one shape: `lapis merge` with merge_method: moe, streamed and resumable."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from lapis.checkpoint.commit import check_output
from lapis.checkpoint.tensor_file import INDEX
from lapis.errors import CheckpointError
from lapis.text.tokenizer.folder import write_json
from lapis.weights.account import count, write_account
from lapis.weights.engine.job import MergeResult, produce
from lapis.weights.engine.outputs import Account, disk_bytes
from lapis.weights.engine.tiles import THREADS, TILE
from lapis.weights.fuse.opening import open_each
from lapis.weights.matching import format_problems
from lapis.weights.merge.layout import sharded
from lapis.weights.merge.mixture.gates import StatesOf, gates_of, parallel_note
from lapis.weights.merge.mixture.layout import lay_out
from lapis.weights.merge.mixture.recipe import MixtureRecipe
from lapis.weights.tokenizer_files import copy_tokenizer_files, write_index


def merge_experts(
    recipe: MixtureRecipe,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    states: StatesOf | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes a mixture of experts as a model folder; the arguments are those of `merge`.

    Raises:
        ConfigError, CheckpointError: With all problems at once, before the work begins.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    inputs, refused = open_each({model: model for model in recipe.models})
    if refused:
        raise CheckpointError(format_problems("merge", [str(error) for error in refused.values()]))
    base = inputs[recipe.base]
    layout = lay_out(recipe, inputs)
    files = sharded(layout.outputs)
    largest = max(output.nbytes // output.dtype.itemsize for output in layout.outputs)
    whole = largest if any(output.kernel and output.kernel.whole for output in layout.outputs) else TILE
    needs = {"disk_bytes": disk_bytes(files), "memory_bytes": THREADS * max(TILE, whole) * 36}
    result = MergeResult(str(out), count(layout.entries), needs=needs, notes=layout.notes, dry_run=dry_run)
    digest = ""
    if not dry_run:
        check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=[each.root for each in inputs.values()])
        gates = gates_of(recipe, base, layout.shape.layers, layout.shape.dim, states)
        layout.notes += parallel_note(gates)
        digest = hashlib.sha256(gates.contiguous().numpy().tobytes()).hexdigest()
        files = sharded(layout.with_gates(gates))

    def beside(folder: Path, account: Account) -> None:
        notes = layout.notes + copy_tokenizer_files(base, folder)
        write_json(folder / "config.json", layout.config)
        (folder / INDEX).unlink(missing_ok=True)
        if len(files) > 1:
            write_index(folder, files)
        write_account(folder, "merge", recipe.written, inputs, layout.entries, account.figures, notes, seed=recipe.seed)
        result.notes = notes

    produce(
        result, files, inputs, [recipe.written, recipe.seed, recipe.dtype, digest], beside,
        overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=progress,
    )  # fmt: skip
    result.seconds = time.perf_counter() - started
    return result
