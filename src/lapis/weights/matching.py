"""Which tensor of one model answers to which of another, and what kind of thing a tensor is."""

import re
from collections.abc import Mapping

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families.base import Part
from lapis.weights.fuse.opening import Model as Model
from lapis.weights.fuse.opening import open_each
from lapis.wording import format_count

_NORM = re.compile(r"(^|[._])(norm|layernorm|ln|rmsnorm)([._0-9]|$)|norm$|^ln_")
_SHOWN = 12


def open_models(models: Mapping[str, Model], what: str) -> dict[str, Checkpoint]:
    """Opens models by role.

    Raises:
        CheckpointError: With the problems of all models in one line; `what` names the command.
    """
    opened, refused = open_each(models)
    if refused:
        raise CheckpointError(format_problems(what, refusals(models, refused)))
    return opened


def refusals(models: Mapping[str, Model], refused: Mapping[str, CheckpointError]) -> list[str]:
    """Why models cannot be opened, by role; those with one reason, as a hub that is down, stand in one line."""
    same: dict[str, list[tuple[str, str]]] = {}
    for role, error in refused.items():
        model = models[role]
        source = model.source if isinstance(model, Checkpoint) else str(model)
        same.setdefault(str(error).removeprefix(f"{source}: "), []).append((role, source))
    lines = []
    for reason, those in same.items():
        (role, source), *others = those
        if others:
            lines.append(f"{', '.join(r if r == s else f'{r} ({s})' for r, s in those)}: {reason}")
        else:
            lines.append(str(refused[role]) if role == source else f"{role}: {refused[role]}")
    return lines


def format_problems(what: str, problems: list[str]) -> str:
    """All problems as one line, each once."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return f"{what}: {problems[0]}"
    listed = "; ".join(f"({i + 1}) {line}" for i, line in enumerate(problems[:_SHOWN]))
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{what}: {format_count(len(problems), 'problem')}: {listed}{more}"


def counterparts(owner: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """For each tensor of `owner` its name in `other`; tensors without one are left out.

    The same name; else the same name within the language model, whatever stands before it; else the same part; else
    the embedding, for the head of a model that ties the two.
    """
    by_part: dict[Part, list[str]] = {}
    by_inner: dict[str | None, list[str]] = {}
    for name in other.names:
        by_part.setdefault(other.part(name), []).append(name)
        by_inner.setdefault(other.towers.inner(name), []).append(name)
    embedding, head = (by_part.get(Part(None, component, "weight"), []) for component in ("embed", "head"))
    result = {}
    for name in owner.names:
        if name in other.index:
            result[name] = name
            continue
        inner, part = owner.towers.inner(name), owner.part(name)
        same = by_inner.get(inner, []) if inner is not None else []
        same = same if len(same) == 1 else by_part.get(part, [])
        if len(same) == 1:
            result[name] = same[0]
        elif part == Part(None, "head", "weight") and not head and len(embedding) == 1:
            result[name] = embedding[0]
    return result


def is_norm(part: Part) -> bool:
    """A layer norm, RMS norm, or query/key norm; by name, so that unknown families work."""
    return bool(_NORM.search(part.component.lower()))


def is_vocabulary(part: Part) -> bool:
    """The token embedding or the head that scores tokens: one row per token."""
    return part.component in ("embed", "head")


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the token embedding; None where no tensor is known as one."""
    for name, info in checkpoint.index.items():
        part = checkpoint.part(name)
        if part.component == "embed" and is_vocabulary(part) and len(info.shape) == 2:
            return info.shape[0]
    return None
