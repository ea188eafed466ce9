"""A model on a text, measured once for all that the page shows.

One traced pass gives the stream at the last places, the lens reads it, and a second pass lays the heads open. Leaves
out: how a page looks (pages.py), and texts longer than the context, which are refused.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lapis.inside.explain.explanation import Cost, Explanation, ShownToken
from lapis.inside.explain.heads import measure_heads
from lapis.inside.explain.options import ExplainOptions
from lapis.inside.explain.parting import compare
from lapis.inside.explain.stream import describe_build, measure_stream, rank_ending, read_grid, share_words
from lapis.inside.lens.logit_lens import best_anywhere, look, see
from lapis.inside.page import strongest_heads
from lapis.inside.prompt import Prompt, TrackedWord, as_tokenizer, as_words, encode, token_text
from lapis.inside.trace import anatomy
from lapis.model.scoring import evaluating
from lapis.model.size import lengths, mixers
from lapis.model.transformer import Transformer

DEFAULT = ExplainOptions()
TOP = 5  # tokens named for each state
WORDS = 6
EXAMPLE = (512, 768)  # tokens and features of the comparison that a reader may know


@torch.inference_mode()
def explain(
    model: nn.Module,
    tokenizer: Any,
    text: Prompt,
    track: str | Iterable[str | TrackedWord] = (),
    options: ExplainOptions = DEFAULT,
    *,
    against: tuple[nn.Module, Any] | None = None,
    names: tuple[str, str] = ("", ""),
    report: Callable[[str], None] | None = None,
) -> Explanation:
    """What a model does with a text, from tokens to the next token, as data and as one page.

    Args:
        model: lapis' own, or a loaded causal model of transformers.
        tokenizer: The model's: lapis' own, or a fast one of transformers.
        text: A text, a chat (messages), or token ids.
        track: Words whose rank is followed and whose logit is taken apart; without any, those that lead in some layer.
        options: How much of the text is shown.
        against: A second model to stand beside the first, and its tokenizer.
        names: What the models are called; default: their families.
        report: Is told what is being measured.

    Returns:
        The measurements; `.to_json()` are all of them, `.page().render()` is the page.

    Raises:
        DataError: The text is empty, or longer than the context.
        ConfigError: The tokenizer cannot express a word.
        LapisError: The model is an encoder, or holds NaN.
    """
    stage = report or (lambda _: None)
    parts, words_of = anatomy(model, names[0]), as_tokenizer(tokenizer)
    ids = encode(words_of, text, len(parts.matrix), parts.name)
    words = as_words(track, words_of, len(parts.matrix))
    notes: list[str] = []
    stage("running the text")
    seen = see(parts, words_of, ids, words, options.places)
    if len(seen.positions) < len(ids):
        notes.append(f"The text has {len(ids):,} tokens; what is shown are the last {len(seen.positions)} of them.")
    spelled = [name for name in words_of.special if isinstance(text, str) and name in text]
    notes += [f"{name} in the text is plain text here, and not the special token that it spells." for name in spelled]
    given = bool(words)
    words = words or best_anywhere(seen)[:WORDS]
    stage("reading every layer")
    trace = look(seen, words, given, top=TOP)
    notes += [f"{parts.name}: {note}." for note in trace.notes]
    grid = read_grid(trace)
    texts = [token_text(i, words_of) for i in ids]
    stage("looking into every head")
    chosen = strongest_heads(trace, options.heads) or [(parts.layers - 1, h) for h in range(min(parts.heads, 2))]
    with evaluating(parts.model):
        heads = measure_heads(parts, ids, texts, seen.trace, chosen, len(seen.positions), notes.append)
    own_PV = seen.trace.own(slice(0, len(seen.positions)))
    ending = rank_ending(own_PV, ids[seen.positions[0] :])
    parting, named = None, {*ending.ids, *(i for row in grid.ids_PNK for top in row for i in top)}
    if against is not None:
        stage("reading the other model")
        parting = compare(seen, grid, text, words, (*against, names[1]), TOP)
    special = set(words_of.special.values())
    dim, context = parts.matrix.shape[1], max(len(ids), 2)
    return Explanation(
        model=parts.name,
        build=describe_build(parts),
        total=len(ids),
        tokens=[ShownToken(p, texts[p], ids[p], ids[p] in special) for p in seen.positions],
        stream=measure_stream(seen, heads[1] if heads else None),
        attention=heads[0] if heads else None,
        words=share_words(parts, trace, trace.leading(WORDS)),
        grid=grid,
        ending=ending,
        cost=Cost(
            mixers(*EXAMPLE), mixers(len(ids), dim), len(ids),
            lengths(model.config, context) if isinstance(model, Transformer) else [],
        ),
        against=parting,
        texts={i: token_text(i, words_of) for i in sorted(named)},
        labels={name: trace.label(name) for name in trace.leading(WORDS)},
        notes=notes,
        trace=trace,
    )  # fmt: skip
