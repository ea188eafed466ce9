"""chat - base as a file: each tensor's difference in the bits that were asked for, and all that makes a model chat.

What is stored: the difference of every tensor of the blocks, norms and biases included; of the rows of tokens the chat
model's own for its template's tokens, as a graft takes them, and with embeddings="add" the difference of every row that
changed; template, tokenizer, end tokens and generation settings. Nothing of another tower. An exact delta holds the
float32 difference that a graft computes, to the last bit, so that applying it needs no base and gives a graft's bytes.

Leaves out: applying (apply.py), how numbers are stored (codes/), what lies beside (beside.py).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from lapis import __version__
from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import MANIFEST, check_output, commit, sha256_of
from lapis.checkpoint.sharing import SharedJob, finish, process_count
from lapis.checkpoint.staging import JOURNAL, JobName, Staging, staging_of
from lapis.checkpoint.tensor_file import DELTA, dtype_name
from lapis.errors import CheckpointError, LapisError
from lapis.text.chat.template_tokens import template_tokens
from lapis.text.tokenizer.vocabulary import Vocabulary, open_vocabulary
from lapis.weights.account import identity
from lapis.weights.checks import check_configs, check_parents, check_same_tokens, check_tensors, check_vocabularies
from lapis.weights.delta.adapter import write_adapter
from lapis.weights.delta.beside import card_license, write_beside
from lapis.weights.delta.codes.code import Code, Shape, code_for
from lapis.weights.delta.codes.factors import EXACT, error_bound
from lapis.weights.delta.file import FORMAT, SAMPLE, VERSION, as_part, open_delta, part_bytes
from lapis.weights.delta.kin import digest_of, take_sample
from lapis.weights.delta.ranks import encode_together, join_pieces
from lapis.weights.delta.writing import Item, ItemFigures, Written, figures_or_longest, write_items
from lapis.weights.engine.fp8 import is_scale
from lapis.weights.engine.job import JobResult, input_files, job_name
from lapis.weights.engine.journal import Journal
from lapis.weights.engine.ranks import forget_alone
from lapis.weights.engine.sources import RowsOf, Stored, columns_of, read_rows
from lapis.weights.engine.tiles import TILE, Reader, each, spans
from lapis.weights.matching import Model, counterparts, embedding_rows, format_problems, is_vocabulary, open_models
from lapis.weights.options import Bits, ExtractOptions, KeepOrAdd
from lapis.wording import format_count

_PLANES = 0.75  # of the model: what an exact delta takes at most, so far


@dataclass
class DeltaResult(JobResult):
    """What `delta_extract` returns.

    Attributes:
        bits: exact, 8, 4 or 1; None where there is a rank.
        rank: Of the factors.
        bytes: Of the file of differences.
        model_bytes: Of the chat model's weights.
        relative_error: |stored - exact| / |exact| over all tensors.
        errors: The same for each tensor, with its code and |exact| / |base|.
    """

    bits: str | None = None
    rank: int | None = None
    bytes: int = 0
    model_bytes: int = 0
    relative_error: float | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)
    template_tokens: list[str] = field(default_factory=list)
    check: dict[str, Any] | None = None


def delta_extract(
    base: Model,
    chat: Model,
    out: str | os.PathLike[str],
    bits: Bits | int | None = None,
    rank: int | None = None,
    *,
    peft: bool = ExtractOptions.peft,
    embeddings: KeepOrAdd = ExtractOptions.embeddings,
    license: str | None = ExtractOptions.license,
    allow_unrelated: bool = ExtractOptions.allow_unrelated,
    same_tokens: bool = ExtractOptions.same_tokens,
    overwrite: bool = ExtractOptions.overwrite,
    allow_nonfinite: bool = ExtractOptions.allow_nonfinite,
    dry_run: bool = ExtractOptions.dry_run,
    progress: Callable[[int, int], None] | None = None,
) -> DeltaResult:
    """Writes chat - base as a folder that `delta_apply` adds to a model. A killed run goes on where it stopped.

    Args:
        base: The model that chat was tuned from: a folder, a model of the hub, or an opened checkpoint.
        chat: Its chat version.
        out: A new folder.
        bits: "exact", 8, 4 or 1. This and the options after it are those of `lapis.weights.options.ExtractOptions`.
        rank: In place of bits.
        progress: Called with (done, total) in bytes of the chat model.

    Returns:
        Sizes, errors, and notes.

    Raises:
        CheckpointError: With all problems of the models at once, and for NaN and Inf.
        ConfigError: For an option that cannot be.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    options = ExtractOptions(
        allow_unrelated, same_tokens, overwrite, allow_nonfinite, dry_run,
        bits if bits is None else str(bits), rank, peft, embeddings, license,  # type: ignore[arg-type]
    )  # fmt: skip
    plan = _Plan(open_models({"base": base, "chat": chat}, "delta"), options)
    tensors = {"stored": len(plan.shapes), "tokens": len(plan.vocabulary), "skipped": plan.skipped}
    result = DeltaResult(
        str(out), tensors, needs={"disk_bytes": plan.disk_bytes}, notes=plan.notes, dry_run=dry_run, bits=options.bits,
        rank=options.rank, model_bytes=plan.chat.nbytes, template_tokens=plan.template,
    )  # fmt: skip
    folders = [checkpoint.root for checkpoint in plan.inputs.values()]
    if dry_run:
        check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=folders)
        return result
    settings = {key: value for key, value in asdict(options).items() if key not in ("overwrite", "dry_run")}
    named = {key: value for key, value in settings.items() if key != "allow_nonfinite"}  # what stopped it is allowed
    place, named_job, key = Path(os.path.abspath(out)), job_name(plan.inputs, named), plan.digest(settings)

    def complete(staging: Staging, written: Written) -> None:
        description = json.loads(plan.metadata(written.figures)["delta"])
        plan.notes += write_beside(plan.chat, description, staging.path)
        if options.peft:
            plan.notes += write_adapter(open_delta(staging.path), staging.path, plan.base_ids())

    if process_count() > 1 or (staging_of(place) / JOURNAL / "plan.json").is_file():
        written = _extract_together(plan, place, named_job, key, complete, options, progress)
    else:
        with commit(
            place, kind="delta", job=named_job, overwrite=overwrite, needs_bytes=plan.disk_bytes, inputs=folders,
            resumable=True,
        ) as staging:  # fmt: skip
            journal = Journal(staging, key, input_files(plan.inputs))
            try:
                written = write_items(
                    plan.items, staging.path, journal, plan.metadata, allow_nonfinite=allow_nonfinite, progress=progress
                )
            finally:
                journal.close()
            complete(staging, written)
    held = open_delta(place)
    if seen := written.figures:  # empty in a process that came when others had done all
        delta_sq = sum(each.delta_sq for each in seen.values())
        result.relative_error = sqrt(sum(each.error_sq for each in seen.values()) / delta_sq) if delta_sq else 0.0
    result.errors = [
        {
            "name": item.name, "code": item.code.name, "relative_error": held.tensors[item.name].relative_error,
            "relative_norm": held.tensors[item.name].relative_norm,
        }
        for item in plan.items
        if item.code and item.name in held.tensors
    ]  # fmt: skip
    result.base = held.to_json()["base"]
    result.bytes = (place / DELTA).stat().st_size
    sealed = sha256_of(place / MANIFEST)
    result.record(written.bytes_read, written.bytes_written, written.bytes_resumed, sealed)
    result.seconds = time.perf_counter() - started
    return result


