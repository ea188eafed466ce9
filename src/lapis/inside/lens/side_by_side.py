"""Two models on one prompt: base and instruct, or before and after a graft, each read by its own head or the other's.

Leaves out: differences of weights (lapis.weights.diff.diff).
"""

from collections.abc import Sequence

from lapis.errors import DataError
from lapis.inside.anatomy import anatomy
from lapis.inside.lens.logit_lens import Seen, best_anywhere, check_fits, look, see
from lapis.inside.lens.table import LensTrace
from lapis.inside.lens.words import Spelling, Word, as_words
from lapis.inside.prompts import Prompt, encode
from lapis.inside.transformers_model import Opened


def side_by_side(
    one: Opened,
    other: Opened,
    prompt: Prompt,
    track: str | Sequence[str | Word] = (),
    *,
    swapped: bool = False,
    positions: int = 1,
    top: int = 10,
) -> tuple[LensTrace, LensTrace]:
    """The traces of two models on one prompt, with the same tracked words.

    Where no word is given, those are tracked that are best in any layer of either. swapped: the states of each go
    through the final norm and head of the other, which shows what of a change lies in the layers and what in the head;
    the last rows are then nobody's own logits, so only the plain ones are checked.
    Raises DataError where heads are to be swapped between models of different width.
    """
    models = (one, other)
    bodies = [anatomy(opened.model, opened.name) for opened in models]
    heads = [bodies[1], bodies[0]] if swapped else [None, None]
    if swapped:
        check_fits(*bodies)
    rows = min(len(parts.matrix) for parts in bodies)
    given = [as_words(track, opened.tokenizer, rows) for opened in models]
    seen = [
        see(parts, opened.tokenizer, encode(opened.tokenizer, prompt, len(parts.matrix), opened.name), words, positions)
        for parts, opened, words in zip(bodies, models, given, strict=True)
    ]
    words = given if given[0] else _either(seen, [best_anywhere(s, h) for s, h in zip(seen, heads, strict=True)])
    found = [
        look(s, w, bool(given[0]), top=top, head=h) for s, w, h in zip(seen, words, heads, strict=True)
    ]  # fmt: skip
    return found[0], found[1]


def _either(seen: Sequence[Seen], best: Sequence[list[Word]]) -> list[list[Word]]:
    """The best tokens of both, for each model under its own ids; what only one of the tokenizers has is left out."""
    lists: list[list[Word]] = [[], []]
    for owner, words in enumerate(best):
        for word in words:
            index = word.spellings[0].ids[0]
            try:
                there = seen[1 - owner].tokenizer.id(seen[owner].tokenizer.token(index))
            except DataError:  # a row without a token
                continue
            if there is not None and all(word.text != known.text for known in lists[0]):
                lists[owner].append(word)
                lists[1 - owner].append(Word(word.text, (Spelling(word.text, (there,)),)))
    return lists
