"""A chat whose own text cannot become special tokens: rendered with guards, encoded without them.

Where a chat spells a special token, a private character stands after its first character while the template runs. In
the text that comes back the unbroken ones are the template's own; what lies between them is encoded as plain text. A
chat that spells none, which is nearly all, is rendered and encoded as it is. A trusted chat is rendered in the same
way, so that its turns are seen, and encoded with its own special tokens. Whose the tokens are is in turns.py.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from lapis.errors import DataError, TemplateError
from lapis.parsing import quoted
from lapis.text.chat.template import Rendering, render_jobs

if TYPE_CHECKING:
    from tokenizers import AddedToken

Message = Mapping[str, Any]
_GUARDS = tuple(chr(code) for code in range(0xE9A0, 0xE9C0))  # private use; one that the chat lacks is taken


class ChatTokenizer(Protocol):
    """What chats need of a tokenizer: its templates, its special tokens, and ids for text."""

    @property
    def source(self) -> str: ...
    @property
    def named(self) -> Mapping[str, str]: ...
    @property
    def templates(self) -> Mapping[str, str]: ...
    @property
    def added(self) -> "Mapping[int, AddedToken]": ...
    @property
    def special(self) -> Mapping[str, int]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str, special: bool = False) -> list[int]: ...
    def encode_spans(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]: ...
    def id(self, token: str) -> int | None: ...


class ChatEncoder:
    """One chat with its template and its tokenizer.

    Attributes:
        source: The template.
        messages, variables: What the template is given. Content in parts is one text where the template prints it as
            it is.
        trusted: Whether special tokens that the chat spells become tokens.

    Raises:
        TemplateError: Where there is no template.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        trusted: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.source = template_for(tokenizer, variables["tools"])
        self.trusted = trusted
        self.guard = ""
        messages = with_plain_parts(self.source, messages, variables)
        spelled = special_pattern(tokenizer)
        own = {name: value for name, value in variables.items() if name not in tokenizer.named}
        if any(spelled.search(text) for text in _texts([*messages, own])):
            written = json.dumps([messages, own], ensure_ascii=False, default=str)
            self.guard = next(g for g in _GUARDS if g not in written and f"\\u{ord(g):04x}" not in written)
            messages = _break(messages, spelled, self.guard)
            variables = {**variables, **_break(own, spelled, self.guard)}
        self.messages = messages
        self.variables = variables

    def try_render(self, messages: Sequence[Message]) -> str | None:
        """The text of a chat like this one, or None where the template refuses it."""
        (rendering,) = render_jobs(self.source, messages, [(len(messages), False)], self.variables)
        return None if rendering.error else rendering.text

    def render(self, jobs: Sequence[tuple[int, bool]]) -> list[Rendering]:
        """The chat up to each place. The first must succeed; another that the template refuses has its error."""
        renderings = render_jobs(self.source, self.messages, jobs, self.variables)
        checked(renderings[0])
        if self.guard:  # a template may have written it in JSON's escapes
            escaped = f"\\u{ord(self.guard):04x}"
            if any(escaped in rendering.text for rendering in renderings):
                raise DataError("the chat spells a special token where the template writes escaped JSON; take it out")
        return renderings

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the [start, end) of its characters in the text."""
        if not self.guard:
            return self.tokenizer.encode_spans(text, special=True)
        if self.trusted:
            own = [i for i in range(len(text)) if text[i] != self.guard]
            trusted_ids, spans = self.tokenizer.encode_spans("".join(text[i] for i in own), special=True)
            return trusted_ids, _moved(spans, own)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        position = 0
        for match in _added_pattern(self.tokenizer).finditer(text):
            self._encode_plain(text, position, match.start(), ids, places)
            token_id = self.tokenizer.id(match.group(match.lastgroup or 0))
            assert token_id is not None
            ids.append(token_id)
            places.append(match.span())
            position = match.end()
        self._encode_plain(text, position, len(text), ids, places)
        return ids, places

    def _encode_plain(self, text: str, start: int, end: int, ids: list[int], places: list[tuple[int, int]]) -> None:
        own = [i for i in range(start, end) if text[i] != self.guard]
        if not own:
            return
        piece = "".join(text[i] for i in own)
        piece_ids, spans = self.tokenizer.encode_spans(piece)
        if start and not _stands_alone(self.tokenizer):
            # SentencePiece puts a space before a text, but not after a special token; a line break takes that place
            lead = self.tokenizer.encode("\n")
            longer, moved = self.tokenizer.encode_spans("\n" + piece)
            if longer[: len(lead)] == lead:
                piece_ids, spans = longer[len(lead) :], [(a - 1, b - 1) for a, b in moved[len(lead) :]]
        ids += piece_ids
        places += _moved(spans, own)


def spelled_tokens(tokenizer: ChatTokenizer, value: Any) -> Counter[str]:
    """How often text, messages or other data with text in it spell each special token."""
    counts: Counter[str] = Counter()
    pattern = special_pattern(tokenizer)
    for text in _texts(value):
        counts.update(match[0] for match in pattern.finditer(text))
    return counts


def special_pattern(tokenizer: ChatTokenizer) -> re.Pattern[str]:
    """Any special token of more than one character."""
    return _pattern(tuple(token for token in tokenizer.special if len(token) > 1))


def with_plain_parts(source: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> Sequence[Message]:
    """Messages whose content is a list of text parts as one text each, where the template would print the list.

    Args:
        source: Of the template.
        messages: Of the chat.
        variables: What else the template gets.

    Raises:
        DataError: For a part that is no text under such a template.
    """
    if not any(isinstance(message.get("content"), (list, tuple)) for message in messages):
        return messages
    if _reads_parts(source, json.dumps(dict(variables), sort_keys=True, default=str)):
        return messages
    plain = []
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, (list, tuple)):
            other = [part for part in parts if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]
            if other:
                kind = other[0].get("type") if isinstance(other[0], Mapping) else type(other[0]).__name__
                raise DataError(f"a part of a message is of type {quoted(kind)}, and the chat template reads only text")
            message = {**message, "content": "\n".join(part["text"] for part in parts)}
        plain.append(message)
    return plain


@lru_cache(maxsize=256)
def _reads_parts(source: str, variables: str) -> bool:
    """Whether a template takes the text out of content that is a list of parts, tried with a chat of two messages."""
    words = ("lapis-part-a", "lapis-part-b")
    messages = [
        {"role": role, "content": [{"type": "text", "text": word}]}
        for role, word in zip(("user", "assistant"), words, strict=True)
    ]
    (rendering,) = render_jobs(source, messages, [(2, False)], json.loads(variables))
    printed = any(mark in rendering.text for mark in ("'type'", '"type"', "&#39;type&#39;"))
    return rendering.error is None and not printed and all(word in rendering.text for word in words)


def template_for(tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The template for a chat: "tool_use" where there are tools and such a template, else the default."""
    if tools is not None and "tool_use" in tokenizer.templates:
        return tokenizer.templates["tool_use"]
    if tokenizer.chat_template is None:
        has = f"only {', '.join(tokenizer.templates)}" if tokenizer.templates else "none"
        raise TemplateError(
            f"{tokenizer.source}: a chat needs a chat template, and there is {has}; "
            "add a chat_template to tokenizer_config.json, or give plain text"
        )
    return tokenizer.chat_template


