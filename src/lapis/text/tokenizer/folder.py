"""Reading a tokenizer folder in the spellings that hubs have had.

Special tokens as text or as objects; added tokens in tokenizer.json, in `added_tokens_decoder`, or only named;
templates as text, as a list of named ones, in chat_template.jinja, or in a folder of them. What transformers 5 makes of
each is the measure. Leaves out: everything that a tokenizer does once it is open (tokenizer.py).
"""

import json
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lapis.checkpoint.files import JSON_LIMIT, contained, read_json
from lapis.errors import CheckpointError
from lapis.text.chat.template import check_syntax
from lapis.text.tokenizer.tokenizer import END_OF_TEXT, FILES, NAMED, TEMPLATES, Tokenizer

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def open_folder(root: Path) -> Tokenizer:
    """The tokenizer in a folder. Every file of it is opened inside the folder only, and checked."""
    if not root.is_dir():
        from lapis.checkpoint.hub import local_folder

        cached = local_folder(root)
        if cached is not None:
            return open_folder(cached)
        what = "is a file; give the folder that holds it" if root.exists() else "there is no such folder"
        raise CheckpointError(f"{root}: {what}")
    if not _there(root, "tokenizer.json"):
        raise CheckpointError(f"{root}: there is no tokenizer.json; save the tokenizer in the fast format")
    path = contained(root, "tokenizer.json")
    config_path = root / "tokenizer_config.json"
    config = _object(root, "tokenizer_config.json")
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes of JSON; the limit is {JSON_LIMIT:,}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:200]}") from None
    named = _named_tokens(root, config, config_path)
    if not config and not named and backend.token_to_id(END_OF_TEXT) is not None:
        named = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}  # GPT-2's folder has no more than tokenizer.json
    _add_tokens(backend, config, named, config_path)
    templates = _templates(root, config, config_path)
    for name, text in templates.items():
        check_syntax(text, f"{root} ({name} template)" if len(templates) > 1 else str(root))
    files = {name: contained(root, name).read_bytes() for name in FILES if _there(root, name)}
    for name in _jinja_files(root):
        files[f"{TEMPLATES}/{name}"] = contained(root, f"{TEMPLATES}/{name}").read_bytes()
    return Tokenizer(backend, named, templates, _stop_ids(root), str(root), files)


def _there(root: Path, name: str) -> bool:
    return os.path.lexists(root / name)


def _object(root: Path, name: str) -> dict[str, Any]:
    if not _there(root, name):
        return {}
    loaded = read_json(contained(root, name))
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{root / name}: holds a {type(loaded).__name__}, not an object")
    return loaded


def _added(value: Any, where: str, special: bool) -> AddedToken:
    """A token written as text, or as an object of which only the known fields count."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {"special": special, **{name: value[name] for name in _FLAGS if name in value}}
        wrong = [name for name, flag in flags.items() if not isinstance(flag, bool)]
        if wrong:
            raise CheckpointError(f"{where}: {wrong[0]} is {flags[wrong[0]]!r}; expected true or false")
        return AddedToken(value["content"], **flags)
    raise CheckpointError(f"{where}: is {value!r:.80}; expected a text, or an object with content")


def _named_tokens(root: Path, config: dict[str, Any], path: Path) -> dict[str, str]:
    named: dict[str, str] = {}
    older = {} if "added_tokens_decoder" in config else _object(root, "special_tokens_map.json")
    for name in NAMED:
        value = older.get(name, config.get(name))
        if value is not None:
            named[name] = _added(value, f"{path}: {name}", True).content
    return named


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str], path: Path) -> None:
    """Tokens that tokenizer_config.json has and tokenizer.json has not, with the ids that transformers gives them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict) or not all(isinstance(k, str) and k.isascii() and k.isdigit() for k in listed):
        raise CheckpointError(f"{path}: added_tokens_decoder must map ids to tokens")
    for index, value in sorted(listed.items(), key=lambda item: int(item[0])):
        token = _added(value, f"{path}: added_tokens_decoder[{index}]", False)
        if token.content in known:
            continue
        backend.add_tokens([token])
        known.add(token.content)
        got = backend.token_to_id(token.content)
        if got != int(index):
            raise CheckpointError(
                f'{path}: added_tokens_decoder gives "{token.content}" the id {index}; tokenizer.json leads to {got}'
            )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise CheckpointError(f"{path}: additional_special_tokens must be a list")
    for value in [*named.values(), *extra]:
        token = _added(value, f"{path}: additional_special_tokens", True)
        if token.content not in known:
            backend.add_special_tokens([token])
            known.add(token.content)


def _jinja_files(root: Path) -> list[str]:
    folder = root / TEMPLATES
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".jinja") if folder.is_dir() else []


def _templates(root: Path, config: dict[str, Any], path: Path) -> dict[str, str]:
    """Files win over tokenizer_config.json, as in transformers."""
    found: dict[str, str] = {}
    if _there(root, "chat_template.jinja"):
        found["default"] = _text(root, "chat_template.jinja")
    for name in _jinja_files(root):
        found[name.removesuffix(".jinja")] = _text(root, f"{TEMPLATES}/{name}")
    if found:
        return found
    value = config.get("chat_template")
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


def _text(root: Path, name: str) -> str:
    path = contained(root, name)
    try:
        with path.open(encoding="utf-8") as file:  # line ends as Python reads them, which is what transformers does
            return file.read(2_000_000)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None


def _stop_ids(root: Path) -> list[int]:
    """End ids of generation_config.json, or of config.json where there is no such file: one id or a list."""
    for name in ("generation_config.json", "config.json"):
        if not _there(root, name):
            continue
        value = _object(root, name).get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError(f"{root / name}: eos_token_id is {value!r:.60}; expected an id or a list of ids")
        return ids
    return []
