"""Models from folders, and two of them on one prompt: base and instruct, or before and after a graft.

What config and tokenizer can refuse is refused before a weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import open_checkpoint
from lapis.errors import DataError
from lapis.inside.lens.logit_lens import DEFAULT, Seen, best_anywhere, check_fits, look, see
from lapis.inside.lens.options import LensOptions
from lapis.inside.lens.table import LensTrace
from lapis.inside.prompt import Prompt, Spelling, TrackedWord, as_words, check_length, encode
from lapis.inside.trace import anatomy, refuse
from lapis.model.reading.load import load_readable, outline_of
from lapis.model.reading.readable import ReadableModel
from lapis.text.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """A model that was loaded to be looked into, its tokenizer, and what the user called it."""

    model: ReadableModel
    tokenizer: Tokenizer
    name: str


def open_models(
    sources: Sequence[str | Path], prompt: Prompt, track: str = "", *, device: Any = "cpu",
    dtype: torch.dtype | None = None,
) -> list[Opened]:  # fmt: skip
    """Loads the models that a prompt is to be traced in.

    Args:
        sources: Model folders or hub ids.
        prompt: What they go on from.
        track: Words, parted by commas.
        device: Where they run.
        dtype: Of the weights; None keeps that of each folder.

    Raises:
        LapisError: A model is an encoder, or of a type that neither lapis nor transformers runs; before any weight is
            read, like the rest.
        DataError: The prompt does not fit into the context.
        ConfigError: A tokenizer cannot express a word.
    """
    checked = []
    for source in sources:
        checkpoint = open_checkpoint(source, adapters=True)
        config = outline_of(checkpoint)
        refuse(str(source), config.family, config.causal, config.head)
        tokenizer = Tokenizer.open(checkpoint)
        tokenizer.check_rows(config.vocab)
        words = as_words(track, tokenizer, config.vocab)
        longest = max((len(s.ids) - 1 for w in words for s in w.spellings), default=0)
        check_length(encode(tokenizer, prompt, config.vocab, str(source)), longest, config.context, str(source))
        checked.append((checkpoint, tokenizer, str(source)))
    return [
        Opened(load_readable(checkpoint, dtype, device), tokenizer, name) for checkpoint, tokenizer, name in checked
    ]


def side_by_side(
    one: Opened,
    other: Opened,
    prompt: Prompt,
    track: str | Sequence[str | TrackedWord] = (),
    *,
    options: LensOptions = DEFAULT,
    swapped: bool = False,
) -> tuple[LensTrace, LensTrace]:
    """The traces of two models on one prompt, with the same tracked words.

    Args:
        one: A model.
        other: The model that stands beside it.
        prompt: A text, a chat, or token ids; each model reads it with its own tokenizer.
        track: Words; without any, those that are best in some layer of either.
        options: What of the prompt is read, and how much of it is named.
        swapped: Send the states of each through the final norm and head of the other, which shows what of a change
            lies in the layers and what in the head. The last rows are then nobody's own logits, so only the plain ones
            are checked.

    Raises:
        DataError: Heads are to be swapped between models of different width.
    """
    models = (one, other)
    bodies = [anatomy(opened.model, opened.name) for opened in models]
    heads = [bodies[1], bodies[0]] if swapped else [None, None]
    if swapped:
        check_fits(*bodies)
    rows = min(len(parts.matrix) for parts in bodies)
    given = [as_words(track, opened.tokenizer, rows) for opened in models]
    seen = [
        see(
            parts,
            opened.tokenizer,
            encode(opened.tokenizer, prompt, len(parts.matrix), opened.name),
            words,
            options.positions or 1,
        )
        for parts, opened, words in zip(bodies, models, given, strict=True)
    ]
    words = given if given[0] else _either(seen, [best_anywhere(s, h) for s, h in zip(seen, heads, strict=True)])
    one_trace, other_trace = (
        look(s, w, bool(given[0]), top=options.top, head=h) for s, w, h in zip(seen, words, heads, strict=True)
    )
    return one_trace, other_trace


def _either(seen: Sequence[Seen], best: Sequence[list[TrackedWord]]) -> list[list[TrackedWord]]:
    """The best tokens of both, for each model under its own ids; what only one of the tokenizers has is left out."""
    lists: list[list[TrackedWord]] = [[], []]
    for owner, words in enumerate(best):
        for word in words:
            index = word.spellings[0].ids[0]
            try:
                there = seen[1 - owner].tokenizer.id(seen[owner].tokenizer.token(index))
            except DataError:  # a row without a token
                continue
            if there is not None and all(word.text != known.text for known in lists[0]):
                lists[owner].append(word)
                lists[1 - owner].append(TrackedWord(word.text, (Spelling(word.text, (there,)),)))
    return lists
