"""A tokenizer folder as one object of the tokenizers library, with the ids that transformers 5 gives.

tokenizer.json is the rule. Without it, vocab.json + merges.txt or vocab.txt are built as the class that
tokenizer_config.json names builds them, and a SentencePiece model is converted (sentence_piece.py). On top come added
tokens that only tokenizer_config.json lists, and settings that such a class applies whatever tokenizer.json says
(lower-casing, accents, a space before a text). A setting that cannot be applied is refused with the name of both files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lapis.checkpoint.files import contained
from lapis.errors import CheckpointError
from lapis.parsing import quoted
from lapis.text.tokenizer.folder import (
    CONFIG,
    has_file,
    read_added_tokens,
    read_extra_tokens,
    read_named_tokens,
    read_object,
)
from lapis.text.tokenizer.sentence_piece import converted, model_file
from lapis.text.tokenizer.trial import open_stored, state_of

END_OF_TEXT = "<|endoftext|>"
_BERT = frozenset({"BertTokenizer", "DistilBertTokenizer", "FunnelTokenizer", "MPNetTokenizer", "MobileBertTokenizer"})
_BYTE_LEVEL = frozenset(
    {"GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "BlenderbotTokenizer", "CodeGenTokenizer",
     "DebertaTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"}
)  # fmt: skip
_METASPACE = frozenset({"LlamaTokenizer"})
_PLAIN = frozenset({"", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend"})
# the class that transformers takes for a model type, where the folder names none; None: tokenizer.json alone counts
_OF_MODEL_TYPE = {
    "bert": "BertTokenizer", "distilbert": "BertTokenizer", "electra": "BertTokenizer", "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer", "roberta": "RobertaTokenizer", "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer", "qwen2_moe": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer", "mistral": None,
    "mixtral": None, "phi3": None, "olmo2": None, "granite": None, "modernbert": None,
}  # fmt: skip
_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "keep_accents", "add_prefix_space")
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def open_backend(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], bool]:
    """Opens what encodes.

    Args:
        folder: A folder with tokenizer.json, vocab.json + merges.txt, vocab.txt, or a SentencePiece model.

    Returns:
        The tokenizer; its special tokens by name; whether it is just what tokenizer.json holds, and not changed by
        settings or built from other files.

    Raises:
        CheckpointError: For files that are missing, damaged, or contradict each other, naming them.
        MissingExtra: What converts a SentencePiece model is not installed.
    """
    config, kind = read_object(folder, CONFIG), _class_name(folder)
    as_stored = has_file(folder, "tokenizer.json")
    if as_stored:
        backend, as_stored = open_stored(contained(folder, "tokenizer.json"))
    else:
        backend = _built(folder, kind, config)
    named = read_named_tokens(folder)
    if not config and not named and backend.token_to_id(END_OF_TEXT) is not None:
        named = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}  # GPT-2's folder has no more than tokenizer.json
    _add_tokens(backend, folder, named)
    changed = has_file(folder, "tokenizer.json") and _apply_settings(backend, folder, kind, config)
    return backend, named, as_stored and not changed


def plain_backend(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same, but nothing that a text spells is a special token; itself where that holds already.

    Unigram has special tokens among its pieces, with a better score than any other, so a text that spells one would be
    cut into it. Their names become such that no text has.

    Args:
        backend: Any; it is not changed.
    """
    if not isinstance(backend.model, models.Unigram):
        return backend
    document = json.loads(backend.to_str())
    added = {token["content"] for token in document["added_tokens"] if token["special"]}
    pieces = [(piece, score, piece in added) for piece, score in document["model"]["vocab"]]
    hidden, secret = {piece for piece, _, special in pieces if special}, token_hex(16)
    document["model"]["vocab"] = [(secret + piece if special else piece, score) for piece, score, special in pieces]
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in hidden]
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def _class_name(folder: Path) -> str:
    """The class with which transformers opens the folder, without "Fast"; "" for the plain one, which adds nothing."""
    model = read_object(folder, "config.json")
    declared = read_object(folder, CONFIG).get("tokenizer_class") or model.get("tokenizer_class") or ""
    declared = declared.removesuffix("Fast") if isinstance(declared, str) else ""
    model_type = str(model.get("model_type"))
    if model_type in _OF_MODEL_TYPE:
        registered = _OF_MODEL_TYPE[model_type]
        declared = "" if registered is None else declared or registered
    return "" if declared in _PLAIN or f"{declared}Fast" in _PLAIN else declared


