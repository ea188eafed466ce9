"""What travels beside the weights: config, tokenizer, chat template, generation settings.

Everything comes from the model that is changed; where it has no chat template of its own, the template, the end tokens
and the generation settings come from the chat model, with ids looked up by token string. Only data is carried: json,
text, templates, SentencePiece models. Code is left behind.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import MANIFEST
from lapis.checkpoint.store import INDEX
from lapis.weights.engine.outputs import Output
from lapis.weights.vocabulary import Vocabulary

ACCOUNT = "lapis-merge.json"
_DATA = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
_OWN = {ACCOUNT, MANIFEST, "README.md", "config.json", "generation_config.json"}


def carry(
    onto: Checkpoint,
    folder: Path,
    *,
    chat: Checkpoint | None = None,
    words: Vocabulary | None = None,
    chat_words: Vocabulary | None = None,
    config: Mapping[str, Any] | None = None,
    new_tokens: Mapping[str, int] | None = None,
) -> list[str]:
    """Writes every file that is not a weight into `folder`; returns lines that say what was done.

    words, chat_words: the vocabularies of onto and chat. config: what config.json holds instead of onto's. new_tokens:
    tokens of chat that onto's tokenizer gains, with their ids.
    """
    notes = []
    for path in sorted(onto.beside().iterdir()):
        name = path.name
        if name in _OWN or name.startswith(".") or ".safetensors" in name or not path.is_file():
            continue
        if name.endswith(_DATA) or name.upper().startswith(("LICENSE", "NOTICE")):
            found = onto.file(name)
            if found is not None:
                shutil.copyfile(found, folder / name)
        elif name.endswith(".py"):
            notes.append(f"{name} was not copied: it is code")
    settings = dict(onto.config if config is None else config)
    generation = onto.json("generation_config.json")
    if chat and words and chat_words:
        if new_tokens:
            _add_tokens(chat, folder, new_tokens)
            words = replace(words, ids={**words.ids, **new_tokens})
        generation, more = _speech(chat, words, chat_words, generation, settings, folder)
        notes += more
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", settings)
    return notes


def _speech(
    chat: Checkpoint,
    words: Vocabulary,
    chat_words: Vocabulary,
    generation: dict[str, Any] | None,
    settings: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Template, generation settings and end tokens of chat where onto has none; generation_config.json and notes."""
    notes = []
    if chat_words.template and not words.template:
        _give_template(chat, chat_words, words, folder)
        notes.append("the chat template comes from chat")
    theirs = chat.json("generation_config.json")
    if generation is None and theirs is not None:
        generation = _renumbered(theirs, chat_words, words)
        notes.append("generation_config.json comes from chat")
    ends = [words.ids[token] for token in _tokens(chat_words, chat_words.ends) if token in words.ids]
    if ends and (chat_words.template or not words.template):
        generation = dict(generation or {})
        had = generation.get("eos_token_id", settings.get("eos_token_id"))
        had = had if isinstance(had, list) else [] if had is None else [had]
        both = list(dict.fromkeys([*ends, *had]))
        if both != had:
            generation["eos_token_id"] = both if len(both) > 1 else both[0]
            notes.append(f"generation ends at {', '.join(_tokens(words, both))}")
    return generation, notes


def _add_tokens(chat: Checkpoint, folder: Path, new_tokens: Mapping[str, int]) -> None:
    """Enters chat's added tokens into the tokenizer's files, under the ids that they have here."""
    document, theirs = json.loads((folder / "tokenizer.json").read_bytes()), chat.json("tokenizer.json")
    by_text = {token["content"]: token for token in theirs.get("added_tokens", [])}
    entries = [{**by_text.get(token, _PLAIN), "content": token, "id": i} for token, i in new_tokens.items()]
    document["added_tokens"] = (document.get("added_tokens") or []) + entries
    write_json(folder / "tokenizer.json", document)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    if "added_tokens_decoder" in settings:
        for entry in entries:
            settings["added_tokens_decoder"][str(entry["id"])] = {k: v for k, v in entry.items() if k != "id"}
        write_json(path, settings)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_index(folder: Path, files: Mapping[str, Sequence[Output]]) -> None:
    """model.safetensors.index.json for a model in several files."""
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    names = {output.name: file for file, outputs in files.items() for output in outputs}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def _tokens(words: Vocabulary, ids: list[int] | tuple[int, ...]) -> list[str]:
    names = words.tokens()
    return [names[i] for i in ids if i in names]


def _give_template(chat: Checkpoint, chat_words: Vocabulary, words: Vocabulary, folder: Path) -> None:
    """The template and the end token as they are stored: in a file of its own or in tokenizer_config.json."""
    theirs = chat.json("tokenizer_config.json") or {}
    path = folder / "tokenizer_config.json"
    ours = json.loads(path.read_bytes()) if path.is_file() else {}
    if "chat_template" in theirs:
        ours["chat_template"] = theirs["chat_template"]
    else:
        (folder / "chat_template.jinja").write_text(chat_words.template or "", encoding="utf-8")
    if chat_words.named.get("eos") in words.ids:
        ours["eos_token"] = chat_words.named["eos"]
    if "pad_token" not in ours and chat_words.named.get("pad") in words.ids:
        ours["pad_token"] = chat_words.named["pad"]
    write_json(path, ours)


def _renumbered(settings: Mapping[str, Any], theirs: Vocabulary, ours: Vocabulary) -> dict[str, Any]:
    """generation_config.json with each token id replaced by the id that the same token has here; lost ones go."""
    names, result = theirs.tokens(), dict(settings)
    for key in [key for key in settings if key.endswith("_token_id")]:
        value = settings[key]
        ids = [ours.ids.get(names.get(i, "")) for i in (value if isinstance(value, list) else [value])]
        kept = [i for i in ids if i is not None]
        if not kept:
            del result[key]
        else:
            result[key] = kept if isinstance(value, list) else kept[0]
    return result
