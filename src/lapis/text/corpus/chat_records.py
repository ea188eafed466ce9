"""One record in, one chat out, whichever of the field's formats it has: chat_of(record), format_of(record).

A format is recognised by the names of its fields. A field that changes what is learned is honoured (system, tools,
weight, train, chat_template_kwargs) or refused by name (pictures, sounds, fractions of a weight); one that says nothing
about the chat (id, source, score) is let be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.config import nearest
from lapis.errors import DataError
from lapis.parsing import ParseError, parse_json, quoted
from lapis.text.corpus.file_stream import at, suffix
from lapis.text.corpus.records import checked_text, spelled

ROLES = ("system", "developer", "user", "assistant", "tool")
CHAT_FIELDS = ("messages", "conversations", "conversation")
# first the field of the user's words, then that of the reply
QUESTIONS = {
    ("instruction", "output"): "Alpaca",
    ("instruction", "response"): "Dolly",
    ("prompt", "completion"): "prompt and completion",
    ("prompt", "response"): "prompt and response",
    ("question", "answer"): "question and answer",
    ("question", "response"): "question and response",
    ("query", "response"): "query and response",
}
INPUTS = ("input", "context")  # what an instruction is about
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
RECORD_FIELDS = (
    *CHAT_FIELDS, *(name for pair in QUESTIONS for name in pair), *INPUTS, *SYSTEMS, *TOOLS, *MEDIA, "history",
    "weight", "text", "chat_template_kwargs", "label", "kto_tag", "chosen", "rejected", "margin",
)  # fmt: skip
_ROLE_OF = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function": "tool", **{role: role for role in ROLES},
}  # fmt: skip
_LEARNED = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale")  # 1 for what is learned


@dataclass(frozen=True)
class ChatRecord:
    """A chat with its place.

    Attributes:
        messages: Each with `role` and `content`, at least one of them the assistant's. `weight: 0` on one of the
            assistant's says that it is not learned.
        file, line: Where it stands; the line, row or item, from 1.
        tools: JSON schemas, or None.
        variables: What else the template is given (`chat_template_kwargs`), or None.
    """

    messages: list[dict[str, Any]]
    file: Path
    line: int
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        return at(self.file, self.line)


def format_of(record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """The format of a chat record: its name, and the fields that it is recognised by; None where it holds no chat."""
    name = next((name for name in CHAT_FIELDS if isinstance(record.get(name), list)), None)
    if name is not None:
        first = next((message for message in record[name] if isinstance(message, dict)), {})
        return ("ShareGPT" if "from" in first and "role" not in first else "messages"), (name,)
    for pair, title in QUESTIONS.items():
        if all(field in record for field in pair):
            extra = tuple(field for field in (*INPUTS, "history") if record.get(field) and pair[0] == "instruction")
            return title, (pair[0], *extra, pair[1])
    return None


def describe_format(record: Mapping[str, Any]) -> str | None:
    """One line that says how a record is read; None for one that holds no chat."""
    recognised = format_of(record)
    if recognised is None:
        return None
    name, fields = recognised
    beside = [field for field in (*SYSTEMS, *TOOLS, "chat_template_kwargs") if record.get(field)]
    inner = [*(field for field in fields if field != name), *(["with " + ", ".join(beside)] if beside else [])]
    return f"format: {name}" + (f" ({', '.join(inner)})" if inner else "")


def chat_of(record: Any, field: str | None, path: Path, number: int) -> ChatRecord:
    """The chat of a record.

    Args:
        record: What a line, row or item holds.
        field: What holds the messages, where the file calls them otherwise.
        path: The file, named in errors.
        number: The line, row or item.

    Raises:
        DataError: For what is no chat with an answer, and for a field that cannot be honoured; names line and field.
    """
    where = at(path, number)
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {spelled(record)}; expected an object with messages")
    if field is not None:
        if field not in record:
            raise DataError(f"{where}: the field {field} is missing; {nearest(field, record)}")
        messages = messages_of(record[field], field, path, number)
    else:
        messages = _recognised(record, path, number)
    messages = with_system(record, messages, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's; there is nothing to learn from it")
    refuse_fields(record, where)
    tools = tools_of(record, path, number)
    variables = record.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise DataError(f"{where}: chat_template_kwargs is {spelled(variables)}; expected an object")
    return ChatRecord([without_padding(m, tools) for m in messages], path, number, tools, variables or None)


def _recognised(record: dict[str, Any], path: Path, number: int) -> list[dict[str, Any]]:
    where = at(path, number)
    named = [name for name in CHAT_FIELDS if name in record]
    if len(named) > 1:
        raise DataError(f"{where}: {' and '.join(named)} could both be the chat; say which with field")
    if named:
        return messages_of(record[named[0]], named[0], path, number)
    recognised = format_of(record)
    if recognised is not None:
        return _question(record, recognised[1][0], recognised[1][-1], path, number)
    if "text" in record:
        raise DataError(f"{where}: holds a document (text) where a chat (messages) was expected")
    if "chosen" in record and "rejected" in record:
        raise DataError(f"{where}: holds a preference (chosen, rejected) where a chat (messages) was expected")
    raise DataError(f"{where}: the field messages is missing; {nearest('messages', record)}")


def _question(record: Mapping[str, Any], question: str, reply: str, path: Path, number: int) -> list[dict[str, Any]]:
    """What a record without messages says: earlier turns (`history`), the user's words, the reply."""
    messages = prompt_of(record, question, path, number)
    value = record[reply]
    if isinstance(value, list):
        return messages + messages_of(value, reply, path, number)
    text = checked_text(value, reply, path, number)
    return [*messages, {"role": "assistant", "content": text}]