def _built(folder: Path, kind: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of files from before tokenizer.json, as the class `kind` builds it."""
    if has_file(folder, "vocab.json") and has_file(folder, "merges.txt"):
        if kind not in _BYTE_LEVEL:
            raise CheckpointError(
                f"{folder}: vocab.json and merges.txt do not say how text is split, and {CONFIG} names "
                f"{kind or 'no class that does'}; give tokenizer_class GPT2Tokenizer or Qwen2Tokenizer, or save the "
                "tokenizer in the fast format (tokenizer.json)"
            )
        return _byte_level_bpe(folder, kind, config)
    if has_file(folder, "vocab.txt") and kind in _BERT:
        return _word_piece(folder, config)
    if (name := model_file(folder)) is not None:
        return converted(folder, name)
    others = [name for name in ("vocab.txt", "vocab.json") if has_file(folder, name)]
    there = f"only {others[0]}" if others else "and no other file of a tokenizer"
    raise CheckpointError(f"{folder}: there is no tokenizer.json, {there}; save the tokenizer in the fast format")


def _byte_level_bpe(folder: Path, kind: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    space = bool(config.get("add_prefix_space"))
    vocab, merges_path = read_object(folder, "vocab.json"), contained(folder, "merges.txt")
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{merges_path}: not UTF-8 at byte {error.start}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not (number == 1 and line.startswith("#version")):
            pair = line.rstrip("\r").split(" ")
            if len(pair) != 2:
                raise CheckpointError(f"{merges_path} line {number}: is {quoted(line)}; expected two tokens")
            merges.append((pair[0], pair[1]))
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: vocab.json and merges.txt do not fit: {reason}") from None
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        )
    elif kind in ("RobertaTokenizer", "BartTokenizer"):
        first, last = config.get("cls_token", "<s>"), config.get("sep_token", "</s>")
        first, last = (t["content"] if isinstance(t, dict) else t for t in (first, last))
        if first not in vocab or last not in vocab:
            raise CheckpointError(f"{folder}: vocab.json lacks {first} or {last}, which stand around every text")
        backend.post_processor = processors.RobertaProcessing(
            (last, vocab[last]), (first, vocab[first]), add_prefix_space=space
        )
    elif config.get("add_bos_token") or config.get("add_eos_token"):
        backend.post_processor = _around(folder, vocab, bool(config.get("add_bos_token")), config)
    return backend


def _around(
    folder: Path, vocab: Mapping[str, Any], bos: bool, config: Mapping[str, Any]
) -> processors.TemplateProcessing:
    """What add_bos_token and add_eos_token put around a text; they count only where there is no tokenizer.json."""
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | read_named_tokens(folder)
    before = [named["bos_token"]] if bos else []
    after = [named["eos_token"]] if config.get("add_eos_token") else []
    listed = {token["content"]: i for i, token in read_added_tokens(folder).items()}
    ids = {token: vocab.get(token, listed.get(token)) for token in before + after}
    if None in ids.values():
        raise CheckpointError(f"{folder}: vocab.json lacks {', '.join(ids)}, which {CONFIG} puts around every text")
    return processors.TemplateProcessing(single=" ".join([*before, "$A", *after]), special_tokens=list(ids.items()))


def _word_piece(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = contained(folder, "vocab.txt")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}") from None
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line or i + 1 < len(lines)}
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | read_named_tokens(folder)
    missing = [token for name in ("unk_token", "cls_token", "sep_token") if (token := named[name]) not in vocab]
    if missing:
        raise CheckpointError(f"{path}: lacks {missing[0]}, which every text needs")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=named["unk_token"]))
    backend.normalizer = _bert_normalizer(config)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    first, last = named["cls_token"], named["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, vocab[first]), (last, vocab[last])],
    )
    return backend


def _bert_normalizer(config: Mapping[str, Any]) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, named: Mapping[str, str]) -> None:
    """Tokens that other files list and tokenizer.json lacks, with the ids that transformers gives them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = read_added_tokens(folder)
    if not listed and not has_file(folder, "tokenizer.json"):
        listed = {i: {"content": t, "special": False} for t, i in read_object(folder, "added_tokens.json").items()}
    for index, entry in sorted(listed.items()):
        if entry["content"] in known:
            continue
        backend.add_tokens([AddedToken(**entry)])
        known.add(entry["content"])
        got = backend.token_to_id(entry["content"])
        if got != index:
            raise CheckpointError(
                f'{folder / CONFIG}: added_tokens_decoder gives "{entry["content"]}" the id {index}; '
                f"tokenizer.json leads to {got}"
            )
    for entry in [*({"content": token} for token in named.values()), *read_extra_tokens(folder)]:
        if entry["content"] not in known:
            backend.add_special_tokens([AddedToken(**{"special": True, "normalized": False, **entry})])
            known.add(entry["content"])


def _apply_settings(backend: tokenizers.Tokenizer, folder: Path, kind: str, config: Mapping[str, Any]) -> bool:
    """Applies what the class `kind` applies on top of tokenizer.json; True where that changed something."""
    wrong = [n for n in _SETTINGS if not isinstance(config.get(n), (bool, type(None)))]
    if wrong:
        raise CheckpointError(f"{folder / CONFIG}: {wrong[0]} is {quoted(config[wrong[0]])}; expected true or false")
    if kind in _BERT:
        return _apply_bert(backend, folder, config)
    if kind in _BYTE_LEVEL or (kind in _METASPACE and config.get("add_prefix_space") is not None):
        return _apply_prefix_space(backend, config, kind)
    explicit = [name for name in _SETTINGS if kind not in _METASPACE and config.get(name) is not None]
    known = kind and all(_agrees(backend, name, bool(config[name])) for name in explicit)
    if kind and not known:
        name = next(name for name in explicit if not _agrees(backend, name, bool(config[name])))
        raise CheckpointError(
            f"{folder}: {CONFIG} says {name} {str(config[name]).lower()}, which {kind} may apply on top of "
            "tokenizer.json, which does not have it; save the tokenizer again with transformers so that both agree"
        )
    return False


def _apply_bert(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> bool:
    stored, normalizer = state_of(backend.normalizer), _bert_normalizer(config)
    if stored == state_of(normalizer):
        return False
    if stored.get("type") == "BertNormalizer":
        backend.normalizer = normalizer
        return True
    explicit = [name for name in _SETTINGS[:3] if config.get(name) is not None]
    if explicit:
        raise CheckpointError(
            f"{folder}: {CONFIG} says {explicit[0]} {str(config[explicit[0]]).lower()}, but the normalizer in "
            f"tokenizer.json is {stored.get('type', 'none')}, to which it cannot be applied; take the setting out, or "
            "save the tokenizer again with transformers"
        )
    return False


def _apply_prefix_space(backend: tokenizers.Tokenizer, config: Mapping[str, Any], kind: str) -> bool:
    """Whether a space is put before a text: in ByteLevel, in Metaspace, or by a normalizer that prepends one."""
    space = bool(config.get("add_prefix_space"))
    splitter, normalizer = state_of(backend.pre_tokenizer), state_of(backend.normalizer)
    changed = False
    for step in splitter.get("pretokenizers", [splitter]):
        if step.get("type") == "ByteLevel" and kind in _BYTE_LEVEL and step.get("add_prefix_space") != space:
            step["add_prefix_space"] = space
            changed = True
        if step.get("type") == "Metaspace" and kind in _METASPACE:
            scheme = ("first" if config.get("legacy") is False else "always") if space else "never"
            if (step.get("prepend_scheme") == "never") == space:
                step["prepend_scheme"] = scheme
                changed = True
    steps = normalizer.get("normalizers", [normalizer])
    if kind in _METASPACE and not space and any(step.get("type") == "Prepend" for step in steps):
        steps = [step for step in steps if step.get("type") != "Prepend"]
        normalizer = {"type": "Sequence", "normalizers": steps}
        changed = True
    if changed:
        shell = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
        parts = {"pre_tokenizer": splitter or None, "normalizer": normalizer or None}
        made = tokenizers.Tokenizer.from_str(json.dumps(shell | parts))
        backend.pre_tokenizer, backend.normalizer = made.pre_tokenizer, made.normalizer
    return changed


def _agrees(backend: tokenizers.Tokenizer, name: str, value: bool) -> bool:
    """Whether tokenizer.json does what a setting asks for, as far as its steps show."""
    steps = [step for part in (backend.normalizer, backend.pre_tokenizer) for step in _steps(state_of(part))]
    types = [step.get("type") for step in steps]
    if name == "do_lower_case":
        return value == ("Lowercase" in types or any(step.get("lowercase") for step in steps))
    if name in ("strip_accents", "keep_accents"):
        strips = "StripAccents" in types or any(step.get("strip_accents") for step in steps)
        return strips == (value if name == "strip_accents" else not value)
    if name == "add_prefix_space":
        marks = [step["add_prefix_space"] for step in steps if "add_prefix_space" in step]
        marks += [step["prepend_scheme"] != "never" for step in steps if "prepend_scheme" in step]
        return all(mark == value for mark in marks + ["Prepend" in types] * ("Prepend" in types))
    return all(step.get("handle_chinese_chars", value) == value for step in steps)


def _steps(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(state.get("pretokenizers") or state.get("normalizers") or [state])
