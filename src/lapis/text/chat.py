"""Chats as text and as ids, and which of the ids are the assistant's.

A chat is rendered by the model's own template, to the byte as transformers renders it. The assistant's tokens are found
in what was rendered: by {% generation %} blocks where the template has them, else by rendering the chat up to each turn
and comparing. No marker text is ever searched for. What a user typed never becomes a special token: such text is broken
with a private character before rendering, and encoded as plain text after it.
Leaves out: images and sound in messages; which chats are trained on (packing.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lapis.errors import DataError, TemplateError
from lapis.text.template import Rendering, render_jobs
from lapis.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names for one thing; templates read the first
_GUARDS = tuple(chr(code) for code in range(0xE9A0, 0xE9C0))  # private use; one that the chat lacks is taken


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The chat as the template writes it. variables: what else a template asks for (enable_thinking, ...).

    Raises TemplateError where there is no template, it refuses the chat, or it had to be stopped.
    """
    source = template_for(tokenizer, tools)
    values = _variables(tokenizer, tools, documents, variables)
    return _checked(render_jobs(source, _plain(messages), [(len(messages), add_generation_prompt)], values)[0]).text


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of the chat and of what begins the assistant's next turn."""
    guarded = _Guarded(tokenizer, _plain(messages), _variables(tokenizer, tools, None, variables))
    return guarded.encode(guarded.render([(len(messages), True)])[0].text)[0]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids of a whole chat, and for each whether the assistant says it, its end token included.

    Raises DataError where there is no assistant turn, or the template leaves no token of one.
    """
    ids, mask = encode_turns(tokenizer, messages, tools=tools, variables=variables)
    if not any(mask):
        raise DataError(
            "the chat template leaves no token of the assistant in the chat; nothing could be learned from it"
        )
    return ids, mask


def encode_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """As encode_chat, but a chat of which nothing is the assistant's has a mask of False, and no error."""
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise DataError("the chat has no assistant turn; there is nothing to learn from it")
    guarded = _Guarded(tokenizer, _plain(messages), _variables(tokenizer, tools, None, variables))
    if re.search(r"\{%-?\s*generation\s*-?%\}", guarded.source):
        whole = guarded.render([(len(messages), False)])[0]
        ids, places = guarded.encode(whole.text)
        return ids, _take_end_tokens(_mask(places, whole.spans), ids, tokenizer.end_ids)
    whole, spans = _spans_by_prefixes(guarded, turns)
    ids, places = guarded.encode(whole.text)
    return ids, _mask(places, spans)


