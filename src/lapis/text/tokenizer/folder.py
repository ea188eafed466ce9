"""The files of a tokenizer folder, read and written as JSON and text: the one place that knows their spellings.

Special tokens as text or as objects; added tokens in tokenizer.json, in `added_tokens_decoder`, or only named;
templates as text, as a list of named ones, in chat_template.jinja, or in a folder of them. What transformers 5 makes of
each is the measure. Nothing is encoded here and the tokenizers library is not imported, so that weights/ can use it:

    read_templates(adapter, base)   the chat templates that hold, by name: of the nearest folder that has any
    copy_templates(source, folder)  `folder` then speaks with these templates and no others
    read_named_tokens(folder)       "eos_token" -> "<|im_end|>", ...
    read_end_ids(folder)            ids that end a reply, as generation_config.json or config.json says
    add_tokens(folder, entries)     tokens under given ids, in every file that lists them
    write_named_tokens(folder, ...) other special tokens in tokenizer_config.json
    BYTE_OF                         GPT-2's characters for bytes
    TOKENIZER_FILES                 the names of all files that belong to a tokenizer
    CHATML                          the template that new tokenizers have

The tokens of a folder as a table are in vocabulary.py; the tokenizer itself is opened by tokenizer.py.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis.checkpoint.files import JSON_LIMIT, contained
from lapis.checkpoint.files import read_object as checked_object
from lapis.errors import CheckpointError
from lapis.parsing import quoted

CONFIG, CHAT_TEMPLATE, TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
# how tokenizers that lapis trains split a text: Qwen 3.5's way, where a combining mark stays with its letter, and for
# which GGUF files have a name ("qwen35"), as they have none for GPT-2's with marks
TRAINED_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TOKENIZER_FILES = (
    "tokenizer.json", CONFIG, "special_tokens_map.json", CHAT_TEMPLATE, "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model",
)  # fmt: skip
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEMPLATE_LIMIT = 2_000_000  # characters


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable characters for bytes: those that print stand for themselves, the others begin at U+0100."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = byte_alphabet()


def has_file(folder: Path, name: str) -> bool:
    """True where the folder has an entry of this name, also one that must not be opened."""
    return os.path.lexists(folder / name)


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; {} where there is no such file. Raises CheckpointError for anything else."""
    if not has_file(folder, name):
        return {}
    path = contained(folder, name)
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes of JSON; the limit is {JSON_LIMIT:,}")
    return checked_object(path)


def write_json(path: Path, value: Any) -> None:
    """JSON as all folders of lapis have it: indented, in UTF-8, with a line end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_token(value: Any, where: str, special: bool) -> dict[str, Any]:
    """A token that is written as text or as an object: content and the flags of TOKEN_FLAGS, others are dropped."""
    if isinstance(value, str):
        return {"content": value, "special": special, "normalized": not special}
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {"special": special, **{name: value[name] for name in TOKEN_FLAGS if name in value}}
        wrong = [name for name, flag in flags.items() if not isinstance(flag, bool)]
        if wrong:
            raise CheckpointError(f"{where}: {wrong[0]} is {quoted(flags[wrong[0]])}; expected true or false")
        return {"content": value["content"], **flags}
    raise CheckpointError(f"{where}: is {quoted(value)}; expected a text, or an object with content")


def read_named_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by the names that templates use ("bos_token", "eos_token", ...)."""
    path, config = folder / CONFIG, read_object(folder, CONFIG)
    older = {} if "added_tokens_decoder" in config else read_object(folder, "special_tokens_map.json")
    values = {name: older.get(name, config.get(name)) for name in NAMED_TOKENS}
    return {
        name: read_token(value, f"{path}: {name}", True)["content"]
        for name, value in values.items()
        if value is not None
    }


