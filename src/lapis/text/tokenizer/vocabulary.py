"""The tokens of a folder as a table, and how two such tables relate: which token has which id, and what it reads as.

Vocabularies are compared by the token's string, never by its number. Read from JSON alone (folder.py), so that it costs
nothing where nothing is encoded. Leaves out vocabularies that exist only as a SentencePiece model.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.files import contained
from lapis.errors import CheckpointError
from lapis.parsing import quoted
from lapis.text.tokenizer.folder import (
    BYTE_OF,
    eos_ids,
    has_file,
    read_added_tokens,
    read_named_tokens,
    read_object,
    read_templates,
)

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how SentencePiece spells a byte
_UNUSED = re.compile(r"unused|reserved|extra_id|placeholder|dummy", re.IGNORECASE)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer folder.

    Attributes:
        ids: Token string -> id.
        added: Tokens that stand outside the learned vocabulary.
        special: Those of the added tokens that text never yields.
        template: The source of the chat template, or None.
        named: Role ("eos_token", "bos_token", ...) without its "_token" -> token, for tokens that have an id.
        ends: Ids that end a generation, from the tokenizer's eos, generation_config.json and config.json.
        byte_level: Whether token strings spell bytes in GPT-2's alphabet (a space is written Ġ).
    """

    ids: Mapping[str, int]
    added: frozenset[str] = frozenset()
    special: frozenset[str] = frozenset()
    template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    byte_level: bool = False

    def text(self, token: str) -> str:
        """The token as it reads: bytes decoded, marks of a space shown as a space."""
        if token in self.added:
            return token
        if self.byte_level:
            return bytes(BYTE_OF.get(c, 0x3F) for c in token).decode("utf-8", errors="replace")
        return token.replace("▁", " ")

    def kind(self, token: str) -> str:
        """special, unused (a reserved place), added, byte (a piece of a character) or word."""
        if token in self.added and _UNUSED.search(token):
            return "unused"
        if token in self.special:
            return "special"
        if token in self.added:
            return "added"
        return "byte" if "\ufffd" in self.text(token) or BYTE_TOKEN.fullmatch(token) else "word"

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    def tokens(self) -> dict[int, str]:
        """Id -> token string."""
        return {i: token for token, i in self.ids.items()}


def read_vocabulary(folder: Path, config: Mapping[str, Any] | None = None) -> Vocabulary | None:
    """The vocabulary of a folder.

    Args:
        folder: A folder with tokenizer.json, vocab.json or vocab.txt.
        config: The model's config.json where it was read already.

    Returns:
        None where the folder holds no tokenizer that can be read as text.

    Raises:
        CheckpointError: For ids or added tokens that are none, naming the folder.
    """
    document = read_object(folder, "tokenizer.json")
    if document:
        ids = _model_ids(document)
        added = document.get("added_tokens") or []
    elif has_file(folder, "vocab.json"):
        ids = dict(read_object(folder, "vocab.json"))
        added = [{"id": i, **token} for i, token in read_added_tokens(folder).items()]
    elif has_file(folder, "vocab.txt"):
        lines = contained(folder, "vocab.txt").read_text(encoding="utf-8").splitlines()
        ids, added = {line: i for i, line in enumerate(lines)}, []
    else:
        return None
    where = f"{folder}: the tokenizer"
    if not all(isinstance(i, int) and i >= 0 for i in ids.values()):
        raise CheckpointError(f"{where} gives a token an id that is not a whole number from 0 on")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not isinstance(token["id"], int):
            raise CheckpointError(f"{where} has an added token without content and id: {quoted(token)}")
        ids[token["content"]] = token["id"]
    named = {name: token for name, token in read_named_tokens(folder).items() if token in ids}
    ends = [ids[named["eos_token"]]] if "eos_token" in named else []
    ends += eos_ids(read_object(folder, "generation_config.json"), folder / "generation_config.json")
    ends += eos_ids(read_object(folder, "config.json") if config is None else config, folder / "config.json")
    templates = read_templates(folder)
    return Vocabulary(
        ids=ids,
        added=frozenset(token["content"] for token in added),
        special=frozenset(token["content"] for token in added if token.get("special")),
        template=templates.get("default") or next(iter(templates.values()), None),
        named={name.removesuffix("_token"): token for name, token in named.items()},
        ends=tuple(dict.fromkeys(ends)),
        byte_level=_is_byte_level(document, ids),
    )


def _model_ids(document: Mapping[str, Any]) -> dict[str, int]:
    table = document.get("model", {}).get("vocab")
    if isinstance(table, list):  # Unigram: [token, score] in the order of ids
        return {entry[0]: i for i, entry in enumerate(table)}
    return dict(table) if isinstance(table, dict) else {}


def _is_byte_level(document: Mapping[str, Any], ids: Mapping[str, int]) -> bool:
    decoder = document.get("decoder")
    steps = [decoder, *(decoder.get("decoders") or [])] if isinstance(decoder, dict) else []
    return any(isinstance(s, dict) and s.get("type") == "ByteLevel" for s in steps) or "Ġ" in ids


def open_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a checkpoint, an adapter's own before its base's; None where it has none that is text."""
    if checkpoint.front is not None and has_file(checkpoint.front, "tokenizer.json"):
        return read_vocabulary(checkpoint.front, checkpoint.config)
    return read_vocabulary(checkpoint.beside(), checkpoint.config)


def relation(one: Vocabulary, other: Vocabulary, rows: tuple[int, int] = (0, 0)) -> str:
    """How `one` relates to `other` by token string.

    Args:
        one: A vocabulary.
        other: Another.
        rows: Embedding rows of both; "padded" is equal tokens with a different number of rows.

    Returns:
        equal, padded, extended, reduced, permuted or different.
    """
    if one.ids == other.ids:
        return "equal" if rows[0] == rows[1] else "padded"
    shared = one.ids.keys() & other.ids.keys()
    same_place = all(one.ids[token] == other.ids[token] for token in shared)
    if not same_place:
        return "permuted" if len(shared) == len(one.ids) == len(other.ids) else "different"
    if len(shared) == len(other.ids):
        return "extended"
    return "reduced" if len(shared) == len(one.ids) else "different"


def differences(words: Vocabulary, tokens: Iterable[str], shown: int = 5) -> str:
    """How many tokens, and the first ones as they read: 12,345 tokens (" yang", " dan", ...).

    Args:
        words: Whose tokens they are.
        tokens: Some of them.
        shown: How many are named.
    """
    listed = sorted(tokens, key=lambda token: words.ids[token])
    readable = [text for token in listed if (text := words.text(token)).strip() and "\ufffd" not in text]
    named = ", ".join(quoted(text) for text in (readable or listed)[:shown])
    more = ", ..." if len(listed) > shown else ""
    return f"{len(listed):,} {'token' if len(listed) == 1 else 'tokens'} ({named}{more})"


def rows_for(tokens: Sequence[str | None], other: Vocabulary) -> list[int]:
    """For each token its row in `other`; -1 where it has none."""
    return [-1 if token is None else other.ids.get(token, -1) for token in tokens]
