"""What travels beside the weights: config, tokenizer, chat templates, generation settings.

Everything comes from the model that is changed; where it has no chat template of its own, the templates, the end tokens
and the generation settings come from the chat model, with ids looked up by token string. Only data is copied: json,
text, templates, SentencePiece models. Code is left behind. How a tokenizer folder spells these things is
text/tokenizer/folder.py's to know.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import MANIFEST
from lapis.checkpoint.tensor_file import INDEX
from lapis.text.tokenizer.folder import (
    CHAT_TEMPLATE,
    CONFIG,
    TEMPLATES,
    TOKENIZER_FILES,
    add_tokens,
    copy_templates,
    eos_ids,
    read_object,
    template_files,
    write_json,
    write_named_tokens,
)
from lapis.text.tokenizer.vocabulary import Vocabulary
from lapis.weights.engine.outputs import Output

ACCOUNT, GENERATION = "lapis-merge.json", "generation_config.json"
_DATA = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")  # of generation_config.json
_OWN = {ACCOUNT, MANIFEST, "README.md", "config.json", GENERATION}


def copy_tokenizer_files(
    onto: Checkpoint,
    folder: Path,
    *,
    chat: Checkpoint | None = None,
    words: Vocabulary | None = None,
    chat_words: Vocabulary | None = None,
    config: Mapping[str, Any] | None = None,
    new_tokens: Mapping[str, int] | None = None,
) -> list[str]:
    """Writes every file that is not a weight into a folder.

    Args:
        onto: The model that is changed.
        folder: Where the files go.
        chat: The model that templates and end tokens come from, where onto has none.
        words: The vocabulary of onto.
        chat_words: The vocabulary of chat.
        config: What config.json holds instead of onto's.
        new_tokens: Tokens of chat that onto's tokenizer gains, with their ids.

    Returns:
        Lines that say what was done.
    """
    notes = []
    root = onto.beside()
    for path in sorted(root.iterdir()):
        name = path.name
        if name in _OWN or name.startswith(".") or ".safetensors" in name or not path.is_file():
            continue
        if name.endswith(_DATA) or name.upper().startswith(("LICENSE", "NOTICE")):
            source = onto.file(name)
            if source is not None:
                shutil.copyfile(source, folder / name)
        elif name.endswith(".py"):
            notes.append(f"{name} was not copied: it is code")
    if (root / TEMPLATES).is_dir():
        copy_templates(root, folder)
    if onto.front is not None:  # an adapter's own, with which it was trained
        for name in TOKENIZER_FILES:
            if (source := onto.file(name)) is not None:
                shutil.copyfile(source, folder / name)
        copy_templates(onto.front, folder)
    settings = dict(onto.config if config is None else config)
    generation = onto.json(GENERATION)
    if chat and words and chat_words:
        if new_tokens:
            listed = (chat.json("tokenizer.json") or {}).get("added_tokens") or []
            known = {token["content"]: token for token in listed}
            add_tokens(folder, [{**known.get(t, {}), "content": t, "id": i} for t, i in new_tokens.items()])
            words = replace(words, ids={**words.ids, **new_tokens})
        generation, more = _add_chat_settings(chat, words, chat_words, generation, settings, folder)
        notes += more
    if generation is not None:
        write_json(folder / GENERATION, generation)
    write_json(folder / "config.json", settings)
    return notes


def _add_chat_settings(
    chat: Checkpoint,
    words: Vocabulary,
    chat_words: Vocabulary,
    generation: dict[str, Any] | None,
    settings: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Templates, generation settings and end tokens of chat where onto has none; generation_config.json and notes."""
    notes = []
    if chat_words.template and not words.template:
        copy_templates(chat.beside(), folder)
        named = {"eos_token": chat_words.named.get("eos"), "pad_token": chat_words.named.get("pad")}
        if "pad_token" in read_object(folder, CONFIG):
            del named["pad_token"]
        write_named_tokens(folder, **{name: token for name, token in named.items() if token in words.ids and token})
        notes.append("the chat template comes from chat")
    elif chat_words.template and chat_words.template != words.template:
        notes.append(
            "onto's own chat template is kept, and chat's is another; where replies go wrong, put chat's "
            "chat_template.jinja into the result"
        )
    theirs = chat.json(GENERATION)
    if generation is None and theirs is not None:
        generation = _renumbered(theirs, chat_words, words)
        notes.append(f"{GENERATION} comes from chat")
    ends = [words.ids[token] for token in _tokens(chat_words, chat_words.ends) if token in words.ids]
    if ends and (chat_words.template or not words.template):
        generation = dict(generation or {})
        before = eos_ids({"eos_token_id": generation.get("eos_token_id", settings.get("eos_token_id"))}, GENERATION)
        both = join_ids(ends, before)
        if both != before:
            generation["eos_token_id"] = both if len(both) > 1 else both[0]
            notes.append(f"generation ends at {', '.join(_tokens(words, both))}")
    return generation, notes


def join_ids(*lists: Sequence[int]) -> list[int]:
    """Ids of several lists, each once, in their order."""
    return list(dict.fromkeys(i for ids in lists for i in ids))


def write_template(folder: Path, template: str) -> None:
    """Makes a chat template the one that holds: where the folder's tokenizer keeps it, and the files win."""
    (folder / TEMPLATES / "default.jinja").unlink(missing_ok=True)
    if template_files(folder) or not (folder / CONFIG).is_file():
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    else:
        write_json(folder / CONFIG, {**read_object(folder, CONFIG), "chat_template": template})


def write_index(folder: Path, files: Mapping[str, Sequence[Output]]) -> None:
    """model.safetensors.index.json for a model in several files."""
    total = sum(output.nbytes for outputs in files.values() for output in outputs)
    names = {output.name: file for file, outputs in files.items() for output in outputs}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})


def _tokens(words: Vocabulary, ids: Sequence[int]) -> list[str]:
    names = words.tokens()
    return [names[i] for i in ids if i in names]


def _renumbered(settings: Mapping[str, Any], theirs: Vocabulary, ours: Vocabulary) -> dict[str, Any]:
    """generation_config.json with each token id replaced by the id that the same token has here; lost ones go."""
    names, result = theirs.tokens(), dict(settings)
    for key in [key for key in settings if key.endswith("_token_id") or key in _ID_LISTS]:
        value = settings[key]
        ids = [ours.ids.get(names.get(i, "")) for i in (value if isinstance(value, list) else [value])]
        present = [i for i in ids if i is not None]
        if not present:
            del result[key]
        else:
            result[key] = present if isinstance(value, list) else present[0]
    return result
