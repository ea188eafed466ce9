"""Which characters of a rendered chat are the assistant's: the chat is rendered up to each turn and compared.

A turn begins where the chat before it, with the generation prompt, ends: that is what the model is given when it has to
speak. It ends with its end token. Templates that write a turn otherwise once others follow it (they drop old thoughts)
are rendered again, with marks around the words or without the message. Where that shows nothing, it is an error, not a
guess. Templates with {% generation %} say it themselves (chat.py).
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache

from lapis.errors import TemplateError
from lapis.text.chat.special_token_guard import ChatEncoder, end_pattern
from lapis.text.chat.template import Rendering, render_jobs

Span = tuple[int, int]  # [start, end) in characters
_MARKS = ("\ue99e", "\ue99f")  # private use: around words whose place is looked for


def spans_by_prefixes(chat: ChatEncoder, turns: Sequence[int]) -> tuple[Rendering, list[Span]]:
    """The whole text, and where in it the messages `turns` are, each from after the prompt to the end token."""
    count = len(chat.messages)
    jobs = [(count, False), *((i, True) for i in turns), *((i + 1, False) for i in turns)]
    whole, *prefixes = chat.render(jobs)
    befores, afters = prefixes[: len(turns)], prefixes[len(turns) :]
    ends = end_pattern(chat.tokenizer)
    header = _header(chat.source, json.dumps(chat.variables, sort_keys=True, default=str))
    spans: list[Span] = []
    for turn, before, after in zip(turns, befores, afters, strict=True):
        start = -1 if before.error else _shared(before.text, whole.text)
        end = -1
        if before.error is None and after.error is None:
            end = _cut_end(after.text, _shared(before.text, after.text), ends)
        steady = end >= 0 and whole.text.startswith(after.text[:end])
        if not steady or start < len(before.text):  # the turn, or one before it, reads otherwise once others follow
            first, last = _by_marks(chat, turn, whole.text)
            if first is not None and (start < 0 or ends.search(whole.text, start, first)):
                start = first
            if not steady:
                end = (
                    _by_removal(chat, turn, whole.text, start, ends) if last is None else _past(last, whole.text, ends)
                )
        if header and whole.text.startswith(header, start):
            start += len(header)
        if not (spans[-1][1] if spans else 0) <= start <= end:
            raise TemplateError(
                f"the chat template does not let the assistant's words in message {turn + 1} be seen; "
                "put {% generation %} around them in the template"
            )
        spans.append((start, end))
    return whole, spans


def mask_of(places: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """True for each token of which a character lies in a span. Both run forward through the text."""
    mask, n = [], 0
    for start, end in places:
        while n < len(spans) and spans[n][1] <= start:
            n += 1
        mask.append(n < len(spans) and spans[n][0] < max(end, start + 1) and spans[n][0] < spans[n][1])
    return mask


def _cut_end(text: str, start: int, ends: re.Pattern[str]) -> int:
    """Where the turn that `text` closes with ends: after the first of the special tokens at its very end."""
    end = rest = len(text)
    for first, last in reversed([match.span() for match in ends.finditer(text, start)]):
        if text[last:rest].strip():
            break
        end, rest = last, first
    return end


def _by_marks(chat: ChatEncoder, turn: int, whole: str) -> tuple[int | None, int | None]:
    """Where one message's words begin and end: the chat is rendered with a mark before and after them. None for a mark
    that the template loses (it drops the thoughts before a reply)."""
    content = chat.messages[turn].get("content")
    if not isinstance(content, str):
        return None, None
    words = content.strip()
    lead = content[: len(content) - len(content.lstrip())]
    marked = f"{lead}{_MARKS[0]}{words}{_MARKS[1]}{content[len(lead) + len(words) :]}"
    messages = [*chat.messages]
    messages[turn] = {**messages[turn], "content": marked}
    text = chat.try_render(messages)
    if text is None or text.replace(_MARKS[0], "").replace(_MARKS[1], "") != whole or max(map(text.count, _MARKS)) > 1:
        return None, None
    first, last = map(text.find, _MARKS)
    return first if first >= 0 else None, last - (first >= 0) if last >= 0 else None


def _past(end: int, whole: str, ends: re.Pattern[str]) -> int:
    """After the special token at `end`, if there is one."""
    match = ends.match(whole, end)
    return match.end() if match else end


def _by_removal(chat: ChatEncoder, turn: int, whole: str, start: int, ends: re.Pattern[str]) -> int:
    """Where a message without words (a call of a tool) ends: what follows is the same in a chat that lacks it. The two
    may share the message's own end token as well, or not. -1 where the template refuses such a chat."""
    without = chat.try_render([message for i, message in enumerate(chat.messages) if i != turn])
    if without is None:
        return -1
    follows = len(whole) - _shared(whole[::-1], without[::-1])
    inside = list(ends.finditer(whole, start, follows))
    if inside and not whole[inside[-1].end() : follows].strip():
        return inside[-1].end()
    after = ends.search(whole, max(start, follows))
    return after.end() if after else -1


@lru_cache(maxsize=256)
def _header(source: str, variables: str) -> str:
    """What a template that ignores add_generation_prompt writes between the prompt and the assistant's words (the name
    of the role); "" for white space. Looked for once per template, with a chat of two words."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARKS[0] + "b"}]
    plain, prompted, whole = render_jobs(source, messages, [(1, False), (1, True), (2, False)], json.loads(variables))
    if plain.error or prompted.error or whole.error or plain.text != prompted.text:
        return ""
    header = whole.text[_shared(prompted.text, whole.text) : max(0, whole.text.find(_MARKS[0]))]
    return header if header.strip() else ""


def _shared(one: str, two: str) -> int:
    """How many characters two texts have in common from their beginning."""
    if two.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == two[:middle] else (low, middle - 1)
    return low
