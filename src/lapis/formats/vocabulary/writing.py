"""A tokenizer as the fields of a GGUF file: tokens, their types, merges or scores, ids, the name of its splitting.

What a file cannot say is refused with the reason; nothing is approximated. That the fields say what the tokenizer does
is proved elsewhere (proof.py). Leaves out word-level tokenizers.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from lapis.errors import CheckpointError
from lapis.formats.vocabulary.patterns import names_of
from lapis.formats.vocabulary.probe import probe
from lapis.formats.vocabulary.reading import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    loses_letters,
)
from lapis.formats.vocabulary.rebuilding import is_bracketed
from lapis.formats.vocabulary.unigram import SPACE
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.text.tokenizer.vocabulary import BYTE_TOKEN
from lapis.wording import format_count

UNREACHABLE = -1e9  # score of a token that no merge leads to
SPECIAL_NAMES = {"unk_token": "unknown", "pad_token": "padding", "sep_token": "seperator", "cls_token": "cls",
                 "mask_token": "mask"}  # fmt: skip  # the misspelling is the format's own


def vocabulary_fields(tokenizer: Tokenizer, rows: int, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The fields that may describe a tokenizer; which of them does is for the proof to say.

    Args:
        tokenizer: Any whose files say how text is cut.
        rows: Of the embedding. Ids that no token has are told as unused ones.
        notes: Gains what a reader should know.

    Yields:
        Key -> value, the likeliest first.

    Raises:
        CheckpointError: For a tokenizer of another kind, or with settings that the format has no words for.
    """
    tokenizer.check_rows(rows)
    document = tokenizer.document()
    model = document["model"]
    kind = _kind(model, document, tokenizer.source)
    fields = _table(document, kind, rows, tokenizer) | _around(tokenizer, kind)
    fields |= _ends(tokenizer, fields.get(PREFIX + "eos_token_id"), notes)
    for name, key in SPECIAL_NAMES.items():
        index = tokenizer.id(tokenizer.named[name]) if name in tokenizer.named else None
        if index is not None:
            fields.setdefault(f"{PREFIX}{key}_token_id", index)
    fields[PREFIX + "model"] = kind
    if kind == "llama":
        # with and without the space that is put before a text; the likelier first, since its problem is what is told
        steps = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
        lead = '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
        yield from ({**fields, PREFIX + "pre": "default", PREFIX + "add_space_prefix": s} for s in (lead, not lead))
    elif kind == "t5":
        fields |= {PREFIX + "pre": "default", PREFIX + "unknown_token_id": model["unk_id"]}
        if characters := _characters(document.get("normalizer")):
            fields[PREFIX + "precompiled_charsmap"] = characters
        for merged, lead in ((True, True), (False, True), (False, False)):
            yield {**fields, PREFIX + "remove_extra_whitespaces": merged, PREFIX + "add_space_prefix": lead}
    elif kind == "bert":
        normalizer = document.get("normalizer") or {}
        lowercase = bool(normalizer.get("lowercase", True))
        accents = normalizer.get("strip_accents")
        if lowercase if accents is None else accents:
            _check_letters(model["vocab"], tokenizer.source, notes)
        yield fields | {
            PREFIX + "pre": "default", PREFIX + "normalizer.lowercase": lowercase,
            PREFIX + "normalizer.strip_accents": lowercase if accents is None else bool(accents),
        }  # fmt: skip
    else:
        texts, cutting = probe(), _cutting(document)
        _check_normalizer(cutting.normalizer, texts, tokenizer.source, notes)
        names = names_of(cutting.pre_tokenizer, bool(model.get("ignore_merges")), texts)
        if not names:
            raise CheckpointError(
                f"{tokenizer.source}: its pre_tokenizer cuts text as no splitting does that a GGUF file can name"
            )
        yield from ({**fields, PREFIX + "pre": name} for name in names)


def _kind(model: Mapping[str, Any], document: Mapping[str, Any], where: str) -> str:
    if model["type"] == "WordPiece":
        if model.get("continuing_subword_prefix") != "##":
            raise CheckpointError(f"{where}: its pieces do not begin with ##; a GGUF file has no words for others")
        return "bert"
    if model["type"] == "Unigram":
        if model.get("unk_id") is None or model.get("byte_fallback"):
            lacks = "spells what it does not know by bytes" if model.get("byte_fallback") else "has no unknown token"
            raise CheckpointError(f"{where}: its Unigram model {lacks}, which a GGUF file has no words for")
        return "t5"
    if model["type"] != "BPE":
        raise CheckpointError(
            f"{where}: a tokenizer of kind {model['type']} has no GGUF file; BPE, Unigram and WordPiece have"
        )
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if odd:
        raise CheckpointError(f"{where}: tokenizer.json sets {odd[0]}, for which a GGUF file has no words")
    cutter = document.get("pre_tokenizer") or {}
    if any(step.get("type") == "ByteLevel" for step in cutter.get("pretokenizers", [cutter])):
        return "gpt2"
    if not model.get("byte_fallback"):
        raise CheckpointError(
            f"{where}: spells neither bytes nor characters by bytes; a GGUF file has no words for that"
        )
    return "llama"