def checked(rendering: Rendering) -> Rendering:
    """The rendering; TemplateError where the template refused the chat."""
    if rendering.error is not None:
        raise TemplateError(f"the chat template refuses the chat: {rendering.error}")
    return rendering


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens, the longest first; without any, what never matches."""
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)")


def end_pattern(tokenizer: ChatTokenizer) -> re.Pattern[str]:
    """What the special tokens match, one of which ends each turn."""
    return _pattern(tuple(token for token in tokenizer.special if token.strip()))


def _added_pattern(tokenizer: ChatTokenizer) -> re.Pattern[str]:
    """All added tokens with the white space that they swallow; the group that matched is the token."""
    tokens = sorted(tokenizer.added.values(), key=lambda token: len(token.content), reverse=True)
    return _compiled(tuple((token.content, token.lstrip, token.rstrip) for token in tokens))


@lru_cache(maxsize=16)
def _compiled(tokens: tuple[tuple[str, bool, bool], ...]) -> re.Pattern[str]:
    swallow = {True: r"\s*", False: ""}
    parts = [
        f"{swallow[left]}(?P<t{n}>{re.escape(content)}){swallow[right]}"
        for n, (content, left, right) in enumerate(tokens)
    ]
    return re.compile("|".join(parts) or "(?!)")


def _stands_alone(tokenizer: ChatTokenizer) -> bool:
    """True where a piece after a special token has the ids that it has by itself (byte-level BPE)."""
    token = next(iter(tokenizer.special), "")
    return tokenizer.encode(f"{token}a", special=True)[-1:] == tokenizer.encode("a")[-1:] and len(
        tokenizer.encode(f"{token}a", special=True)
    ) == len(tokenizer.encode("a")) + bool(token)


def _moved(spans: Sequence[tuple[int, int]], own: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) in a text from which characters were taken, as places in the whole; own: those that stayed."""
    return [(own[a], own[b - 1] + 1) if b > a else (own[min(a, len(own) - 1)],) * 2 for a, b in spans]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _break(value: Any, pattern: re.Pattern[str], guard: str) -> Any:
    if isinstance(value, str):
        while pattern.search(value):  # more than once where special tokens overlap
            value = pattern.sub(lambda match: match[0][0] + guard + match[0][1:], value)
        return value
    if isinstance(value, Mapping):
        return {name: _break(item, pattern, guard) for name, item in value.items()}
    return [_break(item, pattern, guard) for item in value] if isinstance(value, (list, tuple)) else value
