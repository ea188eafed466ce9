"""config.json of a model in, the fields of it that an output has out, and lines that say what became of the others.

A file turns no code on, so fields that name code go (numbers 40 and 41 of the catalogue of faults); so do fields that a
known family has no use for. Nothing goes without a word. A head that differs from the embedding is kept apart from it,
whatever the file says (31).
"""

from collections.abc import Mapping
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.towers import change_language_config, language_config
from lapis.errors import CheckpointError
from lapis.families import find
from lapis.families.fields import CODE, Fields

_HANDLED = {"quantization_config"}  # whoever changes dtypes writes or removes it
_SHOWN = 8


def carried_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields that go on to an output, and what did not.

    Args:
        config: config.json of the model that is changed.
    """
    result, notes = dict(config), []
    code = [name for name in result if name in CODE]
    hidden = [name for name in result if name.startswith("_") and name not in ("_name_or_path", "_model_name_or_path")]
    unknown = _unknown(config) - set(code) - set(hidden)
    for name, inner in list(result.items()):
        if isinstance(inner, Mapping) and any(field in CODE or field.startswith("_") for field in map(str, inner)):
            result[name] = {k: v for k, v in inner.items() if k not in CODE and not k.startswith("_")}
            code += [f"{name}.{field}" for field in inner if field in CODE]
            hidden += [f"{name}.{field}" for field in inner if str(field).startswith("_")]
    for names, why in (
        (code, "names code, which no file turns on"), (hidden, "begins with an underscore"),
        (sorted(unknown), f"means nothing to a model of the type {config.get('model_type')!s:.40}"),
    ):  # fmt: skip
        for name in names:
            result.pop(name, None)
        if names:
            shown = ", ".join(f"{name:.60}" for name in names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
            notes.append(f"config.json: left out, since it {why}: {shown}")
    return result, notes


def settled_tie(config: dict[str, Any], inputs: Mapping[str, Checkpoint]) -> tuple[dict[str, Any], list[str]]:
    """config.json that does not tie a head to an embedding from which it differs.

    Args:
        config: What the output is to have.
        inputs: The models that the output is made from, by role.
    """
    language = language_config(config)
    family = find(language)
    try:
        tied = family.read_config(language).tied if family else bool(language.get("tie_word_embeddings"))
    except CheckpointError:
        tied = bool(language.get("tie_word_embeddings"))
    for role, checkpoint in inputs.items() if tied else ():
        names = {checkpoint.part(name).component: name for name in checkpoint.names
                 if checkpoint.part(name).kind == "weight" and len(checkpoint.info(name).shape) == 2}  # fmt: skip
        embed, head = names.get("embed"), names.get("head")
        if embed and head and not checkpoint.same_bytes(embed, head):
            note = (
                f"config.json ties the head to the embedding, but in {role} {head} differs from {embed}: both are kept"
            )
            return change_language_config(config, {"tie_word_embeddings": False}), [note]
    return config, []


def _unknown(config: Mapping[str, Any]) -> set[str]:
    """Fields that a known family neither reads nor hands on; none where the family is not known."""
    family = find(config)
    if family is None:
        return set()
    fields = Fields(config)
    try:
        family.reader(fields)
    except CheckpointError:
        return set()
    return fields.unknown() - _HANDLED