def template_for(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
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


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token that closes an assistant turn in the default template, or None where none does."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    guarded = _Guarded(tokenizer, messages, _variables(tokenizer, None, None, None))
    whole, spans = _spans_by_prefixes(guarded, [1])
    ids, places = guarded.encode(whole.text)
    said = [i for i, own in zip(ids, _mask(places, spans), strict=True) if own]
    return said[-1] if said and said[-1] in tokenizer.added else None


class _Guarded:
    """A chat whose own text cannot become special tokens, with its template: renders and encodes.

    Where the chat spells a special token, a guard character stands after its first character while the template runs.
    In the text that comes back the unbroken ones are the template's own; the rest is encoded as plain text. A chat that
    spells none, which is nearly all, is rendered and encoded as it is.
    """

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.source = template_for(tokenizer, variables["tools"])
        self.guard = ""
        spelled = _pattern(tuple(token for token in tokenizer.special if len(token) > 1))
        own = {name: value for name, value in variables.items() if name not in tokenizer.named}
        if _any_text(messages, spelled) or _any_text(own, spelled):
            written = json.dumps([messages, own], ensure_ascii=False, default=str)
            self.guard = next(g for g in _GUARDS if g not in written and f"\\u{ord(g):04x}" not in written)
            messages = _break(messages, spelled, self.guard)
            variables = {**variables, **_break(own, spelled, self.guard)}
        self.messages = messages
        self.variables = variables

    def render(self, jobs: Sequence[tuple[int, bool]], messages: Sequence[Message] | None = None) -> list[Rendering]:
        """The first job must succeed; a prefix that the template refuses comes back with its error."""
        found = render_jobs(self.source, self.messages if messages is None else messages, jobs, self.variables)
        _checked(found[0])
        if self.guard:  # a template may have written it in JSON's escapes
            escaped = f"\\u{ord(self.guard):04x}"
            if any(escaped in rendering.text for rendering in found):
                raise DataError("the chat spells a special token where the template writes escaped JSON; take it out")
        return found

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the [start, end) of its characters in the text."""
        if not self.guard:
            return self.tokenizer.encode_spans(text, special=True)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        position = 0
        for match in _added_pattern(self.tokenizer).finditer(text):
            self._encode_plain(text, position, match.start(), ids, places)
            found = self.tokenizer.id(match.group(match.lastgroup or 0))
            assert found is not None
            ids.append(found)
            places.append(match.span())
            position = match.end()
        self._encode_plain(text, position, len(text), ids, places)
        return ids, places

    def _encode_plain(self, text: str, start: int, end: int, ids: list[int], places: list[tuple[int, int]]) -> None:
        kept = [i for i in range(start, end) if text[i] != self.guard]
        if not kept:
            return
        piece = "".join(text[i] for i in kept)
        found, spans = self.tokenizer.encode_spans(piece)
        if start and not _stands_alone(self.tokenizer):
            # SentencePiece puts a space before a text, but not after a special token; a line break takes that place
            lead = self.tokenizer.encode("\n")
            longer, moved = self.tokenizer.encode_spans("\n" + piece)
            if longer[: len(lead)] == lead:
                found, spans = longer[len(lead) :], [(a - 1, b - 1) for a, b in moved[len(lead) :]]
        ids += found
        places += [(kept[a], kept[b - 1] + 1) if b > a else (kept[min(a, len(kept) - 1)],) * 2 for a, b in spans]


@dataclass(frozen=True)
class _Shape:
    """What a template does of itself. prompts: heeds add_generation_prompt. header: what it writes between the prompt
    and the assistant's words where it does not heed it (a space, or the name of the role)."""

    prompts: bool
    header: str


def _shape(guarded: _Guarded) -> _Shape:
    """Found once per template, with a chat of two words."""
    return _shape_of(guarded.source, json.dumps(guarded.variables, sort_keys=True, default=str))


@lru_cache(maxsize=256)
def _shape_of(source: str, variables: str) -> _Shape:
    mark = "\ue99f"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark + "b"}]
    plain, prompted, whole = render_jobs(source, messages, [(1, False), (1, True), (2, False)], json.loads(variables))
    if plain.error or prompted.error or whole.error or plain.text != prompted.text:
        return _Shape(True, "")
    shared = _shared(prompted.text, whole.text)
    place = whole.text.find(mark)
    header = whole.text[shared:place] if place >= shared else ""
    return _Shape(False, header if header.strip() else "")


def _spans_by_prefixes(guarded: _Guarded, turns: Sequence[int]) -> tuple[Rendering, list[tuple[int, int]]]:
    """The whole text, and for each assistant turn the [start, end) of what the model has to say there.

    A turn begins where the chat before it, with the generation prompt, ends. It ends where the chat up to it ends, less
    what follows its end token (a line break; a text's end).
    """
    count = len(guarded.messages)
    jobs = [(count, False), *((i, True) for i in turns), *((i + 1, False) for i in turns)]
    whole, *prefixes = guarded.render(jobs)
    befores, afters = prefixes[: len(turns)], prefixes[len(turns) :]
    ends = _end_pattern(guarded.tokenizer)
    spans: list[tuple[int, int]] = []
    for turn, before, after in zip(turns, befores, afters, strict=True):
        sentinel: tuple[int, int] | None = None
        if before.error is None:
            start = _shared(before.text, whole.text)
            shape = _shape(guarded)
            if shape.header and whole.text.startswith(shape.header, start):
                start += len(shape.header)
        else:  # a template that refuses to end with a user's turn, or to begin with the assistant's
            sentinel = _by_sentinels(guarded, turn, whole.text)
            start = sentinel[0]
        end = _cut_end(after.text, start, ends) if after.error is None else -1
        if end < 0 or not whole.text.startswith(after.text[:end]):  # the turn reads otherwise once others follow it
            sentinel = sentinel or _by_sentinels(guarded, turn, whole.text)
            match = ends.match(whole.text, sentinel[1])
            end = match.end() if match else sentinel[1]
        if spans and start < spans[-1][1]:
            raise _untold(turn)
        spans.append((start, max(start, end)))
    return whole, spans