def _table(document: Mapping[str, Any], kind: str, rows: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens, types, and scores or merges."""
    model = document["model"]
    vocab = _ids(model)
    names: dict[int, str] = {index: token for token, index in vocab.items()}
    types = dict.fromkeys(names, NORMAL)
    if kind == "bert":
        names = {i: _word_piece(token) for i, token in names.items()}
    if kind == "llama":
        types |= {i: BYTE for i, token in names.items() if BYTE_TOKEN.fullmatch(token)}
    for added in document.get("added_tokens") or []:
        spelled = added["content"]
        if kind == "llama" and added.get("normalized") and not added["special"]:
            spelled = spelled.replace(SPACE, " ")
        names[added["id"]] = spelled
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if kind == "llama" and model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = UNKNOWN
    if kind == "t5":
        types[model["unk_id"]] = UNKNOWN
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    if len(set(tokens)) < rows:
        twin = next(token for i, token in enumerate(tokens) if tokens.index(token) != i)
        raise CheckpointError(f'{tokenizer.source}: "{twin:.40}" stands for two ids; in a GGUF file each token is one')
    fields: dict[str, Any] = {
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": [types.get(i, UNUSED) for i in range(rows)],
    }
    if kind == "gpt2":
        fields[PREFIX + "merges"] = [" ".join(_pair(merge)) for merge in model["merges"]]
    if kind == "llama":
        scores = _scores(model)
        fields[PREFIX + "scores"] = [scores.get(i, 0.0) for i in range(rows)]
    if kind == "t5":
        own = [float(score) for _, score in model["vocab"]]
        fields[PREFIX + "scores"] = [*own, *[UNREACHABLE] * (rows - len(own))][:rows]
    return fields


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id; Unigram has a list of tokens with scores."""
    vocab = model["vocab"]
    return {token: i for i, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)


def _characters(normalizer: Mapping[str, Any] | None) -> bytes:
    """SentencePiece's map of characters, alone or among other steps, which the proof shows to change nothing."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    return next((base64.b64decode(s["precompiled_charsmap"]) for s in steps if s.get("type") == "Precompiled"), b"")


def _word_piece(token: str) -> str:
    """As llama.cpp has BERT's pieces: those that begin a word are marked, and not those that go on."""
    if token.startswith("##"):
        return token.removeprefix("##")
    return token if is_bracketed(token) else SPACE + token


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _scores(model: Mapping[str, Any]) -> dict[int, float]:
    """Score of each token: the earlier its first merge, the higher. A single character needs none."""
    vocab = model["vocab"]
    scores: dict[int, float] = {}
    for rank, merge in enumerate(model["merges"]):
        if (index := vocab.get("".join(_pair(merge)))) is not None:
            scores.setdefault(index, -float(rank))
    for token, index in vocab.items():
        if len(token) > 1 and index not in scores and not BYTE_TOKEN.fullmatch(token):
            scores[index] = UNREACHABLE
    return scores


def _around(tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    """What the tokenizer puts before and after a text, which is at most one token each."""
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    before = whole[:start] if start is not None else whole
    after = whole[start + len(plain) :] if start is not None else []
    if start is None or len(before) > 1 or len(after) > 1 or (kind == "bert" and not (before and after)):
        raise CheckpointError(
            f"{tokenizer.source}: puts {format_count(len(before), 'token')} before a text and {len(after)} after it; "
            "a GGUF file has one before and one after"
        )
    fields: dict[str, Any] = {PREFIX + "add_bos_token": bool(before), PREFIX + "add_eos_token": bool(after)}
    first = before[0] if before else tokenizer.bos_id
    if first is not None:
        fields[PREFIX + "bos_token_id"] = first
    if after:
        fields[PREFIX + "eos_token_id"] = after[0]
    if kind == "bert":
        fields[PREFIX + "seperator_token_id"] = after[0]
    return fields


def _ends(tokenizer: Tokenizer, after: int | None, notes: list[str]) -> dict[str, Any]:
    """The tokens that end a reply, by the three names that there are: eos (what stands after a text too), eot, eom."""
    ends = list(dict.fromkeys([*([] if after is None else [after]), *tokenizer.end_ids]))
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    if not ends:
        notes.append("no token ends a reply: llama.cpp goes on until its limit")
    if len(ends) > len(keys):
        rest = ", ".join(tokenizer.token(i) for i in ends[len(keys) :])
        notes.append(f"only three end tokens can be told; left out: {rest}")
    return {PREFIX + key: index for key, index in zip(keys, ends, strict=False)}


def _check_letters(vocab: Mapping[str, int], where: str, notes: list[str]) -> None:
    """llama.cpp strips more than accents. A vocabulary with words of the scripts that suffer is refused."""
    word = next((t for t in vocab if len(t.removeprefix("##")) > 1 and loses_letters(t)), None)
    if word is not None:
        raise CheckpointError(
            f'{where}: knows "{word}", but llama.cpp, where it strips accents, takes vowels of Hangul and vowel '
            "signs of Indian scripts too; a cased model has a GGUF file"
        )
    notes.append("Korean and Indian scripts, which this vocabulary has no words of, are spelled otherwise by llama.cpp")


def _cutting(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer's normalizer and pre-tokenizer, with no tokens to go with them."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    bare_document = {**document, "added_tokens": [], "post_processor": None, "decoder": None, "model": model}
    return tokenizers.Tokenizer.from_str(json.dumps(bare_document))


def _check_normalizer(normalizer: Any, texts: list[str], where: str, notes: list[str]) -> None:
    """Refuses one that changes composed text: llama.cpp changes no text before byte-level tokens."""
    if normalizer is None:
        return
    name = type(normalizer).__name__
    changed = next((text for text in texts if normalizer.normalize_str(text) != text), None)
    if changed is not None:
        raise CheckpointError(
            f"{where}: its normalizer ({name}) changes {changed!r:.40}; llama.cpp has none for byte-level tokens"
        )
    notes.append(
        f"its normalizer ({name}) is none of llama.cpp's: text in Unicode's composed form gives the same ids, other "
        "text may not"
    )
