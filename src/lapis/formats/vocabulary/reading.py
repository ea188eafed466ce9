"""Text to ids as llama.cpp gives them by what a GGUF file says: its tokens, their types, merges or scores, and flags.

Four kinds: "gpt2" (byte-level BPE, cut by a named splitting), "llama" (SentencePiece's BPE: of all neighbors that
together are a token the best score is merged first), "bert" (WordPiece) and "t5" (Unigram, in unigram.py). Special
tokens are looked for first, the longest first. This is what an export is held against, and what an import builds a
tokenizer from.
"""

import heapq
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from lapis.errors import CheckpointError
from lapis.formats.vocabulary.patterns import SPLITTINGS, splitting_named
from lapis.formats.vocabulary.unigram import SPACE, CharacterMap, spaced, unigram
from lapis.wording import format_count

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODELS = ("gpt2", "llama", "bert", "t5")
PREFIX = "tokenizer.ggml."

# llama.cpp takes these for control tokens, whatever the file says of their type
CONTROL_NAMES = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <|fim_prefix|> <|fim_suffix|> <|fim_middle|> "
    "<|fim_pad|> <|repo_name|> <|file_sep|> <PRE> <SUF> <MID> <PAD> <REPO> <reponame> <fim_prefix> <fim_suffix> "
    "<fim_middle> <fim_pad> <fim-prefix> <fim-suffix> <fim-middle> <fim-pad> <fim-repo> <|fim_repo|>".split()
)
_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


@dataclass(frozen=True)
class FileVocabulary:
    """What a GGUF file says of its tokenizer.

    Attributes:
        model: Of MODELS.
        pre: Name of the splitting; "" where the model has none.
        tokens: By id.
        types: NORMAL, CONTROL, ... by id.
        scores: By id, for "llama" and "t5".
        merges: Pairs, the first first, for "gpt2".
        flags: add_bos_token, add_eos_token, add_space_prefix, remove_extra_whitespaces, lowercase, strip_accents.
        named: "bos", "eos", "unknown", "padding", "eot", ... -> id.
        characters: SentencePiece's map of characters, for "t5".
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    flags: Mapping[str, bool]
    named: Mapping[str, int]
    characters: bytes = b""

    def type_of(self, index: int) -> int:
        return CONTROL if self.tokens[index] in CONTROL_NAMES else self.types[index]


def read_file_vocabulary(fields: Mapping[str, Any]) -> FileVocabulary:
    """The tokenizer that a file's fields describe. Raises CheckpointError for one that contradicts itself."""
    model, tokens = fields.get(PREFIX + "model"), fields.get(PREFIX + "tokens")
    if model not in MODELS:
        raise CheckpointError(f"tokenizer.ggml.model is {model!r:.40}; lapis reads {', '.join(MODELS)}")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("tokenizer.ggml.tokens is no list of texts")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.tokens holds {format_count(len(tokens) - len(set(tokens)), 'token')} twice"
        )
    types = fields.get(PREFIX + "token_type", [NORMAL] * len(tokens))
    scores = fields.get(PREFIX + "scores", [0.0] * len(tokens))
    for name, values in (("token_type", types), ("scores", scores)):
        numbers = isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != len(tokens):
            raise CheckpointError(f"tokenizer.ggml.{name} is no list of one number for each of {len(tokens):,} tokens")
    named = {}
    for key, value in fields.items():
        if key.startswith(PREFIX) and key.endswith("_token_id"):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
                raise CheckpointError(f"{key} is {value!r:.40}; there are {len(tokens):,} tokens")
            named[key.removeprefix(PREFIX).removesuffix("_token_id")] = value
    pre = fields.get(PREFIX + "pre", "default") if model == "gpt2" else ""
    bos = model in ("llama", "bert") or (pre in SPLITTINGS and pre in ("llama-bpe", "tekken"))
    lowercase = _flag(fields, "normalizer.lowercase", True)
    flags = {
        "add_bos_token": _flag(fields, "add_bos_token", bos),
        "add_eos_token": _flag(fields, "add_eos_token", model in ("bert", "t5")),
        "add_space_prefix": _flag(fields, "add_space_prefix", model == "llama"),
        "remove_extra_whitespaces": _flag(fields, "remove_extra_whitespaces", False),
        "lowercase": lowercase,
        "strip_accents": _flag(fields, "normalizer.strip_accents", lowercase),
    }
    characters = fields.get(PREFIX + "precompiled_charsmap", b"") if model == "t5" else b""
    try:
        characters = bytes(characters)
    except (TypeError, ValueError):
        raise CheckpointError("tokenizer.ggml.precompiled_charsmap is no list of bytes") from None
    return FileVocabulary(model, str(pre), tokens, types, scores, _merges(fields, model), flags, named, characters)


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(PREFIX + name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"tokenizer.ggml.{name} is {value!r:.40}; expected true or false")
    return value


