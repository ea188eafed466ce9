"""Chats as text and as ids, and which of the ids are the assistant's.

A chat is rendered by the model's own template, to the byte as transformers renders it. The assistant's tokens are found
in what was rendered: by {% generation %} blocks where the template has them, else by rendering the chat up to each turn
and comparing (turns.py). What a user typed never becomes a special token (guarded.py).
Leaves out: images and sound in messages; which chats are trained on (packing.py).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lapis.errors import DataError
from lapis.text.chat.special_token_guard import ChatTokenizer, Guarded, Message, checked, template_for
from lapis.text.chat.template import render_jobs
from lapis.text.chat.turns import mask_of, spans_by_prefixes

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names for one thing; templates read the first


def render(
    tokenizer: ChatTokenizer,
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
    return checked(render_jobs(source, _plain(messages), [(len(messages), add_generation_prompt)], values)[0]).text


def encode_prompt(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of the chat and of what begins the assistant's next turn."""
    guarded = Guarded(tokenizer, _plain(messages), _variables(tokenizer, tools, None, variables))
    return guarded.encode(guarded.render([(len(messages), True)])[0].text)[0]


def encode_chat(
    tokenizer: ChatTokenizer,
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
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """As encode_chat, but a chat of which nothing is the assistant's has a mask of False, and no error."""
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise DataError("the chat has no assistant turn; there is nothing to learn from it")
    guarded = Guarded(tokenizer, _plain(messages), _variables(tokenizer, tools, None, variables))
    if re.search(r"\{%-?\s*generation\s*-?%\}", guarded.source):
        whole = guarded.render([(len(messages), False)])[0]
        ids, places = guarded.encode(whole.text)
        return ids, _take_end_tokens(mask_of(places, whole.spans), ids, tokenizer.end_ids)
    whole, spans = spans_by_prefixes(guarded, turns)
    ids, places = guarded.encode(whole.text)
    return ids, mask_of(places, spans)


def turn_end(tokenizer: ChatTokenizer) -> int | None:
    """The special token that closes an assistant turn in the default template, or None where none does."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    guarded = Guarded(tokenizer, messages, _variables(tokenizer, None, None, None))
    whole, spans = spans_by_prefixes(guarded, [1])
    ids, places = guarded.encode(whole.text)
    said = [i for i, own in zip(ids, mask_of(places, spans), strict=True) if own]
    return said[-1] if said and said[-1] in tokenizer.added else None


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
    tokenizer: ChatTokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    more: Mapping[str, Any] | None,
) -> dict[str, Any]:
    return {**tokenizer.named, **(more or {}), "tools": tools, "documents": documents}


def _take_end_tokens(mask: list[bool], ids: Sequence[int], ends: Sequence[int]) -> list[bool]:
    """A {% generation %} block may stop short of the end token, which has to be learned all the same."""
    for i in range(1, len(mask)):
        if mask[i - 1] and not mask[i] and ids[i] in ends and ids[i - 1] not in ends:
            mask[i] = True
    return mask
