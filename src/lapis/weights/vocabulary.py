"""Which token is which: vocabularies are compared by the token's string, never by its number.

Reads tokenizer.json and the small files beside it as plain JSON; nothing is encoded here (text/tokenizer/ does that).
Leaves out: vocabularies that exist only as a SentencePiece model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.files import read_json
from lapis.errors import CheckpointError


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model folder.

    ids: token string -> id. added: tokens that stand outside the learned vocabulary; special: those of them that text
    never yields. template: the chat template's source. named: role ("eos", "bos", "pad", "unk") -> token.
    ends: ids that end a generation, from generation_config.json, config.json and the tokenizer's own eos.
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
            return bytes(_BYTES.get(c, 0x3F) for c in token).decode("utf-8", errors="replace")
        return token.replace("▁", " ")

    def kind(self, token: str) -> str:
        """special, unused (a reserved place), added, byte (a piece of a character) or word."""
        if token in self.added and _UNUSED.search(token):
            return "unused"
        if token in self.special:
            return "special"
        if token in self.added:
            return "added"
        return "byte" if "\ufffd" in self.text(token) or _BYTE.fullmatch(token) else "word"

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    def tokens(self) -> dict[int, str]:
        return {i: token for token, i in self.ids.items()}


def open_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a folder; None where it holds no tokenizer that can be read as text."""
    ids: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    settings = _object(checkpoint, "tokenizer_config.json")
    tokenizer = checkpoint.json("tokenizer.json")
    if tokenizer is not None:
        model = tokenizer.get("model", {}) if isinstance(tokenizer, dict) else {}
        table = model.get("vocab")
        if isinstance(table, dict):
            ids = dict(table)
        elif isinstance(table, list):  # Unigram: [token, score] in the order of ids
            ids = {entry[0]: i for i, entry in enumerate(table)}
        added = tokenizer.get("added_tokens") or []
    elif isinstance(table := checkpoint.json("vocab.json"), dict):
        ids = dict(table)
        added = [{"id": int(i), **token} for i, token in (settings.get("added_tokens_decoder") or {}).items()]
    elif path := checkpoint.file("vocab.txt"):
        ids = {line: i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines())}
    else:
        return None
    where = f"{checkpoint.source}: the tokenizer"
    if not all(isinstance(i, int) and i >= 0 for i in ids.values()):
        raise CheckpointError(f"{where} gives a token an id that is not a whole number from 0 on")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not isinstance(token["id"], int):
            raise CheckpointError(f"{where} has an added token without content and id: {token!r:.80}")
        ids[token["content"]] = token["id"]
    named = {}
    for role in ("bos", "eos", "pad", "unk"):
        entry = settings.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text in ids:
            named[role] = text
    return Vocabulary(
        ids,
        frozenset(token["content"] for token in added),
        frozenset(token["content"] for token in added if token.get("special")),
        _template(checkpoint, settings),
        named,
        _ends(checkpoint, ids, named),
        _is_byte_level(tokenizer, ids),
    )


def template_tokens(chat: Vocabulary, base: Vocabulary | None) -> list[str]:
    """The tokens that only chatting gave a meaning: whose rows a base model, and its continuation, never trained.

    These are the added tokens whose text stands in the chat template, and the chat model's end tokens, save those that
    the base itself names as begin, end or padding, for these it has trained.
    """
    written = {
        token
        for token in chat.added
        if chat.template and token in chat.template and (token in chat.special or _is_tag(token))
    }
    known = set(base.named.values()) | {t for t, i in base.ids.items() if i in base.ends} if base else set()
    ends = {token for token, i in chat.ids.items() if i in chat.ends}
    return sorted(written | (ends - known), key=lambda token: chat.ids[token])


def relation(one: Vocabulary, other: Vocabulary, rows: tuple[int, int] = (0, 0)) -> str:
    """How `one` relates to `other` by token string: equal, padded, extended, reduced, permuted or different.

    rows: embedding rows of both; "padded" is equal tokens with a different number of rows.
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


def rows_for(tokens: Sequence[str | None], other: Vocabulary) -> list[int]:
    """For each token its row in `other`; -1 where it has none."""
    return [-1 if token is None else other.ids.get(token, -1) for token in tokens]


def _is_byte_level(tokenizer: Any, ids: Mapping[str, int]) -> bool:
    """Whether token strings spell bytes in GPT-2's alphabet (a space is written Ġ)."""
    decoder = tokenizer.get("decoder") if isinstance(tokenizer, dict) else None
    steps = [decoder, *(decoder.get("decoders") or [])] if isinstance(decoder, dict) else []
    return any(isinstance(s, dict) and s.get("type") == "ByteLevel" for s in steps) or "Ġ" in ids


def _gpt2_bytes() -> dict[str, int]:
    """Character -> byte in GPT-2's alphabet, where bytes that do not print stand 256 places higher."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES = _gpt2_bytes()
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNUSED = re.compile(r"unused|reserved|extra_id|placeholder|dummy", re.IGNORECASE)


def _is_tag(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in {("<", ">"), ("[", "]")}


def _template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    if path := checkpoint.file("chat_template.jinja"):
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def _ends(checkpoint: Checkpoint, ids: Mapping[str, int], named: Mapping[str, str]) -> tuple[int, ...]:
    found: list[int] = [ids[named["eos"]]] if "eos" in named else []
    for settings in (_object(checkpoint, "generation_config.json"), checkpoint.config):
        value = settings.get("eos_token_id")
        found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return tuple(dict.fromkeys(found))


def _object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    path = checkpoint.file(name)
    value = None if path is None else read_json(path)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not an object")
    return value or {}
