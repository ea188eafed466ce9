"""Text that is divided on the way, so that nothing is measured on what was learned from: what the model drew itself,
and what is held out where scales are learned on a part of it.

How text that was given is divided, before anything is done: texts.py.
"""

from collections.abc import Iterable, Sequence

from lapis.errors import DataError
from lapis.language.replay import Drawn
from lapis.language.texts import is_held_out


def divide_drawn(drawn: Iterable[Drawn], source: str) -> tuple[list[Drawn], list[Drawn]]:
    """Drawn texts to learn from, and held-out ones, each text once. Which it is depends on the text alone.

    Args:
        drawn: What a model drew.
        source: The model.

    Raises:
        DataError: Where it drew one text again and again.
    """
    differ: dict[str, Drawn] = {}
    for each in drawn:
        differ.setdefault(each.plain.strip(), each)
    learn: list[Drawn] = []
    held: list[Drawn] = []
    for text, each in differ.items():
        (held if is_held_out(text) else learn).append(each)
    for some, none in ((learn, held), (held, learn)):
        if len(some) > 1 and not none:  # of few texts chance put all on one side
            none.append(some.pop())
    if not learn or not held:
        raise DataError(f"adapt: replay is self, and {source} draws one text again and again; give text as replay")
    return learn, held


def halves(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Held-out texts to measure on, and others to learn scales on: every second one; one alone is cut in two.

    Raises:
        DataError: For a single character.
    """
    if len(texts) == 1:
        middle = len(texts[0]) // 2
        texts = [texts[0][:middle], texts[0][middle:]]
    if not all(text.strip() for text in texts[:2]):
        raise DataError("adapt: scale is plan, and the held-out text is one word; give more text, or a number as scale")
    return list(texts[::2]), list(texts[1::2])