def prompt_of(record: Mapping[str, Any], question: str, path: Path, number: int) -> list[dict[str, Any]]:
    """The messages before a reply: `history`, then the field `question` with what an instruction is about below it."""
    where = at(path, number)
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(record.get("history") or []):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"{where}: history[{i}] is {spelled(turn)}; expected a question and its reply")
        for role, words in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": checked_text(words, f"history[{i}]", path, number)})
    value = record[question]
    if isinstance(value, list):
        return messages + messages_of(value, question, path, number)
    words = [checked_text(value, question, path, number)]
    about = next((name for name in INPUTS if record.get(name)), None) if question == "instruction" else None
    if about is not None:
        words.append(checked_text(record[about], about, path, number))
    text = "\n".join(word for word in words if word)
    if not text.strip():
        raise DataError(f"{where}: {question} is empty; a reply needs something that it replies to")
    return [*messages, {"role": "user", "content": text}]


def with_system(record: Mapping[str, Any], messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages with what stands beside them as `system`. Raises DataError where both say something else."""
    for name in SYSTEMS:
        text = record.get(name)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise DataError(f"{where}: {name} is {spelled(text)}; expected text")
        if messages[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": text}, *messages]
        if messages[0].get("content") != text:
            raise DataError(f"{where}: {name} and the first message are two system texts; keep one of them")
    return messages


def refuse_fields(record: Mapping[str, Any], where: str, unread: Sequence[str] = ()) -> None:
    """Raises DataError for a field that would change what is learned, and that lapis cannot follow, or not there."""
    if name := next((name for name in unread if record.get(name)), None):
        raise DataError(f"{where}: has {name}, which is read in chats only; leave the record or the field out")
    media = next((name for name in MEDIA if record.get(name)), None)
    if media is not None:
        raise DataError(f"{where}: has {media}, which lapis does not read in chats; leave the record or the field out")
    weight = record.get("weight")
    if weight is not None and not (isinstance(weight, (int, float)) and weight == 1):
        raise DataError(
            f"{where}: weight is {quoted(weight)} for the whole record, which lapis does not follow; leave the record "
            "out, or put it into a source of its own with that weight"
        )


def tools_of(record: Mapping[str, Any], path: Path, number: int) -> list[dict[str, Any]] | None:
    """JSON schemas of tools: a list, or JSON text of one; a bare function gets the shape that templates expect."""
    where = at(path, number)
    name = next((name for name in TOOLS if record.get(name) is not None), None)
    if name is None:
        return None
    tools = record[name]
    try:
        tools = parse_json(tools.strip() or "[]") if isinstance(tools, str) else tools
        tools = tools if isinstance(tools, list) else [tools]
        tools = [parse_json(tool) if isinstance(tool, str) else tool for tool in tools]
    except ParseError:
        raise DataError(f"{where}: {name} is text that is not JSON; expected a list of objects") from None
    if others := [tool for tool in tools if not isinstance(tool, dict)]:
        raise DataError(f"{where}: {name} holds {spelled(others[0])}; expected a list of objects")
    if suffix(path) == ".parquet":
        tools = [without_nulls(tool) for tool in tools]
    bare = [isinstance(tool.get("name"), str) and "function" not in tool and "type" not in tool for tool in tools]
    shaped = [{"type": "function", "function": tool} if b else tool for tool, b in zip(tools, bare, strict=True)]
    return [_schema(tool) for tool in shaped] or None


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    """Without properties that are null: no schema says so, but a table that knows all tools pads with them."""
    function: Any = tool.get("function")
    parameters: Any = function.get("parameters") if isinstance(function, dict) else None
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or all(value is not None for value in properties.values()):
        return tool
    properties = {name: value for name, value in properties.items() if value is not None}
    return {**tool, "function": {**function, "parameters": {**parameters, "properties": properties}}}


def without_nulls(value: Any) -> Any:
    """Without fields that are null, at any depth: a column of Arrow has all fields of all rows."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def without_padding(message: dict[str, Any], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """A message whose calls have no arguments that are null and that the schema of the called tool does not have."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_unpadded_call(call, tools or []) for call in calls]}


def _unpadded_call(call: Any, tools: list[dict[str, Any]]) -> Any:
    function: Any = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, dict):
        return call
    schemas = [tool.get("function", tool) for tool in tools]
    schema = next((s for s in schemas if isinstance(s, dict) and s.get("name") == function.get("name")), {})
    parameters = schema.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(properties, dict):
        return call
    left = {name: value for name, value in arguments.items() if value is not None or name in properties}
    return call if left == arguments else {**call, "function": {**function, "arguments": left}}


