"""An adapter added to its base: W + scale * B A, tensor by tensor, on disk (Hu et al. 2021, section 4).

Computed in float32 and rounded once, to the base's dtype or to `dtype`. Peak memory is a few tiles and one adapter.
Bases of which only quantized weights are there are refused; what an adapter adds would be lost in their rounding.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.adapter import WEIGHTS, open_adapter
from lapis.checkpoint.commit import check_output, sha256_of
from lapis.checkpoint.files import contained
from lapis.checkpoint.opening import base_of
from lapis.checkpoint.store import Adapter
from lapis.checkpoint.tensor_file import INDEX
from lapis.errors import CheckpointError
from lapis.text.tokenizer.folder import (
    TOKENIZER_FILES,
    copy_templates,
    eos_ids,
    read_object,
    read_templates,
    write_json,
)
from lapis.weights.account import count, write_account
from lapis.weights.checks import missing_tensors
from lapis.weights.engine.job import MergeResult, produce
from lapis.weights.engine.outputs import Account
from lapis.weights.fuse.layout import FuseLayout, refuse_quantized
from lapis.weights.matching import format_problems
from lapis.weights.merge.layout import sharded
from lapis.weights.options import Dtype
from lapis.weights.tokenizer_files import copy_tokenizer_files, write_index

GENERATION = "generation_config.json"


def fuse(
    adapter: Adapter | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes the base with the adapter added as a model folder. A killed run of the same fuse goes on where it stopped.

    Args:
        adapter: An adapter folder, or an adapter of the hub.
        out: A new folder.
        base: In place of the model that the adapter names.
        dtype: Of the weights that are written; None keeps the base's.
        overwrite: Replace a folder at `out`.
        allow_nonfinite: Count NaN and Inf instead of stopping.
        progress: Called with bytes done and bytes in all.

    Raises:
        CheckpointError: For an adapter that does not fit its base, or a base of 4-bit weights.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    adapter = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    onto = base_of(adapter, base, remedy="give --base, the model that it was trained on")
    target = None if dtype is None else getattr(torch, dtype)
    refuse_quantized(onto, adapter)
    if problems := missing_tensors({"base": onto}):
        raise CheckpointError(format_problems("fuse", problems))
    FuseLayout(adapter, onto, target).outputs()  # all that headers can show, before a weight of the hub is fetched
    onto = onto.fetched()
    layout = FuseLayout(adapter, onto, target)
    files = sharded(layout.outputs())
    inputs = {"base": onto, "adapter": adapter.weights}
    check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=[adapter.root, onto.root])
    disk = sum(output.nbytes for outputs in files.values() for output in outputs)
    result = MergeResult(str(out), count(layout.entries), needs={"disk_bytes": disk}, notes=layout.notes)
    recipe: dict[str, Any] = {"method": "dora" if adapter.dora else "lora", "rank": adapter.config["r"],
                              "alpha": adapter.config["lora_alpha"], "modules": len(adapter.pairs)}  # fmt: skip
    if dtype is not None:
        recipe["dtype"] = dtype

    def beside(folder: Path, account: Account) -> None:
        layout.notes += copy_tokenizer_files(onto, folder, config=layout.config)
        _write_speech(adapter, onto, folder)
        (folder / INDEX).unlink(missing_ok=True)
        if len(files) > 1:
            write_index(folder, files)
        write_account(folder, "fuse", recipe, inputs, layout.entries, account.figures, layout.notes)

    # the adapter is read in a piece, so what it holds is a part of the job and no input that is compared tile by tile
    settings = [adapter.config, sha256_of(contained(adapter.root, WEIGHTS))]
    produce(
        result, files, inputs, [recipe, settings, layout.config], beside,
        overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=progress,
    )  # fmt: skip
    result.seconds = time.perf_counter() - started
    return result


def _write_speech(adapter: Adapter, onto: Checkpoint, folder: Path) -> None:
    """The adapter's own tokenizer and template, which it was trained with; generation settings of both.

    A folder's templates hold whole: the adapter's where it has any, else the base's. Sampling settings are the base's,
    and generation ends where either of the two says.
    """
    for name in (*TOKENIZER_FILES, "preprocessor_config.json"):
        if (path := adapter.weights.file(name)) is not None:
            shutil.copyfile(path, folder / name)
    copy_templates(adapter.root if read_templates(adapter.root) else onto.beside(), folder)
    own, theirs = read_object(adapter.root, GENERATION), onto.json(GENERATION) or {}
    if not own:
        return
    merged = {**own, **theirs}
    ends = [*eos_ids(theirs, GENERATION), *eos_ids(own, adapter.root / GENERATION)]
    if ends := list(dict.fromkeys(ends)):
        merged["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(folder / GENERATION, merged)
