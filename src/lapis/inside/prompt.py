"""A prompt and tracked words as token ids: what the lens is asked about.

Tracked words are read through the tokenizer behind a line break, so that one which begins every text with a space
(SentencePiece) gives both spellings too.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from lapis.errors import ConfigError, DataError, LapisError
from lapis.text.chat.chat import encode_prompt
from lapis.text.tokenizer.folder import NAMED_TOKENS
from lapis.text.tokenizer.tokenizer import Tokenizer

# Marks, embeddings, overrides and isolates of writing direction
_TURNS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """lapis' own tokenizer, also around the fast one of transformers, which is left as it is."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise LapisError(
            f"lens: {type(tokenizer).__name__} is no tokenizer with a fast backend; give lapis' or a fast one"
        )
    special = getattr(tokenizer, "special_tokens_map", {})
    named = {name: str(special[name]) for name in NAMED_TOKENS if isinstance(special.get(name), str)}
    template = getattr(tokenizer, "chat_template", None)
    templates = {"default": template} if isinstance(template, str) else {}
    return Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), named, templates)


def encode(tokenizer: Tokenizer, prompt: Prompt, rows: int, name: str) -> list[int]:
    """Ids of a text (with what the tokenizer puts before one), of a chat up to the reply, or ids as they are.

    Args:
        tokenizer: That of the model.
        prompt: A text, messages, or token ids.
        rows: Of the model's head.
        name: Of the model, for messages.

    Raises:
        DataError: There are no ids, or one has no row in the head.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special_tokens=True) if prompt else []
    elif prompt and isinstance(prompt[0], Mapping):
        ids = encode_prompt(tokenizer, prompt)  # type: ignore[arg-type]
    else:
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
    if not ids:
        raise DataError("lens: the prompt is empty; give a text, a chat or token ids")
    if not 0 <= min(ids) <= max(ids) < rows:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise DataError(f"lens: token {bad} has no row in {name}, which has {rows:,}; is the tokenizer its own?")
    return ids


def check_length(ids: Sequence[int], more: int, context: int, name: str) -> None:
    """Raises DataError where a prompt, and `more` tokens of a tracked word behind it, are longer than the context."""
    if len(ids) + more > context:
        what = f" and a tracked word {more} more" if more else ""
        raise DataError(
            f"lens: the prompt has {len(ids):,} tokens{what}, and the context of {name} is {context:,}; shorten it"
        )


@dataclass(frozen=True)
class Spelling:
    """One way to write a word: the text with its leading space, if any, and its token ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TrackedWord:
    """What is tracked.

    Attributes:
        text: The word as it was given; a space before it stays.
        spellings: They differ in their first token, so that their probabilities may be added.
        pieces: The texts of the tokens whose ranks are shown, where no spelling is a single token; else empty.
    """

    text: str
    spellings: tuple[Spelling, ...]
    pieces: tuple[str, ...] = ()

    @property
    def followed(self) -> tuple[Spelling, ...]:
        """The spellings whose rank is the word's: those of one token; where there is none, all by their first."""
        return tuple(spelling for spelling in self.spellings if len(spelling.ids) == 1) or self.spellings

    @property
    def label(self) -> str:
        """The word with its spaces to be seen, and of which piece the ranks are where it has no token of its own."""
        word = show(self.text)
        return f"{word} (its piece {' or '.join(map(show, self.pieces))})" if self.pieces else word


def as_words(track: str | Iterable[str | TrackedWord], tokenizer: Tokenizer, rows: int) -> list[TrackedWord]:
    """The words of "Malaysia, Indonesia" or of a list, each once.

    In a text one space behind a comma belongs to the comma; any other space before a word stays part of it.

    Args:
        track: Words, parted by commas, or a list.
        tokenizer: That of the model.
        rows: Of the model's head.

    Raises:
        ConfigError: The tokenizer cannot express a word.
        DataError: A word needs a token that the head has no row for.
    """
    if isinstance(track, str):
        first, *others = track.split(",")
        track = [part.rstrip() for part in (first, *(other.removeprefix(" ") for other in others)) if part.strip()]
    words = {}
    for item in track:
        word = item if isinstance(item, TrackedWord) else spell(item, tokenizer)
        highest = max(i for spelling in word.spellings for i in spelling.ids)
        if highest >= rows:
            raise DataError(f'lens: "{word.text}" needs token {highest}, but the head has {rows:,} rows; track another')
        words[word.text] = word
    return list(words.values())


def spell(word: str, tokenizer: Tokenizer) -> TrackedWord:
    """A word's spellings. One that begins with a space has only that one; a special token is that token itself.

    Raises:
        ConfigError: The tokenizer cannot express the word.
    """
    if not word.strip():
        raise ConfigError("lens: a tracked word is empty; give words parted by commas")
    if word in tokenizer.special:
        return TrackedWord(word, (Spelling(word, (tokenizer.special[word],)),))
    spellings: dict[int, Spelling] = {}
    for text in (word,) if word[0].isspace() else (" " + word, word):
        ids = _behind_a_break(text, tokenizer)
        if _says(ids, word, tokenizer):
            other = spellings.get(ids[0])
            if other is None or len(ids) < len(other.ids):
                spellings[ids[0]] = Spelling(text, ids)
    if not spellings:
        raise ConfigError(f'lens: the tokenizer cannot express "{word}"; track a word in characters that it knows')
    whole = any(len(spelling.ids) == 1 for spelling in spellings.values())
    pieces = () if whole else tuple(token_text(index, tokenizer) for index in spellings)
    return TrackedWord(word, tuple(spellings.values()), pieces)


def token_word(index: int, tokenizer: Tokenizer) -> TrackedWord:
    """A single token as a word, by its id."""
    text = token_text(index, tokenizer)
    return TrackedWord(text, (Spelling(text, (index,)),))


def token_text(index: int, tokenizer: Tokenizer) -> str:
    """A token as a reader can see it. A head may have more rows than the tokenizer has tokens."""
    try:
        return tokenizer.text(index)
    except DataError:
        return f"<row {index}>"


def show(token: str) -> str:
    """A token with its spaces to be seen."""
    return visible_marks(token).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def visible_marks(text: str) -> str:
    """A text in which the characters that would turn the text around them can be seen."""
    return _TURNS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


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
