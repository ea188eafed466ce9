"""What a graft will do to each tensor, laid out and proved from headers, configs and tokenizers. Reads no weights.

Leaves out: running it (graft.py), what is checked of configs and shapes (checks.py).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.tensor_file import torch_dtype
from lapis.checkpoint.towers import language_config
from lapis.errors import CheckpointError, ConfigError
from lapis.families import find
from lapis.families.base import Part
from lapis.text.chat.template_tokens import template_tokens
from lapis.text.tokenizer.vocabulary import Vocabulary, differences, open_vocabulary, relation
from lapis.weights.account import Entry
from lapis.weights.checks import (
    check_configs,
    check_parents,
    check_same_tokens,
    check_tensors,
    check_vocabularies,
)
from lapis.weights.engine.fp8 import is_scale
from lapis.weights.engine.outputs import Kernel, Output, disk_bytes, unchanged
from lapis.weights.engine.sources import COMPUTABLE, RowsOf, Source, Stored, columns_of, read_rows
from lapis.weights.engine.tiles import THREADS, TILE, checksum
from lapis.weights.graft.differences import Differences, ModelDifferences
from lapis.weights.graft.scale import Scale, read_scale
from lapis.weights.matching import (
    Model,
    embedding_rows,
    format_problems,
    is_norm,
    is_vocabulary,
    open_models,
)
from lapis.weights.options import GraftOptions
from lapis.wording import format_count

ScaleLike = float | str | Path | Mapping[str, Any] | Scale


@dataclass
class GraftPlan:
    """A graft that can be done.

    Attributes:
        inputs: What is read, by role.
        models: Those of them that are whole models.
        config: Keys of config.json that change; None removes one.
        words: Vocabularies by role.
        speaker: Whose template and end tokens the output has where onto has none, as a role of words.
        spoken: The files of that model.
    """

    files: dict[str, list[Output]]
    entries: list[Entry]
    inputs: dict[str, Checkpoint]
    recipe: dict[str, Any]
    words: dict[str, Vocabulary | None]
    new_tokens: dict[str, int]
    vocabulary: dict[str, Any]
    notes: list[str]
    config: dict[str, Any]
    models: dict[str, Checkpoint]
    speaker: str
    spoken: Checkpoint

    @property
    def disk_bytes(self) -> int:
        return disk_bytes(self.files)

    @property
    def memory_bytes(self) -> int:
        """The bound on buffers: it does not depend on the model's size."""
        inputs = max((len(o.sources) for outputs in self.files.values() for o in outputs), default=1)
        return THREADS * TILE * (4 * inputs + 20)


def plan_graft(
    base: Model,
    chat: Model | Sequence[Model],
    onto: Model,
    scale: ScaleLike | Sequence[ScaleLike] = 1.0,
    options: GraftOptions = GraftOptions(),  # noqa: B008
) -> GraftPlan:
    """Checks a graft and lays it out; the arguments are those of `graft`.

    Raises:
        CheckpointError: With all problems of the models at once.
        ConfigError: For an option that is none of those that there are.
    """
    chats = listed(chat)
    scales, embeddings = read_scales(scale, len(chats), "graft", options)
    roles = {"chat" if i == 0 else f"chat{i + 1}": each for i, each in enumerate(chats)}
    inputs = open_models({"base": base} | roles | {"onto": onto}, "graft")
    words = {role: open_vocabulary(checkpoint) for role, checkpoint in inputs.items()}
    own, chat_words = words["onto"], words["chat"]
    tokens = template_tokens(chat_words, words["base"]) if own and chat_words else []
    parent = inputs["base"]
    pairs = [("base", parent, role, checkpoint) for role, checkpoint in inputs.items() if role != "base"]
    return lay_out(
        inputs, words, ModelDifferences(inputs, words, tokens), scales, embeddings, options,
        lambda: check_parents(pairs, options.allow_unrelated),
    )  # fmt: skip


