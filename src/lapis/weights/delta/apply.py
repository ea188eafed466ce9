"""Deltas added to a model: onto + sum of scale * difference, laid out and written as a graft is.

The chat model of a delta is there as far as headers, config and tokenizer go, so that everything that a graft proves is
proved here, too; what it adds comes from the file. An exact delta gives the bytes of the graft of the three models.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from lapis.checkpoint.towers import language_config
from lapis.errors import CheckpointError
from lapis.text.tokenizer.vocabulary import open_vocabulary
from lapis.weights.delta.file import DeltaFile, open_delta
from lapis.weights.delta.kin import check_descent
from lapis.weights.engine.job import MergeResult
from lapis.weights.engine.sources import RowsOf, Source, Stored
from lapis.weights.engine.tiles import Tile
from lapis.weights.graft.differences import Apply
from lapis.weights.graft.graft import write_graft
from lapis.weights.graft.layout import GraftPlan, ScaleLike, lay_out, listed, read_scales
from lapis.weights.matching import Model, counterparts, format_problems, open_models
from lapis.weights.options import Dtype, GraftOptions, KeepOrAdd

Delta = str | os.PathLike[str] | DeltaFile


def delta_apply(
    delta: Delta | Sequence[Delta],
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
    """Writes onto + scale * delta as a model folder. A killed run goes on where it stopped.

    Args:
        delta: What `delta_extract` wrote; several are added up.
        onto: The base of the deltas, or a continuation of it.
        out: A new folder.
        scale: As `graft` has it; one for all deltas, or one for each.
        embeddings: This and the options after it are those of `lapis.weights.options.GraftOptions`.
        check: As `graft` has it.
        progress: Called with (done, total) in bytes of output.

    Returns:
        What was done to the tensors, what was read and written, and notes.

    Raises:
        CheckpointError: For a delta that is damaged, newer, or of another base, and for all problems of the models.
        ConfigError: For an option that cannot be.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    options = GraftOptions(
        allow_unrelated, same_tokens, overwrite, allow_nonfinite, dry_run, dtype, embeddings, norms, template
    )
    result = write_graft(plan_apply(delta, onto, scale, options), out, "delta", options, check, progress)
    result.seconds = time.perf_counter() - started
    return result


def plan_apply(
    delta: Delta | Sequence[Delta],
    onto: Model,
    scale: ScaleLike | Sequence[ScaleLike] = 1.0,
    options: GraftOptions = GraftOptions(),  # noqa: B008
) -> GraftPlan:
    """Checks deltas and lays out what they add; the arguments are those of `delta_apply`.

    Raises:
        CheckpointError: With all problems at once.
        ConfigError: For an option that cannot be.
    """
    files = [each if isinstance(each, DeltaFile) else open_delta(each) for each in listed(delta)]
    scales, rows = read_scales(scale, len(files), "delta", options)
    roles = {"delta" if i == 0 else f"delta{i + 1}": file for i, file in enumerate(files)}
    model = open_models({"onto": onto}, "delta")["onto"]
    problems = _problems(roles, rows, options.allow_unrelated)
    if problems:
        raise CheckpointError(format_problems("delta", problems))
    models = {role: file.model for role, file in roles.items()}
    words = {role: file.words for role, file in roles.items()} | {"onto": open_vocabulary(model)}
    differences = FileDifferences(roles, {role: counterparts(model, each) for role, each in models.items()})
    if words["onto"] is None or words["delta"] is None:
        differences.template = []

    def related() -> tuple[list[str], list[str]]:
        for file in roles.values():
            file.check_bytes()
        seen = [check_descent(file, role, model, options.allow_unrelated) for role, file in roles.items()]
        return [line for lines, _ in seen for line in lines], [line for _, lines in seen for line in lines]

    plan = lay_out(models | {"onto": model}, words, differences, scales, rows, options, related)
    first = files[0].model
    apart = not language_config(first.config).get("tie_word_embeddings", True) and any(
        first.part(name).component == "head" for name in first.names
    )
    if apart and language_config(model.config).get("tie_word_embeddings"):
        plan.config["tie_word_embeddings"] = False
    read = {role: file.weights for role, file in roles.items()} | {"onto": model}
    return replace(plan, inputs=read, models={"onto": model})