def _extract_together(
    plan: "_Plan",
    out: Path,
    named: JobName,
    key: str,
    complete: Callable[[Staging, Written], None],
    options: ExtractOptions,
    progress: Callable[[int, int], None] | None,
) -> Written:
    """The file by all processes that run this command; one of them commits, and all return when that is done."""
    stamps = json.dumps([key, input_files(plan.inputs)], default=str)
    folders = [checkpoint.root for checkpoint in plan.inputs.values()]
    inputs = [identity(plan.base)["headers_sha256"], identity(plan.chat)["headers_sha256"]]

    def finished() -> bool:
        try:
            held = open_delta(out).to_json()
        except LapisError:
            return False
        same = [held["base"]["headers_sha256"], held["chat"]["headers_sha256"]] == inputs
        return process_count() > 1 and same and (held["bits"], held["rank"]) == (options.bits, options.rank)

    job = SharedJob(out, "delta", named, hashlib.sha256(stamps.encode()).hexdigest(), None, forget_alone, finished)

    def seal(staging: Staging) -> None:
        complete(staging, join_pieces(job.journal, plan.items, plan.metadata, staging.path))

    if finished():
        return Written({}, 0, 0, 0)
    check_output(out, overwrite=options.overwrite, inputs=folders)
    written = encode_together(job, plan.items, allow_nonfinite=options.allow_nonfinite, progress=progress)
    finish(job, seal, overwrite=options.overwrite, inputs=folders)
    return written or Written({}, 0, 0, 0)


