"""The chat vector: onto + scale * (chat - base), tensor by tensor, on disk (Huang et al., 2310.04799).

What is added: every tensor of the blocks, biases and unknown components included, whose shapes agree. What is not:
norms (unless norms="add") and what belongs to tokens. Embedding and head stay `onto`'s, for it has learned its own
language's words, except the rows of the chat template's tokens, which nobody trained in `onto`: these are `chat`'s,
unscaled (the published script takes the base's, and shrinks them). embeddings="add" adds the difference for the tokens
that all models share, matched by string. Rows that are padding stay.

Everything is proved from headers, configs and tokenizers before a weight is read. Leaves out: building a model, so the
last proof, that the output talks, belongs to the caller (cli/graft.py).
"""

import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lapis import __version__
from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.checkpoint.commit import check_output, commit
from lapis.checkpoint.files import header_bytes
from lapis.checkpoint.store import INDEX, torch_dtype
from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Part
from lapis.weights.account import Entry, MergeResult, count, lost_in_all, write_account
from lapis.weights.carry import carry, write_json
from lapis.weights.checks import check_configs, check_tensors, check_vocabularies, embedding_rows, told
from lapis.weights.journal import Journal
from lapis.weights.pairs import counterparts
from lapis.weights.parts import is_norm, is_vocabulary
from lapis.weights.scale import Scale, read_scale
from lapis.weights.sources import Rows, Source, Stored, columns_of, read_rows
from lapis.weights.stream import Kernel, Output, stream
from lapis.weights.tiles import THREADS, TILE, Tile
from lapis.weights.vocabulary import Vocabulary, open_vocabulary, relation, rows_for, template_tokens

Model = str | os.PathLike[str] | Checkpoint
ScaleLike = float | str | Path | Mapping[str, Any] | Scale


@dataclass
class GraftPlan:
    """What a graft will do, proved from headers alone."""

    files: dict[str, list[Output]]
    entries: list[Entry]
    inputs: dict[str, Checkpoint]
    recipe: dict[str, Any]
    words: dict[str, Vocabulary | None]
    vocabulary: dict[str, Any]
    notes: list[str]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        heads = sum(len(header_bytes({o.name: ("U8", o.shape) for o in f}, {})) for f in self.files.values())
        return sum(output.nbytes for outputs in self.files.values() for output in outputs) + heads + (32 << 20)

    @property
    def memory_bytes(self) -> int:
        """The bound on buffers: it does not depend on the model's size."""
        inputs = max((len(o.sources) for outputs in self.files.values() for o in outputs), default=1)
        return THREADS * TILE * (4 * inputs + 20)


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
        onto_model, chats = plan.inputs["onto"], _chats(plan.inputs)
        plan.notes += carry(
            onto_model,
            staging.path,
            chat=chats[0],
            words=plan.words["onto"],
            chat_words=plan.words["chat"],
            config=plan.config,
        )
        if onto_model.file(INDEX):
            write_index(staging.path, plan.files)
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


def plan_graft(
    base: Model,
    chat: Model | Sequence[Model],
    onto: Model,
    scale: ScaleLike | Sequence[ScaleLike] = 1.0,
    embeddings: str = "keep",
    norms: str = "keep",
) -> GraftPlan:
    """Checks a graft and lays it out. Reads headers, configs and tokenizers; tells all problems at once."""
    for option, value in (("embeddings", embeddings), ("norms", norms)):
        if value not in ("keep", "add"):
            raise ConfigError(f'graft: {option} is "{value}"; give keep or add')
    chats = _listed(chat)
    scales = [read_scale(each) for each in _listed(scale)]
    if len(scales) == 1:
        scales *= len(chats)
    if len(scales) != len(chats) or not chats:
        raise ConfigError(f"graft: {len(chats)} chat models and {len(scales)} scales; give one scale, or one for each")
    inputs = {"base": _opened(base)}
    inputs |= {"chat" if i == 0 else f"chat{i + 1}": _opened(each) for i, each in enumerate(chats)}
    inputs["onto"] = _opened(onto)
    words = {role: open_vocabulary(checkpoint) for role, checkpoint in inputs.items()}
    problems, notes = check_configs(inputs)
    for role, checkpoint in inputs.items():
        notes += [f"{role}: {note}" for note in checkpoint.notes]
    parts = {name: inputs["onto"].part(name) for name in inputs["onto"].names}
    problems += [line for each in scales for line in each.problems(parts.values())]
    layout = _Layout(inputs, words, scales, embeddings, norms, parts)
    problems += check_vocabularies(inputs, words, layout.template, embeddings)
    problems += check_tensors(inputs, {n: layout.fate(n) for n in parts})
    if problems:
        raise CheckpointError(told("graft", problems))
    files, entries = layout.files(), layout.entries
    if not layout.template:
        blind = [role for role, vocabulary in words.items() if vocabulary is None]
        why = f"no tokenizer.json in {', '.join(blind)}" if blind else "chat's template has no tokens of its own"
        notes.append(f"no rows of template tokens were taken from chat: {why}")
    recipe = {
        "scale": [s.to_json() for s in scales] if len(scales) > 1 else scales[0].to_json(),
        "embeddings": embeddings,
        "norms": norms,
    }
    return GraftPlan(files, entries, inputs, recipe, words, layout.vocabulary(), notes)


