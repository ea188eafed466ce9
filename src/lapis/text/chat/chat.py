"""Chats as text and as ids, and which of the ids are the assistant's.

A chat is rendered by the model's own template, to the byte as transformers renders it. The assistant's tokens are seen
in the text: by {% generation %} blocks where the template has them, else by rendering the chat up to each turn and
comparing (turns.py). What a user typed never becomes a special token (special_token_guard.py), unless the caller says
that the text is its own. Leaves out images and sound in messages.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lapis.errors import DataError
from lapis.text.chat.calls import prints_calls, prints_tools, with_readable_calls
from lapis.text.chat.special_token_guard import (
    ChatEncoder,
    ChatTokenizer,
    Message,
    checked,
    template_for,
    with_plain_parts,
)
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
    """The chat as the template writes it.

    Args:
        tokenizer: With a chat template.
        messages: `role` and `content` each.
        tools: JSON schemas of tools.
        documents: What retrieval templates quote.
        add_generation_prompt: Also what begins the assistant's next turn.
        variables: What else a template asks for (enable_thinking, ...).

    Raises:
        TemplateError: Where there is no template, it refuses the chat, or it had to be stopped.
    """
    source = template_for(tokenizer, tools)
    values = _variables(tokenizer, tools, documents, variables)
    plain = with_plain_parts(source, _plain(messages), values)
    return checked(render_jobs(source, plain, [(len(messages), add_generation_prompt)], values)[0]).text


def encode_prompt(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of the chat and of what begins the assistant's next turn."""
    chat = ChatEncoder(tokenizer, _plain(messages), _variables(tokenizer, tools, None, variables))
    return chat.encode(chat.render([(len(messages), True)])[0].text)[0]


def encode_chat(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None, trusted: bool = False,
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """Ids of a whole chat, and for each whether it is learned: the assistant's, its end token included.

    Args:
        tokenizer: With a chat template.
        messages: `role` and `content` each; `weight: 0` on one of the assistant's says that it is not learned.
        tools: JSON schemas of tools.
        variables: What else the template asks for.
        trusted: Special tokens that the chat spells become tokens; else they are plain text.

    Raises:
        DataError: Where there is no assistant turn, or no token of one is left.
        TemplateError: Where there is no template, or it refuses the chat.
    """
    ids, mask = encode_turns(tokenizer, messages, tools=tools, variables=variables, trusted=trusted)
    if not any(mask):
        raise DataError(
            "the chat template leaves no token of the assistant in the chat; nothing could be learned from it"
        )
    return ids, mask


def encode_turns(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None, trusted: bool = False,
) -> tuple[list[int], list[bool]]:  # fmt: skip
    """As encode_chat, but a chat of which nothing is learned has a mask of False, and no error."""
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns:
        raise DataError("the chat has no assistant turn; there is nothing to learn from it")
    learned = [turn for turn in turns if messages[turn].get("weight") != 0]
    chat = ChatEncoder(tokenizer, _plain(messages), _variables(tokenizer, tools, None, variables), trusted)
    if re.search(r"\{%-?\s*generation\s*-?%\}", chat.source):
        whole = chat.render([(len(messages), False)])[0]
        spans = list(whole.spans)
        if len(learned) == len(turns) or len(spans) == len(turns):
            if len(learned) < len(turns):
                spans = [spans[i] for i, turn in enumerate(turns) if turn in learned]
            ids, places = chat.encode(whole.text)
            return ids, _take_end_tokens(mask_of(places, spans), ids, tokenizer.end_ids)
    whole, spans = spans_by_prefixes(chat, turns)
    spans = [span for span, turn in zip(spans, turns, strict=True) if turn in learned]
    ids, places = chat.encode(whole.text)
    return ids, _take_end_tokens(mask_of(places, spans), ids, tokenizer.stop_ids)


def write_calls(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None = None,
) -> Sequence[Message]:
    """Messages to learn from, with calls of tools as the template can print them (calls.py)."""
    values = _variables(tokenizer, tools, None, variables)
    return with_readable_calls(template_for(tokenizer, tools), messages, values)


def count_gaps(
    tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> dict[str, int]:
    """What of a chat its template cannot print.

    Args:
        tokenizer: With a chat template.
        messages: Of the chat.
        tools: JSON schemas of tools.

    Returns:
        1 for `calls_as_text`, where calls of tools are written as JSON text, and for `tools_unseen`, where the tools
        themselves do not appear.
    """
    source = template_for(tokenizer, tools)
    calls = any(message.get("tool_calls") for message in messages) and not prints_calls(source)
    unseen = bool(tools) and not prints_tools(source)
    return {name: 1 for name, holds in (("calls_as_text", calls), ("tools_unseen", unseen)) if holds}


def count_replies(tokenizer: ChatTokenizer, ids: Sequence[int], mask: Sequence[bool]) -> tuple[int, int]:
    """How many stretches of a chat are learned, and how many of them end without an end token."""
    ends = [i for i in range(len(ids)) if mask[i] and (i + 1 == len(ids) or not mask[i + 1])]
    closing = {*tokenizer.stop_ids, *tokenizer.special.values()}
    return len(ends), sum(ids[i] not in closing for i in ends)


def turn_end(tokenizer: ChatTokenizer) -> int | None:
    """The special token that closes an assistant turn in the default template, or None where none does."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = ChatEncoder(tokenizer, messages, _variables(tokenizer, None, None, None))
    whole, spans = spans_by_prefixes(chat, [1])
    ids, places = chat.encode(whole.text)
    reply = [i for i, own in zip(ids, mask_of(places, spans), strict=True) if own]
    return reply[-1] if reply and reply[-1] in tokenizer.added else None


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without empty fields, and reasoning under the names that templates read (as transformers has it)."""
    result = []
    for message in messages:
        fields = {name: value for name, value in message.items() if value is not None and name != "weight"}
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        result.append(fields)
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
    """The end token after a reply is learned as well: a {% generation %} block may stop short of it, and in some
    templates it is what begins the next turn (<|user|>)."""
    for i in range(1, len(mask)):
        if mask[i - 1] and not mask[i] and ids[i] in ends and ids[i - 1] not in ends:
            mask[i] = True
    return mask
