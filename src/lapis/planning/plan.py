"""`lapis.plan`: the signals, the choice and the control, put together. Leaves out: writing (result.py, cli/plan.py)."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.errors import CheckpointError, ConfigError, DataError
from lapis.evaluation.choices import Choice, read_choices
from lapis.families.config import ModelConfig
from lapis.model.check import read_config
from lapis.planning.choose import Goal, at_random, choose, worth
from lapis.planning.measure import WINDOW, Exam, make_exam
from lapis.planning.pieces import Piece, Size, outside, pieces_of
from lapis.planning.result import PlanResult
from lapis.planning.search import search
from lapis.planning.signals import differences, tensor_signals
from lapis.planning.study import Study, Sweeps
from lapis.planning.tensor_swap import Bench
from lapis.text.corpus import corpus
from lapis.text.corpus.corpus import Chat
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.part_kinds import is_vocabulary
from lapis.weights.vocabulary import open_vocabulary, template_tokens

Model = str | os.PathLike[str] | Checkpoint
Files = str | Path | Sequence[str | Path]
Progress = Callable[[str, int, int], None]
SHAPE = ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocab")


def plan(
    base: Model,
    chat: Model,
    goal: Goal = "style",
    budget: float = 0.25,
    *,
    chats: Files | Sequence[Chat] | None = None,
    text: Files | None = None,
    choices: str | Path | Sequence[Choice] | None = None,
    onto: Model | None = None,
    cost: float = 0.03,
    embeddings: Literal["keep", "add"] = "add",
    pieces: Size = "halves",
    sweeps: Sweeps = "both",
    spectra: bool = False,
    gradients: bool = True,
    replies: bool = True,
    limit: int = 64,
    context: int = WINDOW,
    seed: int = 0,
    progress: Progress | None = None,
) -> PlanResult:
    """Which pieces of a model to tune or merge, for a goal, within a share of the blocks' parameters.

    chats, text: files to measure with (chats may be Chat objects); without chats the choice rests on the tensors alone.
    choices: questions of facts, as in `lapis eval`. onto: the model of a coming graft: effects are measured there, and
    a scale for each piece is learned that makes its text at most `cost` harder (a share of bits per byte), with
    embeddings="add" for the token tables too. pieces: layers, halves (attention, MLP) or components. sweeps: put
    differences in, take them out, or both. limit: chats to measure with, and 128 tokens of text for each.
    progress(what, done, total).
    Raises ConfigError, CheckpointError or DataError, one line each.
    """
    started = time.perf_counter()
    _check_settings(goal, budget, cost, limit)
    if onto is not None and (chats is None or text is None):
        raise ConfigError("plan: a scale for each piece is learned from chats and text; with onto give both")
    tell = progress or (lambda what, done, total: None)
    one, two = _opened(base), _opened(chat)
    home = one if onto is None else _opened(onto)
    shape = _check_models(one, two, home)
    everywhere = pieces_of(home, "layers")
    parts = everywhere if pieces == "layers" else pieces_of(home, pieces)
    room = int(budget * sum(piece.parameters for piece in everywhere))
    least = min(piece.parameters for piece in parts)
    if room < least:
        raise ConfigError(
            f"plan: budget {budget:g} is {room:,} parameters and the smallest piece has {least:,}; give more, or "
            f"smaller pieces (components)"
        )
    study = None
    if chats is not None:  # all that can be wrong with the data is told before a weight is read
        tokenizer, rows_of_template = _tokenizer(home, two), template_rows(home, one, two)
        tokenizer.check_rows(shape.vocab)
        exam = _exam(tokenizer, chats, text, choices, min(context, shape.context), limit)
    table = differences(one, two, spectra, lambda done, total: tell("tensors", done, total))
    rows = {p.label: tensor_signals(table, p) for p in [*pieces_of(one, "layers"), *pieces_of(one, pieces)]}
    result = PlanResult(
        goal, budget, one.source, two.source, {key: getattr(shape, key) for key in ("family", "head_dim", *SHAPE)},
        seed=seed, notes=list(table.notes),
    )  # fmt: skip
    if chats is not None:
        candidates = list(dict.fromkeys([*everywhere, *parts, *(outside(home) if onto is None else [])]))
        study = Study(Bench(home, one, two, rows_of_template), exam, tokenizer, home is one, replies)
        study.sweep(candidates, sweeps, lambda done, total: tell("pieces", done, total))
        study.fill(rows, candidates)
        if gradients:
            study.fill_gradients(rows, list(dict.fromkeys([*everywhere, *parts])))
        result.signal, result.tokens = "causal", exam.tokens
        if text is None and choices is None:
            result.notes.append("no text and no choices were given: what plain text loses is not measured")
    else:
        result.notes.append("no chats were given: the choice rests on the size of the differences alone")
        for row in rows.values():
            row.update(style=row["energy"], knowledge=None)
    if study is not None and goal == "style":
        chosen = search(
            study.bench, study.runner, study.effects, parts, rows, study.moved, room, seed,
            lambda done, total: tell("sets", done, total),
        )  # fmt: skip
    else:
        chosen = choose(parts, worth(goal, parts, rows), room)
    size = sum(piece.parameters for piece in chosen)
    control = at_random(parts, size, seed)
    result.share = size / sum(piece.parameters for piece in everywhere)
    result.tune, result.control = ([e for p in set_ for e in p.entries()] for set_ in (chosen, control))
    result.scales = [_scale(piece, 1.0) for piece in chosen]
    if goal == "knowledge":
        result.notes.append(
            "for knowledge no choice of layers was found that keeps chat as well as this: let all of base read, with "
            "old text mixed in, and graft the difference onto chat (docs/choosing-layers.md)"
        )
    else:
        words = open_vocabulary(two)
        result.template = [] if words is None else template_tokens(words, open_vocabulary(one))
    if study is not None:
        if onto is not None:
            tables = outside(home) if embeddings == "add" and _same_words(one, two, home) else []
            learned = study.learn(parts, tables, cost, lambda done, total: tell("scales", done, total))
            result.scales = [_scale(piece, learned[piece.label]) for piece in [*parts, *tables]]
            result.embeddings = "add" if tables else "keep"
            for label, scale in learned.items():
                rows.setdefault(label, {})["scale"] = scale
        result.measured = study.measure({"chosen": chosen, "control": control})
        result.passes = study.runner.passes
    taken, drawn = {piece.label for piece in chosen}, {piece.label for piece in control}
    others = [piece for piece in outside(home) if piece.label in rows]
    result.pieces = [
        {"layer": p.label, "parameters": p.parameters, **rows[p.label], "chosen": p.label in taken,
         "control": p.label in drawn}
        for p in [*parts, *others]
    ]  # fmt: skip
    result.scores = [
        {"layer": p.layer, "parameters": p.parameters, **rows[p.label], "chosen": p.layer in result.layers,
         "control": p.layer in {entry["layer"] for entry in result.control}}
        for p in everywhere
    ]  # fmt: skip
    result.seconds = time.perf_counter() - started
    return result


def _check_settings(goal: str, budget: float, cost: float, limit: int) -> None:
    if goal not in ("style", "knowledge"):
        raise ConfigError(f'plan: goal is "{goal}"; give style or knowledge')
    if not 0 < budget <= 1:
        raise ConfigError(f"plan: budget is {budget:g}; it is a share of the parameters, above 0 and at most 1")
    if limit < 1 or not 0 < cost <= 1:
        raise ConfigError(f"plan: limit is {limit} and cost {cost:g}; give 1 or more chats, and a share above 0")


def _opened(model: Model) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _check_models(base: Checkpoint, chat: Checkpoint, home: Checkpoint) -> ModelConfig:
    """The shape that all share; raises CheckpointError where they do not."""
    shapes = [read_config(model) for model in (base, chat, home)]
    for role, model, shape in zip(("base", "chat", "onto"), (base, chat, home), shapes, strict=True):
        if shape.head != "lm" or not shape.causal or shape.image is not None:
            raise CheckpointError(f"plan: {model.source} is no causal language model; plans are made for these only")
        for key in SHAPE:
            mine, first = getattr(shape, key), getattr(shapes[1], key)
            if key == "vocab" and role == "base" and mine != first:
                raise CheckpointError(
                    f"plan: {base.source} has {mine:,} rows of tokens and {chat.source} {first:,}; chats cannot be "
                    f"measured on base before it has chat's tokens (lapis tokenizer extend)"
                )
            if mine != first and key != "vocab":
                raise CheckpointError(
                    f"plan: {key} is {mine} in {model.source} and {first} in {chat.source}; these are not parent and "
                    f"child"
                )
    return shapes[2]


def _exam(
    tokenizer: Tokenizer,
    chats: Files | Sequence[Chat],
    text: Files | None,
    choices: str | Path | Sequence[Choice] | None,
    context: int,
    limit: int,
) -> Exam:
    given = [chats] if isinstance(chats, (str, Path)) else list(chats)
    if given and all(isinstance(chat, Chat) for chat in given):
        talks: Iterable[Chat] = (chat for chat in given if isinstance(chat, Chat))
    else:
        talks = corpus.chats([path for path in given if not isinstance(path, Chat)])
    texts = () if text is None else (document.text for document in corpus.documents(text))
    questions = [] if choices is None else read_choices(choices) if isinstance(choices, (str, Path)) else list(choices)
    exam = make_exam(tokenizer, islice(talks, 50 * limit), texts, questions, context=context, limit=limit)
    if text is not None and not exam.text:
        raise DataError("plan: the files of text hold none; give other --text")
    return exam


def template_rows(home: Checkpoint, base: Checkpoint, chat: Checkpoint) -> dict[int, int]:
    """Row in home -> row in chat of the chat template's tokens; these rows are chat's throughout.

    Raises CheckpointError where home has no place for one.
    """
    words, origin, own = (open_vocabulary(model) for model in (chat, base, home))
    if words is None or own is None:
        return {}
    tokens = template_tokens(words, origin)
    if lacking := [token for token in tokens if token not in own.ids]:
        raise CheckpointError(
            f"plan: {home.source} has no {', '.join(lacking)}, which chat's template writes; add it with lapis "
            f"tokenizer extend, or plan without onto"
        )
    return {own.ids[token]: words.ids[token] for token in tokens}


def _same_words(*models: Checkpoint) -> bool:
    """Whether the token tables of all go row by row together."""
    words = [open_vocabulary(model) for model in models]
    rows = {
        info.shape for model in models for n in model.names if is_vocabulary(model.part(n)) for info in [model.info(n)]
    }
    return len(rows) == 1 and all(w is not None and words[0] is not None and w.ids == words[0].ids for w in words)


def _tokenizer(home: Checkpoint, chat: Checkpoint) -> Tokenizer:
    """The tokenizer to measure with: chat's, or where home has other tokens home's, with chat's template."""
    words, own = open_vocabulary(chat), open_vocabulary(home)
    tokenizer = Tokenizer.open(chat)
    if words is None or own is None or words.ids == own.ids:
        return tokenizer
    other = Tokenizer.open(home)
    other.templates = other.templates or dict(tokenizer.templates)
    return other


def _scale(piece: Piece, scale: float) -> dict[str, Any]:
    where = {} if piece.layer is None else {"layers": [piece.layer]}
    return {**where, "components": [piece.component] if piece.component else ["attn", "mlp"], "scale": round(scale, 4)}
