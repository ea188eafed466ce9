"""Numbers and paths as people read them: "1 step", "2 steps", "1,000 steps"; of a path its last part."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
# the folders of a path that is known by its beginning (/a, ~/a, ../a, C:\a); their names may have spaces
ROOTED = re.compile(
    r"""(?<![^\s"'`,;=|()\[\]{}<>])((file:)?|~[\w.-]*|\.{1,2}|[A-Za-z]:)[/\\]([^"'`,;|<>]*[/\\])?(?=[^\s/\\])"""
)
WORD = re.compile(r"""[^\s"'`,;=|()\[\]{}<>]+""")
FILE = re.compile(r"\.(csv|gguf|gz|html|jsonl?|md|parquet|py|safetensors|toml|tsv|txt|ya?ml|zst)$", re.IGNORECASE)


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


def without_folders(value: Any) -> Any:
    """A setting as others may read it: of each path the last part, since folders of a machine are its owner's business.

    Args:
        value: Text, a path, or a list or mapping of such. Ids of the hub, its data sets and addresses stay, and so does
            all that is no text.
    """
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(each) for each in value]
    if isinstance(value, PurePath):
        return value.name
    if not isinstance(value, str):
        return value
    return WORD.sub(lambda word: _last_part(word[0]), ROOTED.sub("", value))


def _last_part(word: str) -> str:
    named = HUB_ID.fullmatch(word.partition("@")[0]) and not FILE.search(word)
    if named or word.startswith("hub:") or "://" in word:
        return word
    return word.rstrip("/").rpartition("/")[2] or word