def _problems(roles: Mapping[str, DeltaFile], embeddings: str, allow_unrelated: bool) -> list[str]:
    """What can be said before the model is looked at."""
    first, problems = next(iter(roles.values())), []
    for role, file in roles.items():
        if file.base_sha256 != first.base_sha256 and not allow_unrelated:
            ours, theirs = first.description["base"]["source"], file.description["base"]["source"]
            problems.append(
                f"{role} is of another base: {theirs} ({file.base_sha256[:16]}), delta is of {ours} "
                f"({first.base_sha256[:16]}); --allow-unrelated adds both all the same"
            )
        if embeddings == "add" and file.description.get("embeddings") != "add":
            problems.append(f"{role} ({file.source}) was made without embeddings; extract it with --embeddings add")
    return problems


class FileDifferences:
    """The differences of files, by onto's names (graft/differences.py).

    Args:
        files: By role.
        names: By role: onto's name of a tensor -> the delta's.
    """

    def __init__(self, files: Mapping[str, DeltaFile], names: Mapping[str, Mapping[str, str]]) -> None:
        self._files, self._names = files, names
        self.template = list(next(iter(files.values())).template)
        self._rows = {
            (role, name): _places(file, name)
            for role, file in files.items()
            for name, tensor in file.tensors.items()
            if tensor.rows is not None
        }
        known = [set(words.ids) if (words := file.words) else None for file in files.values()]
        self.shared = None if None in known else set.intersection(*(each for each in known if each is not None))

    def sources(self, name: str) -> tuple[Source, ...]:
        result: list[Source] = []
        for role, file in self._files.items():
            stored = self._names[role][name]
            if file.tensors[stored].code is None or file.tensors[stored].rows is not None:
                raise CheckpointError(f"delta: {role} ({file.source}) has no difference of {name}; extract it again")
            result.append(file.difference(role, stored))
        return tuple(result)

    def token_rows(self, name: str, tokens: Sequence[str | None]) -> tuple[Source, ...]:
        result: list[Source] = []
        for role, file in self._files.items():
            stored = self._names[role][name]
            if (role, stored) not in self._rows:
                raise CheckpointError(f"delta: {role} ({file.source}) has no rows of {name}; extract it again")
            places = self._rows[role, stored]
            rows = [-1 if token is None else places.get(token, -1) for token in tokens]
            result.append(RowsOf(file.difference(role, stored), rows))
        return tuple(result)

    def template_rows(self, name: str) -> tuple[Source, Mapping[str, int]]:
        role, file = next(iter(self._files.items()))
        tensor = file.tensors[self._names[role][name]]
        if not tensor.template:
            raise CheckpointError(f"delta: {role} ({file.source}) has no rows of {name}; extract it again")
        return Stored(role, file.weights, tensor.part("template")), {token: i for i, token in enumerate(self.template)}

    def apply(self, scales: Sequence[float]) -> Apply:
        return add_scaled(scales)


def _places(file: DeltaFile, name: str) -> dict[str, int]:
    """Token -> its row among those that a file has of a tensor."""
    tokens = file.words.tokens() if file.words else {}
    return {tokens[i]: row for row, i in enumerate(file.ids(name)) if i in tokens}


def add_scaled(scales: Sequence[float]) -> Apply:
    """The kernel onto + sum of scale * delta, for inputs onto, delta, delta2, ... in float32; rounded as a graft is."""
    first, *rest = scales

    def apply(tile: Tile, _state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        onto, delta, *more = tile.inputs
        if first != 1.0:
            delta.mul_(first)
        for other, scale in zip(more, rest, strict=True):
            delta.add_(other, alpha=scale)
        return torch.add(onto, delta, out=onto), delta

    return apply