class _Layout:
    """The output's tensors, in onto's files and order."""

    def __init__(
        self,
        inputs: dict[str, Checkpoint],
        words: dict[str, Vocabulary | None],
        scales: list[Scale],
        embeddings: str,
        norms: str,
        parts: dict[str, Part],
    ) -> None:
        self.inputs, self.words, self.scales, self.parts = inputs, words, scales, parts
        self.embeddings, self.norms, self.onto = embeddings, norms, inputs["onto"]
        self.chats = [role for role in inputs if role.startswith("chat")]
        own, base, chat = words["onto"], words["base"], words["chat"]
        self.template = template_tokens(chat, base) if own and chat else []
        self.entries: list[Entry] = []
        self._tokens = embedding_rows(self.onto)
        self._names = {role: counterparts(self.onto, checkpoint) for role, checkpoint in inputs.items()}

    def fate(self, name: str) -> str:
        """merge, keep: (norm) or rows: (vocabulary), or zero: (its scales are 0)."""
        part, shape = self.parts[name], self.onto.info(name).shape
        if is_vocabulary(part) and shape and shape[0] == self._tokens:
            return "rows"
        if is_norm(part) and self.norms == "keep":
            return "keep"
        return "merge" if any(scale.of(part) for scale in self.scales) else "zero"

    def files(self) -> dict[str, list[Output]]:
        result: dict[str, list[Output]] = {}
        for file, header in self.onto.headers.items():
            ordered = sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end))
            result[file] = [self._output(name) for name, _ in ordered]
        taken = {(s.role, s.name) for outputs in result.values() for o in outputs for s in o.sources}
        taken |= {("chat", self._names["chat"].get(name, "")) for name in self.parts if self.fate(name) == "rows"}
        for role in ("base", *self.chats):
            for name in self.inputs[role].names:
                if (role, name) not in taken:
                    self.entries.append(Entry(name, "skipped", self._unused(role, name), role=role))
        return result

    def _output(self, name: str) -> Output:
        info, part, fate = self.onto.info(name), self.parts[name], self.fate(name)
        dtype = torch_dtype(info.dtype) or torch.uint8
        own = Stored("onto", self.onto, name)
        scales = [scale.of(part) for scale in self.scales]
        if fate == "rows":
            return self._rows(name, own)
        if fate != "merge":
            why = "norms are kept" if fate == "keep" else "its scale is 0"
            self.entries.append(Entry(name, "copied", why))
            return Output(name, dtype, info.shape, (own,))
        self.entries.append(Entry(name, "merged", scale=scales if len(scales) > 1 else scales[0]))
        others = tuple(self._stored(role, name) for role in ("base", *self.chats))
        return Output(name, dtype, info.shape, (own, *others), Kernel(add_difference(scales)))

    def _rows(self, name: str, own: Stored) -> Output:
        """Embedding or head: onto's rows, chat's rows for the template's tokens, a difference where it is asked for."""
        scales = [scale.of(self.parts[name]) for scale in self.scales]
        words, rows = self.words["onto"], own.shape[0]
        patch = None
        if words and self.template:
            patch = _TemplateRows(
                self._stored("chat", name),
                {words.ids[token]: self.words["chat"].ids[token] for token in self.template if token in words.ids},  # type: ignore[union-attr]
                columns_of(own.shape),
            )
        reason = (
            f"embeddings are kept, but {len(patch.rows)} rows of the template are chat's"
            if patch
            else "embeddings are kept"
        )
        if self.embeddings == "keep" or not any(scales):
            self.entries.append(Entry(name, "copied", reason))
            return Output(name, own.dtype, own.shape, (own,), patch=patch)
        assert words is not None
        tokens = words.tokens()
        roles = ("base", *self.chats)
        shared = set(tokens.values()).intersection(*(self.words[role].ids for role in roles))  # type: ignore[union-attr]
        listed = [tokens.get(row) if tokens.get(row) in shared else None for row in range(rows)]
        others = tuple(
            Rows(role, self.inputs[role], self._stored(role, name).name, rows_for(listed, self.words[role]))  # type: ignore[arg-type]
            for role in roles
        )
        reason = f"{sum(token is not None for token in listed):,} shared tokens of {rows:,} rows"
        self.entries.append(Entry(name, "merged", reason, scales if len(scales) > 1 else scales[0]))
        return Output(name, own.dtype, own.shape, (own, *others), Kernel(add_difference(scales), rows=True), patch)

    def _stored(self, role: str, name: str) -> Stored:
        return Stored(role, self.inputs[role], self._names[role][name])

    def _unused(self, role: str, name: str) -> str:
        part = self.inputs[role].part(name)
        if is_vocabulary(part):
            return "embeddings are kept"
        if is_norm(part) and self.norms == "keep":
            return "norms are kept"
        return "its scale is 0" if name in self.parts else "onto has no such tensor"

    def vocabulary(self) -> dict[str, Any]:
        own = self.words["onto"]
        if own is None:
            return {}
        result: dict[str, Any] = {
            f"onto_to_{role}": relation(own, other) for role in ("base", *self.chats) if (other := self.words[role])
        }
        return result | {"tokens": len(own.ids), "template_tokens": self.template}


