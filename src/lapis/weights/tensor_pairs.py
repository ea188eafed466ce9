"""Which tensor of one model answers to which of another: by name, else by the part it plays."""

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
