"""A Modelfile: what Ollama should do with a GGUF file. Its template is recognized by what it writes.

Ollama has templates of its own kind (Go's), so a chat template is not translated: a few chats are rendered by it, and
compared with what each known form writes. One that is none of these is said, with what Ollama will do instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lapis.errors import LapisError
from lapis.families.config import ModelConfig
from lapis.text.chat.chat import render
from lapis.text.tokenizer.tokenizer import Tokenizer

Chat = Sequence[Mapping[str, str]]

USER, REPLY = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: tuple[Chat, ...] = ([USER], [USER, REPLY, USER], [SYSTEM, USER], [SYSTEM, USER, REPLY, USER])
PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True)
class Form:
    """One way to write a chat. write: messages -> text, the beginning of the next reply included, without a BOS token.

    template: the same in Go's language, as Ollama's library has it. system: whether it has a place for one.
    """

    name: str
    write: Callable[[Chat], str]
    template: str
    system: bool = True


def _chatml(chat: Chat) -> str:
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
    return f"{turns}<|im_start|>assistant\n"


def _llama3(chat: Chat) -> str:
    turns = "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in chat)
    return f"{turns}<|start_header_id|>assistant<|end_header_id|>\n\n"


def _gemma(chat: Chat) -> str:
    system = chat[0]["content"] + "\n\n" if chat[0]["role"] == "system" else ""
    turns = []
    for message in chat[bool(system) :]:
        role = "model" if message["role"] == "assistant" else "user"
        turns.append(f"<start_of_turn>{role}\n{system}{message['content']}<end_of_turn>\n")
        system = ""
    return "".join(turns) + "<start_of_turn>model\n"


def _mistral(chat: Chat) -> str:
    system = chat[0]["content"] + "\n\n" if chat[0]["role"] == "system" else ""
    text = ""
    for message in chat[bool(system) :]:
        if message["role"] == "assistant":
            text += f" {message['content']}</s>"
        else:
            text += f"[INST] {system}{message['content']} [/INST]"
            system = ""
    return text


FORMS = (
    Form(
        "ChatML", _chatml,
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    ),
    Form(
        "Llama 3", _llama3,
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    Form(
        "Gemma", _gemma,
        "{{- $system := .System }}{{- range .Messages }}"
        '{{- if eq .Role "user" }}<start_of_turn>user\n{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
        "{{ .Content }}<end_of_turn>\n"
        '{{ else if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}'
        "{{- end }}<start_of_turn>model\n",
    ),
    Form(
        "Mistral", _mistral,
        "{{- $system := .System }}{{- range .Messages }}"
        '{{- if eq .Role "user" }}[INST] {{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
        "{{ .Content }} [/INST]"
        '{{- else if eq .Role "assistant" }} {{ .Content }}</s>{{ end }}'
        "{{- end }}",
    ),
)  # fmt: skip
PLAIN = "{{ .Prompt }}"


def recognize(tokenizer: Tokenizer) -> tuple[Form, str | None] | None:
    """The form that a chat template writes, and the system prompt that it puts before a chat without one.

    None where it writes none of the known forms. A template that refuses a system message is compared without.
    """
    texts = [_rendered(tokenizer, chat) for chat in CHATS]
    if texts[0] is None:
        return None
    for form in FORMS:
        default = _default_system(form, texts[0])
        extra: Chat = [{"role": "system", "content": default}] if default else []
        expected = [form.write([*extra, *chat] if chat[0]["role"] != "system" else chat) for chat in CHATS]
        own = texts if texts[2] is not None else texts[:2]
        if all(text == written for text, written in zip(own, expected, strict=False)):
            return form, default
    return None


def _rendered(tokenizer: Tokenizer, chat: Chat) -> str | None:
    try:
        text = render(tokenizer, chat, add_generation_prompt=True)
    except LapisError:
        return None
    bos = tokenizer.named.get("bos_token", "")
    return text.removeprefix(bos) if not text.startswith("<|im_start|>") else text


def _default_system(form: Form, text: str) -> str | None:
    """The system prompt between a form's own words, where the text has one that the chat lacks."""
    mark = "\0"
    before, _, after = form.write([{"role": "system", "content": mark}, USER]).partition(mark)
    if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
        return text[len(before) : len(text) - len(after)]
    return None


def modelfile(
    file: str, tokenizer: Tokenizer, config: ModelConfig, generation: Any, notes: list[str]
) -> str:  # fmt: skip
    """The text of a Modelfile.

    Args:
        file: Name of the GGUF file beside it.
        tokenizer: Of the model.
        config: Of the model.
        generation: What generation_config.json holds, or None.
        notes: Gains a line where the template is not said.
    """
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template is None:
        lines.append(f"TEMPLATE {_quoted(PLAIN)}")
    elif (known := recognize(tokenizer)) is not None:
        form, system = known
        lines.append(f"TEMPLATE {_quoted(form.template)}")
        if system:
            lines.append(f"SYSTEM {_quoted(system)}")
        notes.append(f"Modelfile: the chat template writes {form.name}")
    else:
        names = ", ".join(form.name for form in FORMS)
        notes.append(
            f"Modelfile: the chat template is none of {names}, so no TEMPLATE is written; Ollama takes the one of its "
            f"own that looks most like the file's, or gives the model the bare prompt ({PLAIN})"
        )
    lines += [f"PARAMETER stop {_quoted(tokenizer.token(index))}" for index in tokenizer.end_ids]
    lines.append(f"PARAMETER num_ctx {config.context}")
    settings = generation if isinstance(generation, Mapping) else {}
    if settings.get("do_sample") is False:
        lines.append("PARAMETER temperature 0")
        settings = {}
    for name in PARAMETERS:
        value = settings.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            lines.append(f"PARAMETER {OLLAMA_NAMES.get(name, name)} {value:g}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As a Modelfile quotes: in three marks where there is a line or a mark in it."""
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