def _merges(fields: Mapping[str, Any], model: str) -> list[tuple[str, str]]:
    if model != "gpt2":
        return []
    lines = fields.get(PREFIX + "merges")
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise CheckpointError("tokenizer.ggml.merges is no list of texts; a byte-level tokenizer needs them")
    pairs = []
    for line in lines:
        first, space, second = line.partition(" ")
        if not first or not space or not second:
            raise CheckpointError(f"tokenizer.ggml.merges: {line!r:.40} is no pair of tokens")
        pairs.append((first, second))
    return pairs


class FileTokenizer:
    """Ids for text, by a file's vocabulary."""

    def __init__(self, vocabulary: FileVocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        kinds: dict[str, Callable[[FileTokenizer], Callable[[str], list[int]]]] = {
            "gpt2": _byte_level, "llama": _sentence_piece, "bert": _word_piece, "t5": _unigram,
        }  # fmt: skip
        self.encode_piece = kinds[vocabulary.model](self)
        looked_for = {CONTROL, USER_DEFINED, UNKNOWN}
        special = [i for i in range(len(vocabulary.tokens)) if vocabulary.type_of(i) in looked_for]
        self.special = sorted(special, key=lambda i: -len(vocabulary.tokens[i].encode()))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. special: control tokens that the text spells become those tokens; user-defined always do."""
        pieces: list[str | int] = [text] if text else []
        for index in self.special:
            token = self.vocabulary.tokens[index]
            if token in text and (special or self.vocabulary.type_of(index) == USER_DEFINED):
                pieces = [part for piece in pieces for part in _cut(piece, token, index)]
        ids: list[int] = []
        after_special = True
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                prefixed = self.vocabulary.model != "t5" and self.vocabulary.flags["add_space_prefix"]
                lead = " " if prefixed and after_special else ""
                ids += self.encode_piece(lead + piece)
            after_special = isinstance(piece, int)
        return ids


def _cut(piece: str | int, token: str, index: int) -> list[str | int]:
    """A text around each place of a token; what is a token already stays."""
    if isinstance(piece, int) or token not in piece:
        return [piece]
    parts: list[str | int] = []
    for n, part in enumerate(piece.split(token)):
        parts += [index] if n else []
        parts += [part] if part else []
    return parts


def _byte_level(reader: FileTokenizer) -> Callable[[str], list[int]]:
    vocabulary = reader.vocabulary
    splitting = splitting_named(vocabulary.pre)
    try:
        model = models.BPE(vocab=reader.ids, merges=vocabulary.merges, ignore_merges=splitting.whole_words)
    except Exception as error:  # the library raises nothing more precise
        reason = "".join(c if c.isprintable() else "?" for c in str(error))[:160]
        raise CheckpointError(f"tokenizer.ggml.merges and tokens do not fit: {reason}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitting.pre_tokenizer()

    def encode(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _sentence_piece(reader: FileTokenizer) -> Callable[[str], list[int]]:
    vocabulary, ids, scores = reader.vocabulary, reader.ids, reader.vocabulary.scores
    unknown = vocabulary.named.get("unknown", 0)

    def encode(text: str) -> list[int]:
        parts = list(text.replace(" ", SPACE))
        before, after = list(range(-1, len(parts) - 1)), [*range(1, len(parts)), -1]
        waiting: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (index := ids.get(parts[left] + parts[right])) is not None:
                heapq.heappush(waiting, (-scores[index], left, right, parts[left] + parts[right]))

        for i in range(1, len(parts)):
            offer(i - 1, i)
        while waiting:
            _, left, right, merged = heapq.heappop(waiting)
            if not parts[left] or not parts[right] or parts[left] + parts[right] != merged or after[left] != right:
                continue
            parts[left], parts[right] = merged, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        result: list[int] = []
        for part in filter(None, parts):
            if (index := ids.get(part)) is not None:
                result.append(index)
            else:
                result += [ids.get(f"<0x{byte:02X}>", unknown) for byte in part.encode()]
        return result

    return encode


def _word_piece(reader: FileTokenizer) -> Callable[[str], list[int]]:
    vocabulary, ids, flags = reader.vocabulary, reader.ids, reader.vocabulary.flags
    longest = max(map(len, vocabulary.tokens))
    unknown = vocabulary.named.get("unknown", 0)

    def pieces_of(word: str) -> list[int]:
        rest, pieces = SPACE + word, []
        while rest:
            end = next((n for n in range(min(len(rest), longest), 0, -1) if rest[:n] in ids), 0)
            if not end:
                return [unknown]
            pieces.append(ids[rest[:end]])
            rest = rest[end:]
        return pieces

    return lambda text: [i for word in _words(text, flags) for i in pieces_of(word)]


def _unigram(reader: FileTokenizer) -> Callable[[str], list[int]]:
    vocabulary, flags = reader.vocabulary, reader.vocabulary.flags
    kinds = [vocabulary.type_of(i) for i in range(len(vocabulary.tokens))]
    scores = [0.0 if kind == USER_DEFINED else float(np.float32(score))
              for kind, score in zip(kinds, vocabulary.scores, strict=True)]  # fmt: skip
    pieces = {token: i for token, i in reader.ids.items() if kinds[i] in (NORMAL, USER_DEFINED, UNUSED)}
    least = min((score for kind, score in zip(kinds, scores, strict=True) if kind == NORMAL), default=0.0)
    characters = CharacterMap(vocabulary.characters)
    encode = unigram(pieces, scores, least, vocabulary.named.get("unknown", 2))
    space = flags["add_space_prefix"], flags["remove_extra_whitespaces"]
    return lambda text: encode(spaced(characters.replaced(text), *space))


def loses_letters(text: str) -> bool:
    """Whether llama.cpp, stripping accents, takes more from a text: vowels of Hangul, vowel signs of India."""
    composed = unicodedata.normalize("NFC", text)
    return any("\uac00" <= char <= "\ud7a3" or unicodedata.category(char) == "Mc" for char in composed)


def _words(text: str, flags: Mapping[str, bool]) -> list[str]:
    """Words by white space; punctuation, ASCII symbols and Chinese characters stand alone."""
    words = [""]
    for char in text:
        if flags["strip_accents"]:  # llama.cpp keeps the first character of a decomposition, and no mark of any kind
            char = unicodedata.normalize("NFD", char)[0]
        kind, code = unicodedata.category(char), ord(char)
        if char.isspace() or kind == "Zs":
            words.append("")
        elif kind.startswith("C") or code in (0, 0xFFFD) or (flags["strip_accents"] and kind.startswith("M")):
            continue
        elif kind.startswith("P") or (code < 0x7F and kind.startswith("S")) or _is_chinese(code):
            words += [char, ""]
        else:
            words[-1] += char.lower() if flags["lowercase"] else char
    return [word for word in words if word]


def _is_chinese(code: int) -> bool:
    return any(first <= code <= last for first, last in _CHINESE)