def with_calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message whose calls of tools are `tool_calls`, a list: they also come as JSON text, as `function_call`, bare.

    Args:
        message: As the record has it.
        where: File and line, for errors.

    Raises:
        DataError: For calls that cannot be read, and where a message has them twice.
    """
    result = {name: value for name, value in message.items() if name not in ("function_call", "tool_calls")}
    given = [name for name in ("tool_calls", "function_call") if message.get(name)]
    if len(given) > 1:
        raise DataError(f"{where} has both tool_calls and function_call; keep one of them")
    return result | {"tool_calls": calls_of(message[given[0]], f"{where}.{given[0]}")} if given else result


def calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools as a list; a bare one (name and arguments) gets the shape that templates expect."""
    try:
        calls = parse_json(value) if isinstance(value, str) else value
    except ParseError:
        raise DataError(f"{where} is text that is not JSON; expected a call of a tool, or a list of these") from None
    calls = calls if isinstance(calls, list) else [calls]
    return [_shaped(call, where) for call in calls]


def _shaped(call: Any, where: str) -> dict[str, Any]:
    bare = isinstance(call, dict) and "function" not in call and "type" not in call
    if not isinstance(call, dict) or (bare and ("name" not in call or "arguments" not in call)):
        raise DataError(f"{where}: a call is {spelled(call)}; expected an object with name and arguments")
    if not bare:
        return call
    rest = {name: item for name, item in call.items() if name not in ("name", "arguments")}
    function = {"name": call["name"], "arguments": arguments_of(call["arguments"])}
    return {**rest, "type": "function", "function": function}


def arguments_of(value: Any) -> Any:
    """Arguments that are JSON text of an object as that object; all else as it is."""
    try:
        read = parse_json(value) if isinstance(value, str) else value
    except ParseError:
        return value
    return read if isinstance(read, dict) else value


