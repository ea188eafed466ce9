"""Numbers in sentences, so that one is one: "1 step", "2 steps", "1,000 steps"."""


def format_count(count: int, one: str, many: str = "") -> str:
    """A number and what there is of it.

    Args:
        count: How many.
        one: What stands behind 1, with its verb where there is one ("tensor is left out").
        many: What stands behind other numbers; default: `one` and an s.
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def format_packed(texts: int, tokens: int) -> str:
    """How far packing is: "1 text, 12 tokens"."""
    return f"{format_count(texts, 'text')}, {format_count(tokens, 'token')}"


def format_part(part: int, whole: int, one: str, single: str, several: str) -> str:
    """Some of a number: "1 of 3 shards is missing".

    Args:
        part: How many of them.
        whole: How many there are.
        one: What one of them is.
        single: What stands behind, where `part` is 1 ("is missing").
        several: The same for others ("are missing").
    """
    return f"{part:,} of {format_count(whole, one)} {single if part == 1 else several}"