def _cut_end(text: str, start: int, ends: re.Pattern[str]) -> int:
    """Where the turn that `text` closes with ends: after the first of the special tokens at its very end."""
    trailing = re.search(rf"(?:{ends.pattern})(?:\s|{ends.pattern})*\Z", text[start:])
    if trailing is None:
        return len(text)
    first = ends.match(text, start + trailing.start())
    assert first is not None
    return first.end()


def _by_sentinels(guarded: _Guarded, turn: int, whole: str) -> tuple[int, int]:
    """[start, end) of one message's words: the chat is rendered with a mark before and after them."""
    content = guarded.messages[turn].get("content")
    if isinstance(content, str):
        words = content.strip()
        lead = content[: len(content) - len(content.lstrip())]
        marked = f"{lead}\ue99e{words}\ue99f{content[len(lead) + len(words) :]}"
        messages = [*guarded.messages]
        messages[turn] = {**messages[turn], "content": marked}
        text = guarded.render([(len(messages), False)], messages)[0].text
        start, end = text.find("\ue99e"), text.find("\ue99f") - 1
        if 0 <= start <= end and text[:start] + text[start + 1 : end + 1] + text[end + 2 :] == whole:
            return start, end
    raise _untold(turn)


def _untold(turn: int) -> TemplateError:
    return TemplateError(
        f"the chat template does not let the assistant's words in message {turn + 1} be told apart; "
        "put {% generation %} around them in the template"
    )


def _take_end_tokens(mask: list[bool], ids: Sequence[int], ends: Sequence[int]) -> list[bool]:
    """A {% generation %} block may stop short of the end token, which has to be learned all the same."""
    for i in range(1, len(mask)):
        if mask[i - 1] and not mask[i] and ids[i] in ends and ids[i - 1] not in ends:
            mask[i] = True
    return mask


def _mask(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """True for each token of which a character lies in a span. Both run forward through the text."""
    mask, n = [], 0
    for start, end in places:
        while n < len(spans) and spans[n][1] <= start:
            n += 1
        mask.append(n < len(spans) and spans[n][0] < max(end, start + 1) and spans[n][0] < spans[n][1])
    return mask


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without empty fields, and reasoning under the names that templates read (as transformers has it)."""
    result = []
    for message in messages:
        kept = {name: value for name, value in message.items() if value is not None}
        reasoning = next((kept[name] for name in _REASONING if name in kept), None)
        result.append(kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning})
    if not result:
        raise DataError("the chat has no messages")
    return result


def _variables(
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    more: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {**tokenizer.named, **(more or {}), "tools": tools, "documents": documents}


def _checked(rendering: Rendering) -> Rendering:
    if rendering.error is not None:
        raise TemplateError(f"the chat template refuses the chat: {rendering.error}")
    return rendering


def _shared(one: str, two: str) -> int:
    """How many characters two texts have in common from their beginning."""
    if two.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == two[:middle] else (low, middle - 1)
    return low


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens, the longest first; without any, what never matches."""
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _end_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    return _pattern(tuple(token for token in tokenizer.special if token.strip()))


def _added_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
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


def _stands_alone(tokenizer: Tokenizer) -> bool:
    """True where a piece after a special token has the ids that it has by itself (byte-level BPE)."""
    token = next(iter(tokenizer.special), "")
    return tokenizer.encode(f"{token}a", special=True)[-1:] == tokenizer.encode("a")[-1:] and len(
        tokenizer.encode(f"{token}a", special=True)
    ) == len(tokenizer.encode("a")) + bool(token)


def _any_text(value: Any, pattern: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(_any_text(item, pattern) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_any_text(item, pattern) for item in value)


def _break(value: Any, pattern: re.Pattern[str], guard: str) -> Any:
    if isinstance(value, str):
        while pattern.search(value):  # more than once where special tokens overlap
            value = pattern.sub(lambda match: match[0][0] + guard + match[0][1:], value)
        return value
    if isinstance(value, Mapping):
        return {name: _break(item, pattern, guard) for name, item in value.items()}
    return [_break(item, pattern, guard) for item in value] if isinstance(value, (list, tuple)) else value