def messages_of(value: Any, field: str, path: Path, number: int) -> list[dict[str, Any]]:
    """Checked messages under the names that templates read. Raises DataError for what is no list of messages."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{at(path, number)}: {field} is {spelled(value) if value != [] else 'empty'}; expected a list of messages"
        )
    messages = [_message(message, f"{field}[{i}]", path, number) for i, message in enumerate(value)]
    if suffix(path) == ".parquet":  # a table has every argument of every row, null where the row has none
        messages = [
            {**m, "tool_calls": without_nulls(m["tool_calls"])} if isinstance(m, dict) and "tool_calls" in m else m
            for m in messages
        ]
    for i, message in enumerate(messages):
        check_message(message, f"{field}[{i}]", path, number)
    return messages


def _message(message: Any, field: str, path: Path, number: int) -> Any:
    """A message under our names: ShareGPT says from and value, human and gpt. Tables fill gaps with null."""
    if not isinstance(message, dict):
        return message
    where = f"{at(path, number)}: {field}"
    for theirs, ours in (("value", "content"), ("from", "role")):
        if theirs in message and ours not in message:
            message = {ours: message[theirs], **{name: value for name, value in message.items() if name != theirs}}
    role = message.get("role")
    result = {name: value for name, value in message.items() if value is not None or name == "content"}
    if isinstance(role, str):
        result["role"] = _ROLE_OF.get(role.lower(), role)
    result = with_calls(result, where)
    if isinstance(role, str) and role.lower() in ("function_call", "tool_call"):
        result |= {"content": None, "tool_calls": calls_of(message.get("content"), f"{where}, a {role},")}
    if isinstance(result.get("content"), list):
        result["content"] = [without_nulls(part) for part in result["content"]]
    return _weighed(result, where)


def _weighed(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with `weight: 0` where it is not to be learned, and without any other spelling of that."""
    if unread := next((name for name in ("mask", "masked", "train_detail") if name in message), None):
        raise DataError(
            f"{where}.{unread} may say what is learned, which lapis reads as weight; use that, or leave it out"
        )
    names = [name for name in _LEARNED if name in message]
    if not names:
        return message
    values = []
    for name in names:
        value = message[name]
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            values.append(bool(value))
        else:
            raise DataError(f"{where}.{name} is {quoted(value)}; a message is learned (1) or not (0), nothing between")
    if len(set(values)) > 1:
        raise DataError(f"{where}: {' and '.join(names)} contradict each other; keep one of them")
    if values[0] and message.get("role") != "assistant" and names != ["weight"]:
        raise DataError(f"{where}.{names[0]} asks to learn what is not the assistant's, which lapis does not do")
    rest = {name: value for name, value in message.items() if name not in names}
    return rest if values[0] or rest.get("role") != "assistant" else {**rest, "weight": 0}


def check_message(message: Any, field: str, path: Path, number: int) -> None:
    """Raises DataError, naming line and field, for what is not a message of a chat."""
    where = f"{at(path, number)}: {field}"
    if not isinstance(message, dict):
        raise DataError(f"{where} is {spelled(message)}; expected an object with role and content")
    if "role" not in message:
        raise DataError(f"{where}.role is missing; {nearest('role', message)}")
    if message["role"] not in ROLES:
        raise DataError(f"{where}.role is {quoted(message['role'])}; {nearest(str(message['role']), ROLES)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if "content" not in message:
        raise DataError(f"{where}.content is missing; {nearest('content', message)}")
    if isinstance(content, list):
        for j, part in enumerate(content):
            if not isinstance(part, dict) or "type" not in part:
                raise DataError(f"{where}.content[{j}] is {spelled(part)}; expected an object with type and text")
            if part["type"] != "text":
                kind = quoted(part["type"])
                raise DataError(f"{where}.content[{j}] is of type {kind}; lapis reads text in chats only")
            checked_text(part.get("text"), f"{field}.content[{j}].text", path, number)
    else:
        checked_text(content, f"{field}.content", path, number)
