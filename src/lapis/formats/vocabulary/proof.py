"""That two tokenizers give the same ids: on the probe, on words of the vocabulary, and around added tokens.

The first text that differs is shown with both readings. What agrees here is not proved for every text, but an export
that goes wrong goes wrong on one of these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lapis.errors import CheckpointError
from lapis.formats.vocabulary.probe import probe
from lapis.formats.vocabulary.reading import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    FileTokenizer,
    loses_letters,
    read_file_vocabulary,
)
from lapis.formats.vocabulary.unigram import SPACE
from lapis.text.tokenizer.folder import BYTE_OF

MOST_WORDS = 1000
MOST_SPECIAL = 200

Encode = Callable[[Sequence[str], bool], list[list[int]]]  # texts, whether special tokens are read -> ids


@dataclass(frozen=True)
class Proof:
    """proved: texts of the probe with equal ids. words: of the vocabulary. special: texts with added tokens in them."""

    pre: str
    proved: int
    words: int
    special: int

    def to_json(self) -> dict[str, Any]:
        return {"pre": self.pre, "proved": self.proved, "words": self.words, "special": self.special}


def prove(encode: Encode, reader: FileTokenizer, where: str) -> Proof:
    """Compares a tokenizer with what a file says of it.

    Args:
        encode: The tokenizer.
        reader: The file's.
        where: Named in the error.

    Raises:
        CheckpointError: With the first text whose ids differ, and what they are.
    """
    vocabulary = reader.vocabulary
    texts, words, special = probe(), sample_words(reader), _with_added(reader)
    if vocabulary.model == "bert" and vocabulary.flags["strip_accents"]:  # said in writing.py
        texts, words = ([text for text in group if not loses_letters(text)] for group in (texts, words))
    for group, as_special in ((texts, False), (words, False), (special, False), (special, True)):
        for text, expected in zip(group, encode(group, as_special), strict=True):
            actual = reader.encode(text, as_special)
            if actual != expected:
                raise CheckpointError(
                    f"{where}: a GGUF file cannot say this tokenizer: {text!r:.60} is {_few(expected)} and would be "
                    f"{_few(actual)} in llama.cpp"
                )
    return Proof(vocabulary.pre or vocabulary.model, len(texts), len(words), len(special))


def sample_words(reader: FileTokenizer) -> list[str]:
    """Texts that tokens spell: the newest of the vocabulary, where extended ones differ, and some of all the others."""
    vocabulary = reader.vocabulary
    normal = [i for i in range(len(vocabulary.tokens)) if vocabulary.type_of(i) == NORMAL]
    newest, others = normal[-MOST_WORDS // 2 :], normal[: -MOST_WORDS // 2]
    chosen = others[:: max(1, len(others) // (MOST_WORDS // 2))] + newest
    spelled = (_text_of(vocabulary.model, vocabulary.tokens[i]) for i in chosen)
    return list(dict.fromkeys(f"{text} {text}" for text in spelled if text))


def _text_of(model: str, token: str) -> str | None:
    """What a token reads as; None for a piece of a character."""
    if model != "gpt2":
        return token.replace(SPACE, " ")
    try:
        return bytes(BYTE_OF[char] for char in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None


def _with_added(reader: FileTokenizer) -> list[str]:
    """Each added token alone, inside a word and between words; of many, the first and the last."""
    vocabulary = reader.vocabulary
    added = [i for i, kind in enumerate(vocabulary.types) if kind in (CONTROL, USER_DEFINED)]
    if len(added) > MOST_SPECIAL:
        added = added[: MOST_SPECIAL // 2] + added[-MOST_SPECIAL // 2 :]
    tokens = [vocabulary.tokens[i] for i in added]
    return [text for token in tokens for text in (token, f"a{token}b", f"a {token} b\n{token}\n")]


def _few(ids: Sequence[int]) -> str:
    return f"{list(ids[:12])}" if len(ids) <= 12 else f"{str(list(ids[:12]))[:-1]}, ...]"


def choose_fields(
    candidates: Sequence[Mapping[str, Any]], encode: Encode, where: str
) -> tuple[Mapping[str, Any], Proof]:
    """The first of several descriptions that gives a tokenizer's ids, with its proof; else what the first one lacks."""
    problems = []
    for fields in candidates:
        try:
            return fields, prove(encode, FileTokenizer(read_file_vocabulary(fields)), where)
        except CheckpointError as error:
            problems.append(error)
    raise problems[0]
