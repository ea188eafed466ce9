"""What a plan is made from, checked before a weight is read: two or three models, held-out material, and the pieces.

Leaves out measuring (held_out.py, effects.py).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.files import stamp
from lapis.errors import CheckpointError, ConfigError, DataError
from lapis.evaluation.choices import Choice, read_choices
from lapis.model.reading.load import outline_of
from lapis.model.reading.readable import Outline
from lapis.planning.held_out import HeldOut, make_held_out
from lapis.planning.options import PlanOptions
from lapis.planning.pieces import Piece, outside, pieces_of
from lapis.text.chat.template_tokens import template_tokens
from lapis.text.corpus import corpus
from lapis.text.corpus.corpus import ChatRecord
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.text.tokenizer.vocabulary import open_vocabulary
from lapis.weights.checks import check_parents, missing_tensors
from lapis.weights.fuse.opening import open_model
from lapis.weights.matching import format_problems, is_vocabulary

Model = str | os.PathLike[str] | Checkpoint
Files = str | Path | Sequence[str | Path]
SHAPE = ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocab")
SAMPLED = 1000  # rows of an embedding that a token's row is compared with


@dataclass(frozen=True)
class PlanInputs:
    """base, chat: parent and child. home: the model in which effects are measured, base or what a graft goes onto.

    shape: home's. layers, parts: the pieces by whole layers and of the chosen size. room: parameters that may be
    chosen. tokenizer, held_out: None where there are no chats to measure with. template: row in home -> row in chat of
    the chat template's tokens. notes: on how the models are related.
    """

    base: Checkpoint
    chat: Checkpoint
    home: Checkpoint
    shape: Outline
    layers: list[Piece]
    parts: list[Piece]
    room: int
    tokenizer: Tokenizer | None
    held_out: HeldOut | None
    template: dict[int, int]
    has_text: bool
    notes: tuple[str, ...] = ()

    @property
    def grafting(self) -> bool:
        """Whether effects are measured in another model than base."""
        return self.home is not self.base

    @property
    def stepwise(self) -> bool:
        """Whether the model can be run from any layer on: lapis runs it itself."""
        return self.home.runs is not None

    @property
    def pieces(self) -> list[Piece]:
        """Layers and parts, each once."""
        return list(dict.fromkeys([*self.layers, *self.parts]))

    @property
    def candidates(self) -> list[Piece]:
        """All pieces whose effects are measured: for a plan of base the token tables too."""
        return self.pieces if self.grafting else [*self.pieces, *outside(self.home)]

    def job(self, options: PlanOptions) -> str:
        """A digest of all that decides what is measured: the options, the models' files, the held-out ids."""
        stamps = []
        for model in (self.base, self.chat, self.home):
            files = sorted({info.file for info in model.index.values()})
            stamps.append([model.digest(), [[str(f), *stamp(f.stat())] for f in files]])
        ids = [[list(map(int, s.ids)), list(map(int, s.scored))] for kind in ("chats", "text", "choices")
               for s in getattr(self.held_out, kind, ())]  # fmt: skip
        everything = [asdict(options), stamps, ids, sorted(self.template.items())]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def check_inputs(
    base: Model,
    chat: Model,
    onto: Model | None,
    chats: Files | Sequence[ChatRecord] | None,
    text: Files | None,
    choices: str | Path | Sequence[Choice] | None,
    options: PlanOptions,
) -> PlanInputs:
    """Everything that a plan needs; all problems are reported before a weight is read.

    Raises:
        ConfigError: A budget that holds no piece, or a graft without chats and text.
        CheckpointError: Models that do not belong together.
        DataError: Files that hold nothing to measure with.
    """
    if onto is not None and (chats is None or text is None):
        raise ConfigError("plan: a scale for each piece is learned from chats and text; with onto give both")
    parent, child = open_model(base), open_model(chat)
    home = parent if onto is None else open_model(onto)
    shape = _check_models(parent, child, home)
    notes = _check_relatives(parent, child, home, options.allow_unrelated)
    layers = pieces_of(home, "layers")
    parts = layers if options.pieces == "layers" else pieces_of(home, options.pieces)
    room = int(options.budget * sum(piece.parameters for piece in layers))
    least = min(piece.parameters for piece in parts)
    if room < least:
        raise ConfigError(
            f"plan: budget {options.budget:g} is {room:,} parameters and the smallest piece has {least:,}; give more, "
            f"or smaller pieces (components)"
        )
    tokenizer, held_out, template = None, None, {}
    if chats is not None:
        tokenizer, template = _tokenizer(home, child), template_rows(home, parent, child)
        tokenizer.check_rows(shape.vocab)
        context = min(options.context, shape.context)
        held_out = _read_held_out(tokenizer, chats, text, choices, context, options.limit)
    return PlanInputs(
        parent, child, home, shape, layers, parts, room, tokenizer, held_out, template,
        has_text=text is not None or choices is not None, notes=tuple(notes),
    )  # fmt: skip


