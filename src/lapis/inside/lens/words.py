"""Tracked words as tokens: each with and without a leading space, in as many tokens as the tokenizer needs.

What is tracked is read through the tokenizer behind a line break, so that one which begins every text with a space
(SentencePiece) gives both spellings too. Leaves out: the figures of a word (logit_lens.py).
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from lapis.errors import ConfigError, DataError
from lapis.text.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Spelling:
    """One way to write a word: the text with its leading space, if any, and its token ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Word:
    """What is tracked. The spellings differ in their first token, so that their probabilities may be added."""

    text: str
    spellings: tuple[Spelling, ...]


def as_words(track: str | Iterable[str | Word], tokenizer: Tokenizer, rows: int) -> list[Word]:
    """The words of "Malaysia,Indonesia" or of a list, each once. rows: of the head; a token beyond them is refused."""
    if isinstance(track, str):
        track = [part.strip() for part in track.split(",") if part.strip()]
    words = {}
    for item in track:
        word = item if isinstance(item, Word) else spell(item, tokenizer)
        highest = max(i for spelling in word.spellings for i in spelling.ids)
        if highest >= rows:
            raise DataError(f'lens: "{word.text}" needs token {highest}, but the head has {rows:,} rows; track another')
        words[word.text] = word
    return list(words.values())


def spell(word: str, tokenizer: Tokenizer) -> Word:
    """A word's spellings. One that begins with a space has only that one; a special token is that token itself.

    Raises ConfigError for a word that the tokenizer cannot express.
    """
    if not word.strip():
        raise ConfigError("lens: a tracked word is empty; give words parted by commas")
    if word in tokenizer.special:
        return Word(word, (Spelling(word, (tokenizer.special[word],)),))
    found: dict[int, Spelling] = {}
    for text in (word,) if word[0].isspace() else (" " + word, word):
        ids = _behind_a_break(text, tokenizer)
        if _says(ids, word, tokenizer):
            kept = found.get(ids[0])
            if kept is None or len(ids) < len(kept.ids):
                found[ids[0]] = Spelling(text, ids)
    if not found:
        raise ConfigError(f'lens: the tokenizer cannot express "{word}"; track a word in characters that it knows')
    return Word(word, tuple(found.values()))


def token_word(index: int, tokenizer: Tokenizer) -> Word:
    """A single token as a word, by its id."""
    text = token_text(index, tokenizer)
    return Word(text, (Spelling(text, (index,)),))


def token_text(index: int, tokenizer: Tokenizer) -> str:
    """A token as a reader can see it. A head may have more rows than the tokenizer has tokens."""
    try:
        return tokenizer.text(index)
    except DataError:
        return f"<row {index}>"


def _behind_a_break(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the text as it stands inside a longer one."""
    lead, whole = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    if lead and whole[: len(lead)] == lead and len(whole) > len(lead):
        return tuple(whole[len(lead) :])
    return tuple(tokenizer.encode(text))


def _says(ids: tuple[int, ...], word: str, tokenizer: Tokenizer) -> bool:
    """Whether the ids read as the word again, up to case and Unicode's normal forms, with no unknown token in them."""
    unknown = tokenizer.id(tokenizer.named["unk_token"]) if "unk_token" in tokenizer.named else None
    if not ids or unknown in ids:
        return False
    return _plain(tokenizer.decode(ids)) == _plain(word)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