class _Plan:
    """What is stored, proved from headers, configs and tokenizers; a sample of the weights is read."""

    def __init__(self, inputs: dict[str, Checkpoint], options: ExtractOptions) -> None:
        self.inputs, self.options = inputs, options
        self.base, self.chat = inputs["base"], inputs["chat"]
        self.words: dict[str, Vocabulary | None] = {role: open_vocabulary(model) for role, model in inputs.items()}
        self.names = counterparts(self.chat, self.base)
        self.rows = embedding_rows(self.chat)
        self.fates = {name: self._fate(name) for name in self.chat.names}
        self.notes: list[str] = []
        self._check()
        own = self.words["chat"]
        self.template = template_tokens(own, self.words["base"]) if own else []
        self.shapes = {name: self.chat.info(name).shape for name, fate in self.fates.items() if fate == "merge"}
        self.vocabulary = [name for name, fate in self.fates.items() if fate == "rows"]
        self.skipped = len(self.fates) - len(self.shapes) - len(self.vocabulary)
        self.items = [self._difference(name) for name in self.shapes]
        self.items += [self._tokens(name) for name in self.vocabulary]
        self.license = options.license or card_license(self.chat)
        matrices = {item.name: item.sources[0] for item in self.items if item.digested and len(item.shape) > 1}
        blocks = {n: s for n, s in matrices.items() if isinstance(s, Stored) and self.chat.part(n).layer is not None}
        self.sample, numbers = take_sample(blocks)
        extra = {SAMPLE[1:]: ("BF16", tuple(numbers.shape), as_part(numbers.bfloat16()))}
        self.items.append(Item("", extra=extra))
        self._tell_bound()

    @property
    def disk_bytes(self) -> int:
        total = 64 << 20
        for item in self.items:
            total += sum(len(data) for _, _, data in item.extra.values())
            if item.code:
                parts = item.code.parts(item.shape)
                total += part_bytes(parts)
                size = item.sources[1].dtype.itemsize
                total += (
                    int(_PLANES * size * torch.Size(item.shape).numel()) if parts.get("", ("", ()))[1] is None else 0
                )
        return total * (2 if self.options.peft else 1)

    def digest(self, settings: Mapping[str, Any]) -> str:
        """Of all that decides the file's bytes besides the values of the models."""
        digests = {role: checkpoint.digest() for role, checkpoint in self.inputs.items()}
        text = json.dumps([__version__, TILE, settings, digests, self.metadata(None)], sort_keys=True)
        total = hashlib.sha256(text.encode())
        for item in self.items:
            total.update(f"{item.name} {item.shape} {item.code} {[s.name for s in item.sources]}\n".encode())
            for part, (dtype, shape, data) in item.extra.items():
                total.update(f"{part} {dtype} {shape}\n".encode() + data)
        return total.hexdigest()

    def metadata(self, figures: Mapping[str, ItemFigures] | None) -> dict[str, str]:
        """The file's __metadata__; for None the longest that it can be."""
        digest = "0" * 64
        if figures is not None:
            sources = {i.name: s for i in self.items if i.digested and isinstance(s := i.sources[0], Stored)}
            digest = digest_of(sources, {name: figures[name].sha256 for name in sources})
        tensors = {}
        for item in self.items:
            if not item.name:
                continue
            entry: dict[str, Any] = {
                "shape": list(self.chat.info(item.name).shape), "dtype": self._dtype(item.name),
                "code": item.code.name if item.code else None,
            }  # fmt: skip
            if "ids" in item.extra:
                entry["rows"] = item.shape[0]
            if "template" in item.extra:
                entry["template"] = True
            if item.code:
                entry |= figures_or_longest(figures[item.name] if figures else None)
            tensors[item.name] = entry
        own = self.words["chat"]
        tokens = own.tokens() if own else {}
        description = {
            "lapis": __version__,
            "bits": self.options.bits,
            "rank": self.options.rank,
            "embeddings": self.options.embeddings,
            "base": identity(self.base) | {"weights_sha256": digest},
            "chat": identity(self.chat),
            "license": self.license,
            "template_tokens": self.template,
            "end_tokens": [tokens[i] for i in (own.ends if own else ()) if i in tokens],
            "sample": self.sample,
            "tensors": tensors,
        }
        return {"format": FORMAT, "version": str(VERSION), "delta": json.dumps(description, ensure_ascii=False)}

    def base_ids(self) -> list[int] | None:
        """The rows of the template's tokens in the base, where they are those that chat has; else None."""
        own, theirs = self.words["chat"], self.words["base"]
        if own is None or theirs is None:
            return None
        ids = [own.ids[token] for token in self.template]
        return ids if ids == [theirs.ids.get(token) for token in self.template] else None

    def _check(self) -> None:
        inputs, options = self.inputs, self.options
        problems, self.notes = check_configs(inputs, "chat")
        for role, checkpoint in inputs.items():
            self.notes += [f"{role}: {note}" for note in checkpoint.notes]
        problems += check_vocabularies(inputs, self.words)
        problems += check_tensors(inputs, self.fates, "chat")
        unread = [role for role in inputs if self.words[role] is None]
        if unread and options.embeddings == "add":
            problems.append(f"no tokenizer.json in {', '.join(unread)}; embeddings can be told by token string only")
        problems += [f'{name} has a ":" in its name, which parts of a delta have' for name in self.fates if ":" in name]
        more, lines = check_same_tokens(inputs, self.words, options.same_tokens)
        problems, self.notes = problems + more, self.notes + lines
        if not problems:
            problems, lines = check_parents([("base", self.base, "chat", self.chat)], options.allow_unrelated)
            self.notes += lines
        if not problems and "merge" not in self.fates.values():
            problems = [f"{self.chat.source} holds no tensor that a difference could be taken of"]
        if problems:
            raise CheckpointError(format_problems("delta", problems))

    def _fate(self, name: str) -> str:
        if name in self.chat.towers.others:
            return "tower"
        if is_scale(self.chat, name):
            return "scales"
        shape = self.chat.info(name).shape
        return "rows" if is_vocabulary(self.chat.part(name)) and shape and shape[0] == self.rows else "merge"

    def _dtype(self, name: str) -> str:
        return dtype_name(Stored("chat", self.chat, name).dtype)

    def _code(self, name: str, shape: Shape) -> Code:
        return code_for(self.options.bits or "", self.options.rank, self._dtype(name), shape)

    def _difference(self, name: str) -> Item:
        sources = Stored("base", self.base, self.names[name]), Stored("chat", self.chat, name)
        shape = sources[1].shape
        return Item(name, shape, self._code(name, shape), sources, digested=True)

    def _tokens(self, name: str) -> Item:
        """A tensor of tokens: rows of the template's tokens, and the difference of those that changed."""
        chat, own, base_words = Stored("chat", self.chat, name), self.words["chat"], self.words["base"]
        extra: dict[str, tuple[str, Shape, bytes]] = {}
        if self.template and own:
            rows = read_rows(chat, [own.ids[token] for token in self.template])
            if not self.options.allow_nonfinite and not bool(torch.isfinite(rows.float()).all()):
                raise CheckpointError(f"{name} in chat holds NaN or Inf in the rows of the template's tokens")
            extra["template"] = dtype_name(chat.dtype), (len(self.template), *chat.shape[1:]), as_part(rows)
        if self.options.embeddings == "keep" or own is None or base_words is None:
            return Item(name, extra=extra)
        base = Stored("base", self.base, self.names[name])
        pairs = sorted(
            (i, base_words.ids[token]) for token, i in own.ids.items()
            if token in base_words.ids and i < chat.shape[0] and base_words.ids[token] < base.shape[0]
        )  # fmt: skip
        sources = RowsOf(base, [pair[1] for pair in pairs]), RowsOf(chat, [pair[0] for pair in pairs])
        places = _differing(*sources)
        ids = torch.tensor([pairs[i][0] for i in places], dtype=torch.int32)
        extra = {"ids": ("I32", (len(places),), as_part(ids)), **extra}
        shape = (len(places), *chat.shape[1:])
        sources = RowsOf(base, [pairs[i][1] for i in places]), RowsOf(chat, [pairs[i][0] for i in places])
        self.notes.append(f"{name}: {len(places):,} of {len(pairs):,} shared rows changed")
        return Item(name, shape, self._code(name, shape), sources, extra)

    def _tell_bound(self) -> None:
        rank = self.options.rank
        large = [item for item in self.items if item.code and item.code.name == "low-rank" and min(item.shape) > EXACT]
        if rank and large:
            bound = max(error_bound(item.shape, rank) for item in large)
            self.notes.append(
                f"{format_count(len(large), 'matrix', 'matrices')} of more than {EXACT:,} rows and columns "
                f"{'is' if len(large) == 1 else 'are'} factored by random projection: "
                f"their error is at most {bound:.2f} times the best one of rank {rank} in expectation"
            )


def _differing(one: RowsOf, other: RowsOf) -> list[int]:
    """Which rows of two sources differ."""
    columns = columns_of(one.shape)
    every = spans(one.shape, rows=True)
    seen: dict[int, list[int]] = {}

    def compare(reader: Reader, span: tuple[int, int]) -> None:
        a, b = (values.view(-1, columns) for values in reader.read("", (one, other), *span, one.shape).inputs)
        seen[span[0]] = ((a != b).any(1).nonzero().flatten() + span[0] // columns).tolist()

    each(every, compare, reads=lambda span: [(source, *span) for source in (one, other)])
    return [row for first, _ in every for row in seen[first]]