def read_scales(
    scale: ScaleLike | Sequence[ScaleLike], count: int, what: str, options: GraftOptions
) -> tuple[list[Scale], str]:
    """One scale for each of `count` differences, and whether embeddings are kept or added. what: names the command."""
    scales = [read_scale(each) for each in listed(scale)]
    embeddings: str = options.embeddings or next((str(each.embeddings) for each in scales if each.embeddings), "keep")
    if embeddings not in ("keep", "add"):
        raise ConfigError(f'{what}: embeddings is "{embeddings}" in the plan; give keep or add')
    if len(scales) == 1:
        scales *= count
    if len(scales) != count or not count:
        models = "chat models" if what == "graft" else "deltas"
        raise ConfigError(f"{what}: {count} {models} and {len(scales)} scales; give one scale, or one for each")
    return scales, embeddings


def listed(value: Any) -> list[Any]:
    """A list of what may be one or several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def lay_out(
    inputs: dict[str, Checkpoint],
    words: dict[str, Vocabulary | None],
    differences: Differences,
    scales: Sequence[Scale],
    embeddings: str,
    options: GraftOptions,
    related: Callable[[], tuple[list[str], list[str]]],
) -> GraftPlan:
    """Checks a graft of any differences and lays it out.

    Args:
        inputs: "onto", and the models that the differences are of, by role; "chat" has the template. Headers are read.
        words: Their vocabularies.
        differences: What is added.
        scales: One for each difference.
        embeddings: "keep" or "add".
        options: How it is made.
        related: Problems and notes where models have nothing to do with each other; reads weights, so it comes last.

    Raises:
        CheckpointError: With all problems of the models at once.
    """
    problems, notes = check_configs(inputs)
    for role, checkpoint in inputs.items():
        notes += [f"{role}: {note}" for note in checkpoint.notes]
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    changed = inputs["onto"]
    scales = [each.resolved(map(changed.part, changed.names), changed.family) for each in scales]
    layout = _Layout(inputs, words, differences, scales, embeddings, options.norms, options.template, dtype)
    shape = _shape(inputs["onto"])
    problems += [line for each in scales for line in each.problems(layout.parts.values(), shape)]
    problems += check_vocabularies(inputs, words)
    notes += layout.strangers()
    unread = [role for role in inputs if words[role] is None]
    if unread and embeddings == "add":
        problems.append(f"no tokenizer.json in {', '.join(unread)}; embeddings can be added by token string only")
    problems += check_tensors(inputs, {name: layout.fate(name) for name in layout.parts})
    more, lines = check_same_tokens(inputs, words, options.same_tokens)
    problems, notes = problems + more, notes + lines
    if not problems:
        problems, lines = related()
        notes += lines
    if problems:
        raise CheckpointError(format_problems("delta" if "delta" in inputs else "graft", problems))
    for tower, count in Counter(inputs["onto"].towers.others.values()).items():
        what = format_count(count, f"tensor of {tower} is", f"tensors of {tower} are")
        notes.append(f"{what} copied from onto: what is changed is the language model")
    if not layout.template:
        blind = [role for role, vocabulary in words.items() if vocabulary is None]
        why = f"no tokenizer.json in {', '.join(blind)}" if blind else "chat's template has no tokens of its own"
        held = format_count(len(layout.held), "row stays", "rows stay")
        why = f"{held} onto's" if layout.held else why
        notes.append(f"no rows of template tokens were taken from chat: {why}")
    recipe: dict[str, Any] = {
        "scale": [s.to_json() for s in scales] if len(scales) > 1 else scales[0].to_json(),
        "embeddings": embeddings,
        "norms": options.norms,
        "template": options.template,
    }
    if options.dtype is not None:
        recipe["dtype"] = options.dtype
    files = layout.files()
    speaker = "onto" if options.template == "onto" else next(role for role in inputs if role not in ("base", "onto"))
    return GraftPlan(
        files, layout.entries, inputs, recipe, words, layout.new_tokens, layout.vocabulary(),
        notes + layout.notes, layout.config, inputs, speaker, inputs[speaker],
    )  # fmt: skip


class _Layout:
    """The output's tensors, in onto's files and order."""

    def __init__(
        self,
        inputs: dict[str, Checkpoint],
        words: dict[str, Vocabulary | None],
        differences: Differences,
        scales: list[Scale],
        embeddings: str,
        norms: str,
        template: str,
        dtype: torch.dtype | None,
    ) -> None:
        self.inputs, self.words, self.differences, self.scales = inputs, words, differences, scales
        self.embeddings, self.norms, self.onto, self.dtype = embeddings, norms, inputs["onto"], dtype
        self.parts: dict[str, Part] = {name: self.onto.part(name) for name in self.onto.names}
        self.roles = [role for role in inputs if role != "onto"]
        self.entries: list[Entry] = []
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        tokens = differences.template
        self.template, self.held = (tokens, []) if template == "chat" else ([], tokens)
        self._rows = embedding_rows(self.onto)
        self._patched: set[tuple[str, str]] = set()
        self.new_tokens = self._add_tokens()

    def _add_tokens(self) -> dict[str, int]:
        """Places for the template's tokens that onto lacks: rows of padding first, then new ones."""
        own = self.words["onto"]
        lacking = [token for token in self.template if own and token not in own.ids]
        if not own or not lacking or self._rows is None:
            return {}
        first = own.size
        added = {token: first + i for i, token in enumerate(lacking)}
        where = "rows that were padding"
        if first + len(lacking) > self._rows:
            self.config["vocab_size"] = first + len(lacking)
            where = f"new rows: the embedding has {first + len(lacking):,} instead of {self._rows:,}"
        self.notes.append(f"onto's vocabulary gains {', '.join(lacking)} from chat, in {where}")
        return added

    def strangers(self) -> list[str]:
        """Lines about tokens that not all models have, or that have other ids, by name and count."""
        own = self.words["onto"]
        others = {role: words for role in self.roles if (words := self.words[role])}
        if own is None or not others:
            return []
        alone = set(own.ids).difference(*(words.ids for words in others.values()))
        lines = [f"onto alone has {differences(own, alone)}: their rows stay as they are"] if alone else []
        for role, words in others.items():
            if lacking := words.ids.keys() - own.ids.keys() - self.new_tokens.keys():
                lines.append(f"{role} has {differences(words, lacking)} that onto lacks: nothing is taken of them")
            moved = sum(own.ids.get(token, i) != i for token, i in words.ids.items())
            if moved:
                what = format_count(moved, "token has", "tokens have")
                lines.append(f"{what} other ids in {role} than in onto: rows are matched by token")
        return lines

    def fate(self, name: str) -> str:
        """What becomes of a tensor: merge, keep (a norm), rows (of tokens), zero, scales (of FP8), tower (another)."""
        part, shape = self.parts[name], self.onto.info(name).shape
        if name in self.onto.towers.others:
            return "tower"
        if is_scale(self.onto, name):
            return "scales"
        if is_vocabulary(part) and shape and shape[0] == self._rows:
            return "rows"
        if is_norm(part) and self.norms == "keep":
            return "keep"
        return "merge" if any(scale.of(part) for scale in self.scales) else "zero"

    def files(self) -> dict[str, list[Output]]:
        result: dict[str, list[Output]] = {}
        for file, header in self.onto.headers.items():
            ordered = sorted(header.tensors, key=lambda name: (header.tensors[name].start, header.tensors[name].end))
            result[file] = [output for name in ordered if (output := self._output(name))]
        taken = {(s.role, s.name) for outputs in result.values() for o in outputs for s in o.sources} | self._patched
        for role in self.roles:
            for name in self.inputs[role].names:
                if (role, name) not in taken:
                    self.entries.append(Entry(name, "skipped", self._unused(role, name), role=role))
        return result

    def _output(self, name: str) -> Output | None:
        info, part, fate = self.onto.info(name), self.parts[name], self.fate(name)
        if fate == "scales":
            self.config["quantization_config"] = None
            self.entries.append(Entry(name, "skipped", "the weights that it scales are written without", role="onto"))
            return None
        own = Stored("onto", self.onto, name)
        dtype = torch.bfloat16 if own.scaled else torch_dtype(info.dtype) or torch.uint8
        if self.dtype is not None and own.dtype in COMPUTABLE:
            dtype = self.dtype
        rounding = Kernel(unchanged) if own.scaled or dtype != own.dtype else None
        if fate == "rows":
            return self._token_rows(name, own, dtype, rounding)
        if fate != "merge":
            why = {"keep": "norms are kept", "zero": "its scale is 0"}.get(fate, "not the language model's")
            self.entries.append(Entry(name, "copied", why + (", dequantized" if own.scaled else "")))
            return Output(name, dtype, info.shape, (own,), rounding)
        scales = [scale.of(part) for scale in self.scales]
        self.entries.append(Entry(name, "merged", scale=scales if len(scales) > 1 else scales[0]))
        others = self.differences.sources(name)
        return Output(name, dtype, info.shape, (own, *others), Kernel(self.differences.apply(scales)))

    def _token_rows(self, name: str, own: Stored, dtype: torch.dtype, rounding: Kernel | None) -> Output:
        """Embedding or head: onto's rows, chat's for the template's tokens, the difference where it is asked for."""
        scales = [scale.of(self.parts[name]) for scale in self.scales]
        words, rows = self.words["onto"], own.shape[0]
        shape, patch = own.shape, None
        source: Source = own
        if self.template and words:
            places = {**words.ids, **self.new_tokens}
            given, theirs = self.differences.template_rows(name)
            patch = _TemplateRows(given, {places[t]: theirs[t] for t in self.template}, columns_of(own.shape))
            self._patched.add((given.role, given.name))
        grown = self.config.get("vocab_size", rows)
        if grown > rows:
            shape = (grown, *own.shape[1:])
            source = RowsOf(own, [*range(rows), *[-1] * (grown - rows)])
        but = format_count(len(patch.rows), "row of the template is", "rows of the template are") if patch else ""
        why = "embeddings are kept" + (f", but {but} chat's" if patch else "")
        if self.embeddings == "keep" or not any(scales):
            self.entries.append(Entry(name, "copied", why))
            return Output(name, dtype, shape, (source,), rounding, patch)
        assert words is not None
        tokens = words.tokens()
        shared = (self.differences.shared or set()).intersection(words.ids) - set(self.held)
        listed = [token if (token := tokens.get(row)) in shared else None for row in range(shape[0])]
        others = self.differences.token_rows(name, listed)
        why = f"{sum(token is not None for token in listed):,} shared tokens of {shape[0]:,} rows"
        self.entries.append(Entry(name, "merged", why, scales if len(scales) > 1 else scales[0]))
        return Output(name, dtype, shape, (source, *others), Kernel(self.differences.apply(scales)), patch)

    def _unused(self, role: str, name: str) -> str:
        part = self.inputs[role].part(name)
        if is_scale(self.inputs[role], name):
            return "read with the weights that it scales"
        if tower := self.inputs[role].towers.others.get(name):
            return f"{tower} is not the language model's"
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
            f"onto_to_{role}": relation(own, other) for role in self.roles if (other := self.words[role])
        }
        strangers = {
            f"only_in_{role}": len(words.ids.keys() - own.ids.keys())
            for role in self.roles
            if (words := self.words[role])
        }
        return (
            result
            | strangers
            | {"tokens": len(own.ids), "template_tokens": self.template, "new_tokens": self.new_tokens}
        )


class _TemplateRows:
    """Overwrites the rows of the template's tokens with chat's, in the output's dtype and otherwise untouched."""

    def __init__(self, source: Source, rows: dict[int, int], columns: int) -> None:
        self.rows, self._columns = dict(sorted(rows.items())), columns
        self._source = source
        self._values: torch.Tensor | None = None

    def __call__(self, first: int, last: int, values: torch.Tensor) -> int:
        width, inputs = self._columns, 0
        for i, row in enumerate(self.rows):
            start, end = max(row * width, first), min((row + 1) * width, last)
            if start < end:
                if self._values is None:
                    self._values = read_rows(self._source, list(self.rows.values()))
                given = self._values[i, start - row * width : end - row * width]
                values[start - first : end - first] = given
                inputs += checksum(given, i, start)
        return inputs


def _shape(model: Checkpoint) -> dict[str, Any]:
    """What config.json says of the model's shape; empty where its family is not known or does not say."""
    try:
        config = language_config(model.config)
        family = find(config)
        return vars(family.read_config(config)) if family else {}
    except CheckpointError:
        return {}