class _TemplateRows:
    """Overwrites the rows of the template's tokens with chat's, in the output's dtype and otherwise untouched."""

    def __init__(self, source: Source, rows: dict[int, int], columns: int) -> None:
        self.rows, self._columns = dict(sorted(rows.items())), columns
        self._source = source
        self._values: torch.Tensor | None = None

    def __call__(self, first: int, last: int, values: torch.Tensor) -> None:
        width = self._columns
        for i, row in enumerate(self.rows):
            start, end = max(row * width, first), min((row + 1) * width, last)
            if start < end:
                if self._values is None:
                    self._values = read_rows(self._source, list(self.rows.values()))
                values[start - first : end - first] = self._values[i, start - row * width : end - row * width]


def add_difference(scales: Sequence[float]) -> Callable[[Tile, Any], tuple[torch.Tensor, torch.Tensor]]:
    """The kernel onto + sum of scale * (chat - base), for inputs onto, base, chat, chat2, ... in float32."""
    first, *rest = scales

    def apply(tile: Tile, _state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        onto, base, chat, *more = tile.inputs
        delta = chat.sub_(base)
        if first != 1.0:
            delta.mul_(first)
        for other, scale in zip(more, rest, strict=True):
            delta.add_(other.sub_(base), alpha=scale)
        return torch.add(onto, delta, out=base), delta

    return apply


def write_index(folder: Path, files: Mapping[str, Sequence[Output]]) -> None:
    """model.safetensors.index.json for a model in several files."""
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    names = {output.name: file for file, outputs in files.items() for output in outputs}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _opened(model: Model) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _chats(inputs: Mapping[str, Checkpoint]) -> list[Checkpoint]:
    return [checkpoint for role, checkpoint in inputs.items() if role.startswith("chat")]


def _job(plan: GraftPlan, allow_nonfinite: bool) -> str:
    """A digest of all that decides the output's bytes: a journal of another job is not gone on with."""
    stamps = {
        role: [
            checkpoint.digest(),
            [
                [str(i.file), (s := i.file.stat()).st_size, s.st_mtime_ns]
                for i in {i.file: i for i in checkpoint.index.values()}.values()
            ],
        ]
        for role, checkpoint in plan.inputs.items()
    }
    everything = [__version__, TILE, plan.recipe, stamps, plan.vocabulary, allow_nonfinite]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