def read_added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Id -> content and flags of the tokens that `added_tokens_decoder` lists, in the order of ids."""
    path = folder / CONFIG
    listed = read_object(folder, CONFIG).get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(isinstance(k, str) and k.isascii() and k.isdigit() for k in listed):
        raise CheckpointError(f"{path}: added_tokens_decoder must map ids to tokens")
    entries = sorted((int(index), value) for index, value in listed.items())
    return {index: read_token(value, f"{path}: added_tokens_decoder[{index}]", False) for index, value in entries}


def read_extra_tokens(folder: Path) -> list[dict[str, Any]]:
    """Special tokens without a name of their own: `extra_special_tokens`, or `additional_special_tokens`."""
    path, config = folder / CONFIG, read_object(folder, CONFIG)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise CheckpointError(f"{path}: additional_special_tokens must be a list")
    return [read_token(value, f"{path}: additional_special_tokens", True) for value in extra]


def read_templates(*folders: Path) -> dict[str, str]:
    """The chat templates that hold, by name; the usual one is "default". {} where there is none.

    Args:
        folders: The nearest first: an adapter's folder before its base's. The first that has any template is the one
            that holds, whole; templates of two folders are never mixed.

    Returns:
        Within a folder chat_template.jinja and additional_chat_templates/ win over tokenizer_config.json, as in
        transformers.

    Raises:
        CheckpointError: For a template that is no text, naming file and field.
    """
    for folder in folders:
        templates = dict(_template_texts(folder)) or _config_templates(folder)
        if templates:
            return templates
    return {}


def template_files(folder: Path) -> list[str]:
    """The files of the folder that hold a template each, by their names in it."""
    more = folder / TEMPLATES
    names = sorted(p.name for p in more.iterdir() if p.suffix == ".jinja") if more.is_dir() else []
    return [CHAT_TEMPLATE] * has_file(folder, CHAT_TEMPLATE) + [f"{TEMPLATES}/{name}" for name in names]


def copy_templates(source: Path, folder: Path) -> bool:
    """Makes `folder` speak with the templates of `source`, spelled as there, and with no others.

    Args:
        source: A folder whose templates hold.
        folder: A folder that is being written.

    Returns:
        False, and nothing is changed, where the source has no template.
    """
    if not read_templates(source):
        return False
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    files = template_files(source)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(contained(source, name), folder / name)
    config, theirs = read_object(folder, CONFIG), read_object(source, CONFIG)
    changed = {name: value for name, value in config.items() if name != "chat_template"}
    if not files:
        changed["chat_template"] = theirs["chat_template"]
    if changed != config:
        write_json(folder / CONFIG, changed)
    return True


def read_end_ids(folder: Path) -> list[int]:
    """End ids of generation_config.json, or of config.json where there is no such file: one id or a list."""
    for name in ("generation_config.json", "config.json"):
        if has_file(folder, name):
            return eos_ids(read_object(folder, name), folder / name)
    return []


def eos_ids(settings: Mapping[str, Any], where: str | Path) -> list[int]:
    """`eos_token_id` of a model's settings, which is an id, a list of ids, or absent. where: named in the error."""
    value = settings.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{where}: eos_token_id is {quoted(value)}; expected an id or a list of ids")
    return ids


def add_tokens(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Enters tokens into tokenizer.json, and into tokenizer_config.json where that lists tokens.

    Args:
        folder: A folder that is being written.
        entries: Of each token `content`, `id`, and any of TOKEN_FLAGS; by default it is special and takes no space.
    """
    plain = {name: name == "special" for name in ("special", "single_word", "lstrip", "rstrip", "normalized")}
    entries = [{**plain, **entry} for entry in entries]
    document = read_object(folder, "tokenizer.json")
    document["added_tokens"] = (document.get("added_tokens") or []) + entries
    write_json(folder / "tokenizer.json", document)
    config = read_object(folder, CONFIG)
    if "added_tokens_decoder" in config:
        for entry in entries:
            config["added_tokens_decoder"][str(entry["id"])] = {k: v for k, v in entry.items() if k != "id"}
        write_json(folder / CONFIG, config)


def write_named_tokens(folder: Path, **tokens: str) -> None:
    """Sets special tokens by name (eos_token="<|im_end|>") in tokenizer_config.json."""
    write_json(folder / CONFIG, {**read_object(folder, CONFIG), **tokens})


def _template_texts(folder: Path) -> Iterator[tuple[str, str]]:
    for name in template_files(folder):
        path = contained(folder, name)
        try:
            with path.open(encoding="utf-8") as file:  # line ends as Python reads them, which is what transformers does
                text = file.read(_TEMPLATE_LIMIT)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None
        yield "default" if name == CHAT_TEMPLATE else Path(name).stem, text


def _config_templates(folder: Path) -> dict[str, str]:
    value = read_object(folder, CONFIG).get("chat_template")
    path = folder / CONFIG
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return dict(value)
    if isinstance(value, list):
        for item in value:
            if not isinstance(item, dict) or not all(isinstance(item.get(k), str) for k in ("name", "template")):
                raise CheckpointError(f"{path}: chat_template: each of a list needs a name and a template")
        return {item["name"]: item["template"] for item in value}
    raise CheckpointError(f"{path}: chat_template is {json.dumps(value)[:60]}; expected a text or a list")
