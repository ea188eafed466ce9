"""Which tensor of one model answers to which of another, and what kind of thing a tensor is."""

import re

from lapis.checkpoint import Checkpoint
from lapis.families.base import Part


def counterparts(owner: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """For each tensor of `owner` its name in `other`: the same name, else the same part under another prefix, else the
    embedding for the head of a model that ties the two. Tensors without one are left out."""
    by_part: dict[Part, list[str]] = {}
    for name in other.names:
        by_part.setdefault(other.part(name), []).append(name)
    embedding, head = (by_part.get(Part(None, component, "weight"), []) for component in ("embed", "head"))
    result = {}
    for name in owner.names:
        if name in other.index:
            result[name] = name
            continue
        part = owner.part(name)
        same = by_part.get(part, [])
        if len(same) == 1:
            result[name] = same[0]
        elif part == Part(None, "head", "weight") and not head and len(embedding) == 1:
            result[name] = embedding[0]
    return result


_NORM = re.compile(r"(^|[._])(norm|layernorm|ln|rmsnorm)([._0-9]|$)|norm$|^ln_")


def is_norm(part: Part) -> bool:
    """A layer norm, RMS norm, or query/key norm; by name, so that unknown families work."""
    return bool(_NORM.search(part.component.lower()))


def is_vocabulary(part: Part) -> bool:
    """The token embedding or the head that scores tokens: one row per token."""
    return part.component in ("embed", "head")
