"""The account that lies beside made weights: lapis-merge.json, and README.md as hubs read it.

It says what was asked for, of which inputs, and what became of every tensor. It holds nothing that differs between two
runs of the same job (no times, no memory).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from lapis import __version__
from lapis.checkpoint import Checkpoint
from lapis.checkpoint.hub.models import public_names, shown_name
from lapis.text.tokenizer.folder import write_json
from lapis.weights.engine.outputs import Figures
from lapis.weights.tokenizer_files import ACCOUNT
from lapis.wording import format_count, without_folders


@dataclass(frozen=True)
class Entry:
    """What becomes of one tensor. action: merged, copied or skipped; reason: why, where it is not merged."""

    name: str
    action: str
    reason: str = ""
    scale: Any = None
    role: str = "onto"


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which model an input was: source, commit where its folder tells, digest of its headers, bytes."""
    result: dict[str, Any] = {"source": checkpoint.source}
    if checkpoint.root.resolve().parent.name == "snapshots":
        result["commit"] = checkpoint.root.resolve().name
    return result | {"headers_sha256": checkpoint.digest(), "bytes": checkpoint.nbytes}


def count(entries: Sequence[Entry]) -> dict[str, int]:
    seen = Counter(entry.action for entry in entries)
    return {action: seen[action] for action in ("merged", "copied", "skipped")}


def lost_in_all(figures: Mapping[str, Figures]) -> float | None:
    """The share of the whole delta lost to rounding, over all tensors that have one."""
    seen = [f for f in figures.values() if f.has_delta]
    delta = sum(f.delta_sq for f in seen)
    return (sqrt(sum(f.error_sq for f in seen) / delta) if delta else 0.0) if seen else None


def write_account(
    folder: Path,
    command: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Checkpoint],
    entries: Sequence[Entry],
    figures: Mapping[str, Figures],
    notes: Sequence[str],
    **more: Any,
) -> None:
    """lapis-merge.json and README.md in `folder`. more: further sections of the account (vocabulary, ...)."""
    tensors, skipped = [], []
    for entry in entries:
        line: dict[str, Any] = {"name": entry.name, "action": entry.action}
        if entry.action == "skipped":
            skipped.append({"role": entry.role, "name": entry.name, "reason": entry.reason})
            continue
        if entry.reason:
            line["reason"] = entry.reason
        if entry.scale is not None:
            line["scale"] = entry.scale
        seen = figures.get(entry.name)
        if seen and seen.has_delta:
            line |= {"delta_norm": sqrt(seen.delta_sq), "lost_to_rounding": seen.lost}
        if seen and seen.nonfinite:
            line["nonfinite"] = seen.nonfinite
        tensors.append(line)
    document = {
        "lapis": __version__,
        "command": command,
        "recipe": dict(recipe),
        "inputs": {role: identity(checkpoint) for role, checkpoint in inputs.items()},
        "counts": count(entries),
        "lost_to_rounding": lost_in_all(figures),
        **more,
        "notes": list(notes),
        "tensors": tensors,
        "skipped": skipped,
    }
    write_json(folder / ACCOUNT, document)
    (folder / "README.md").write_text(_card(command, document), encoding="utf-8")


def _card(command: str, document: Mapping[str, Any]) -> str:
    """README.md as hubs read it: models of the hub by their ids, all else by the last part of its name."""
    inputs, counts, lost = document["inputs"], document["counts"], document["lost_to_rounding"]
    parents = public_names(entry["source"] for entry in inputs.values())
    base_model = "".join(["base_model:\n", *(f"  - {name}\n" for name in dict.fromkeys(parents))]) if parents else ""
    names = {name: shown_name(entry["source"]) for role, entry in inputs.items() for name in (role, entry["source"])}
    names = {name: shown for name, shown in names.items() if "/" in name}  # a merge's inputs have no other role
    rows = "\n".join(
        f"| {names.get(role, role)} | `{shown_name(entry['source'])}` | {entry['bytes'] / 1e9:,.2f} GB | "
        f"`{entry['headers_sha256'][:16]}` |"
        for role, entry in inputs.items()
    )
    settings = without_folders(_renamed(document["recipe"], names))
    recipe = "\n".join(f"| {key} | `{value}` |" for key, value in settings.items())
    notes = "\n".join(f"- {note}" for note in _renamed(document["notes"], names))
    rounding = "" if lost is None else f" Rounding to the stored dtype took {lost:.2%} of the difference (by norm)."
    return f"""---
{base_model}library_name: transformers
tags: [{", ".join(dict.fromkeys(["lapis", "merge", command]))}]
---

# Made by lapis {document["lapis"]}: {command}

{format_count(counts["merged"], "tensor was", "tensors were")} merged, {counts["copied"]} copied.{rounding}

| input | source | size | headers (sha256) |
|---|---|---|---|
{rows}

| setting | value |
|---|---|
{recipe}

{notes}

What became of every tensor is in `{ACCOUNT}`.
"""


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Texts in lists and mappings, with each of these names as it is shown."""
    if isinstance(value, Mapping):
        return {_renamed(key, names): _renamed(each, names) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(each, names) for each in value]
    if not isinstance(value, str) or not names:
        return value
    listed = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w./-])(?:{listed})(?![\w./-])", lambda name: names[name[0]], value)