def template_rows(home: Checkpoint, base: Checkpoint, chat: Checkpoint) -> dict[int, int]:
    """Row in home -> row in chat of the chat template's tokens; these rows are chat's throughout.

    Raises:
        CheckpointError: Home has no row for one.
    """
    words, origin, own = (open_vocabulary(model) for model in (chat, base, home))
    if words is None or own is None:
        return {}
    tokens = template_tokens(words, origin)
    if lacking := [token for token in tokens if token not in own.ids]:
        raise CheckpointError(
            f"plan: {home.source} has no {', '.join(lacking)}, which chat's template writes; add {_them(lacking)} "
            f"with lapis graft --base {base.source} --chat {chat.source} --onto {home.source} --scale 0 --out NEW, and "
            f"give --onto NEW; or plan without --onto"
        )
    return {own.ids[token]: words.ids[token] for token in tokens}


def describe_template_rows(inputs: PlanInputs) -> list[dict[str, Any]]:
    """What the embeddings say of the template's tokens: {token, in_base, moved, moved_median, norm} of each.

    moved: |chat's row - base's| / |base's|, and moved_median: the same for the median of the other rows. norm: of
    base's row, relative to the median row's. None where base has no such token or there is nothing to compare.
    """
    words, origin = open_vocabulary(inputs.chat), open_vocabulary(inputs.base)
    if words is None:
        return []
    tables = [next((n for n in model.names if model.part(n).component == "embed"), None)
              for model in (inputs.base, inputs.chat)]  # fmt: skip
    rows: list[dict[str, Any]] = []
    norms: list[float] = []
    moves: list[float] = []
    own, other = tables
    if own is not None and other is not None and origin is not None:
        shared = sorted((i, words.ids[token]) for token, i in origin.ids.items() if token in words.ids)
        for mine, theirs in shared[:: max(1, len(shared) // SAMPLED)]:
            norm, moved = _row_move(inputs.base, own, mine, inputs.chat, other, theirs)
            norms.append(norm)
            moves.append(moved)
    for token in template_tokens(words, origin):
        row: dict[str, Any] = {"token": token, "in_base": origin is not None and token in origin.ids}
        if norms and origin is not None and own is not None and other is not None and row["in_base"]:
            norm, moved = _row_move(inputs.base, own, origin.ids[token], inputs.chat, other, words.ids[token])
            row |= {"moved": moved, "moved_median": _median(moves), "norm": norm / (_median(norms) or 1.0)}
        rows.append(row)
    return rows


def same_words(*models: Checkpoint) -> bool:
    """Whether the token tables of all go row by row together."""
    words = [open_vocabulary(model) for model in models]
    rows = {
        info.shape for model in models for n in model.names if is_vocabulary(model.part(n)) for info in [model.info(n)]
    }
    return len(rows) == 1 and all(w is not None and words[0] is not None and w.ids == words[0].ids for w in words)


def _check_models(base: Checkpoint, chat: Checkpoint, home: Checkpoint) -> Outline:
    """The shape that all share; raises CheckpointError where they do not."""
    shapes = [outline_of(model) for model in (base, chat, home)]
    for role, model, shape in zip(("base", "chat", "onto"), (base, chat, home), shapes, strict=True):
        if shape.head != "lm" or not shape.causal or shape.image is not None:
            raise CheckpointError(f"plan: {model.source} is no causal language model; plans are made for these only")
        for key in SHAPE:
            mine, first = getattr(shape, key, None), getattr(shapes[1], key, None)
            if key == "vocab" and role == "base" and mine != first:
                raise CheckpointError(
                    f"plan: {base.source} has {mine:,} rows of tokens and {chat.source} {first:,}; chats cannot be "
                    f"measured on base before it has chat's rows; add them with lapis graft --base {base.source} "
                    f"--chat {chat.source} --onto {base.source} --scale 0 --out NEW, and give --base NEW"
                )
            if mine != first and key != "vocab":
                raise CheckpointError(
                    f"plan: {key} is {mine} in {model.source} and {first} in {chat.source}; these are not parent and "
                    f"child"
                )
    return shapes[2]


def _check_relatives(base: Checkpoint, chat: Checkpoint, home: Checkpoint, allow_unrelated: bool) -> list[str]:
    """Notes on how the models are related; raises CheckpointError for one that lacks a tensor, or is no relative."""
    models = {"base": base, "chat": chat} | ({} if home is base else {"onto": home})
    notes: list[str] = []
    problems = missing_tensors(models)
    if not problems:
        pairs = [("base", base, role, model) for role, model in models.items() if role != "base"]
        problems, notes = check_parents(pairs, allow_unrelated)
    if problems:
        raise CheckpointError(format_problems("plan", problems))
    return notes


def _read_held_out(
    tokenizer: Tokenizer,
    chats: Files | Sequence[ChatRecord],
    text: Files | None,
    choices: str | Path | Sequence[Choice] | None,
    context: int,
    limit: int,
) -> HeldOut:
    given = [chats] if isinstance(chats, (str, Path)) else list(chats)
    if given and all(isinstance(chat, ChatRecord) for chat in given):
        talks: Iterable[ChatRecord] = (chat for chat in given if isinstance(chat, ChatRecord))
    else:
        talks = corpus.chats([path for path in given if not isinstance(path, ChatRecord)])
    texts = () if text is None else (document.text for document in corpus.documents(text))
    questions = [] if choices is None else read_choices(choices) if isinstance(choices, (str, Path)) else list(choices)
    held_out = make_held_out(tokenizer, islice(talks, 50 * limit), texts, questions, context=context, limit=limit)
    if text is not None and not held_out.text:
        raise DataError("plan: the files of text hold none; give other --text")
    return held_out


def _tokenizer(home: Checkpoint, chat: Checkpoint) -> Tokenizer:
    """The tokenizer to measure with: chat's, or where home has other tokens home's, with chat's template."""
    words, own = open_vocabulary(chat), open_vocabulary(home)
    tokenizer = Tokenizer.open(chat)
    if words is None or own is None or words.ids == own.ids:
        return tokenizer
    other = Tokenizer.open(home)
    other.templates = other.templates or dict(tokenizer.templates)
    return other


def _row_move(base: Checkpoint, own: str, mine: int, chat: Checkpoint, other: str, theirs: int) -> tuple[float, float]:
    """The norm of a row in base, and how far chat's is from it, relative to that norm."""
    if mine >= base.info(own).shape[0] or theirs >= chat.info(other).shape[0]:
        return 0.0, 0.0
    row = base.read_rows(own, mine, mine + 1)[0].double()
    norm = float(row.norm())
    moved = float((chat.read_rows(other, theirs, theirs + 1)[0].double() - row).norm())
    return norm, moved / norm if norm else 0.0


def _them(tokens: Sequence[str]) -> str:
    return "it" if len(tokens) == 1 else "them"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
