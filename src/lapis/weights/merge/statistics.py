"""What `lapis gather` found out about a model, for methods that weigh with it: Gram matrices, or Fisher information.

A folder with one safetensors file; its tensors have the names of the model's. Its metadata hold the kind, which model
it is of, a sha256 of the values, and which tensors share one entry (those that read the same inputs). Leaves out: how
they are gathered (planning/gather.py).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.files import contained, stamp
from lapis.checkpoint.tensor_file import read_header
from lapis.errors import CheckpointError
from lapis.parsing import ParseError, parse_json

FILE = "statistics.safetensors"
FORMAT, VERSION = "lapis-statistics", "1"


def describe(kind: str, model: Checkpoint, same: Mapping[str, str], **more: Any) -> dict[str, str]:
    """The metadata of a file. same: tensor -> the one whose entry is its own, too."""
    about = {"kind": kind, "model": {"source": model.source, "headers_sha256": model.digest()}, "same": dict(same)}
    return {"format": FORMAT, "version": VERSION, "statistics": json.dumps(about | more)}


def open_statistics(folder: str | os.PathLike[str], kind: str, model: Checkpoint) -> Checkpoint:
    """A folder of statistics as named tensors.

    Args:
        folder: Of `lapis gather`.
        kind: gram or fisher.
        model: What it must have been gathered of.

    Raises:
        CheckpointError: For another kind, another model, a newer format, or what is no such folder.
    """
    root = Path(folder)
    if not os.path.lexists(root / FILE):
        raise CheckpointError(f"{folder}: holds no {FILE}; make it with lapis gather {model.source} --kind {kind}")
    file = contained(root, FILE)
    header = read_header(file)
    if header.metadata.get("format") != FORMAT or header.metadata.get("version") != VERSION:
        version = header.metadata.get("version")
        raise CheckpointError(
            f"{file}: format {version!r:.40} is not known, {VERSION} is; gather it again, or update lapis"
        )
    try:
        about = parse_json(header.metadata.get("statistics", ""))
        held, digest, same = about["kind"], about["model"]["headers_sha256"], dict(about["same"])
    except (ParseError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: its description cannot be read; gather it again") from None
    if held != kind:
        raise CheckpointError(f"{folder}: holds {held!s:.40} and not {kind}; gather it with --kind {kind}")
    if digest != model.digest():
        source = about["model"].get("source")
        raise CheckpointError(
            f"{folder}: was gathered of another model ({source!s:.200}) than {model.source}; gather it of this one"
        )
    index = dict(header.tensors)
    index |= {name: header.tensors[other] for name, other in same.items() if other in header.tensors}
    opened = Checkpoint(str(folder), root, {}, None, index, {FILE: header}, [], {file: stamp(file.stat())})
    return replace(opened, family=model.family)
