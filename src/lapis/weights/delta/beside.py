"""What lies beside the differences: the chat model's config, tokenizer, templates and settings, and a card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.hub.models import public_names, shown_name
from lapis.checkpoint.tensor_file import DELTA
from lapis.config import parse_yaml
from lapis.errors import ConfigError
from lapis.text.tokenizer.folder import CONFIG, TOKENIZER_FILES, copy_templates, write_json
from lapis.weights.config_fields import carried_config, settled_tie
from lapis.weights.tokenizer_files import GENERATION

_SPARE = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")  # all of it stands in tokenizer.json, too


def write_beside(chat: Checkpoint, description: Mapping[str, Any], folder: Path) -> list[str]:
    """Copies what makes the chat model chat, and writes the card.

    Args:
        chat: The model.
        description: Of the delta (file.py).
        folder: Where the files go.

    Returns:
        Lines that say what was left out.
    """
    root = chat.beside()
    whole = chat.file("tokenizer.json") is not None
    listed = [name for name in TOKENIZER_FILES if not (whole and name in _SPARE)]
    listed += [path.name for path in sorted(root.iterdir()) if path.name.upper().startswith(("LICENSE", "NOTICE"))]
    for name in [*listed, GENERATION]:
        source = chat.file(name)
        if source is not None:
            shutil.copyfile(source, folder / name)
    if (folder / CONFIG).exists():
        copy_templates(root, folder)
    config, dropped = carried_config(chat.config)
    config, untied = settled_tie(config, {"chat": chat})
    write_json(folder / "config.json", config)
    (folder / "README.md").write_text(_card(description), encoding="utf-8")
    return dropped + untied


def card_license(model: Checkpoint) -> str | None:
    """What a model's card (README.md) says that it is under; None where it says nothing."""
    path = model.file("README.md")
    if path is None or path.stat().st_size > 1 << 20:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    head, separator, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not separator:
        return None
    try:
        fields = parse_yaml(head, str(path))
    except ConfigError:
        return None
    value = fields.get("license") if isinstance(fields, dict) else None
    return value if isinstance(value, str) and len(value) < 200 else None


def _card(description: Mapping[str, Any]) -> str:
    base, chat = description["base"], description["chat"]
    what = f"rank {description['rank']}" if description["rank"] else f"bits: {description['bits']}"
    license_line = f"license: {json.dumps(description['license'])}\n" if description["license"] else ""
    base_name, chat_name = (shown_name(one["source"]) for one in (base, chat))
    parents = public_names([base["source"]])
    base_line = f"base_model:\n  - {json.dumps(parents[0])}\n" if parents else ""
    return f"""---
{base_line}{license_line}tags: [lapis, delta]
---

# What {chat_name} learned, as made by lapis {description["lapis"]}

The difference of two models ({what}), in `{DELTA}`. It is added to the base, or to a continuation of it, by

    lapis delta apply DIR --onto MODEL --out OUT

| | source | weights (sha256) |
|---|---|---|
| base | `{base_name}` | `{base["weights_sha256"]}` |
| chat | `{chat_name}` | |
"""
