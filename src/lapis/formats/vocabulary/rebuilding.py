"""A tokenizer folder's tokenizer from what a GGUF file says of it.

That both give the same ids is for the proof to say. What the file does not hold (normalizers that llama.cpp lacks, how
added tokens treat spaces) is not guessed.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lapis.errors import CheckpointError, TemplateError
from lapis.formats.vocabulary.patterns import splitting_named
from lapis.formats.vocabulary.probe import probe
from lapis.formats.vocabulary.reading import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, FileVocabulary
from lapis.formats.vocabulary.unigram import SPACE, CharacterMap
from lapis.text.chat.template import check_syntax
from lapis.text.tokenizer.tokenizer import Tokenizer

# roles in a file -> names in tokenizer_config.json
ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
         "seperator": "sep_token", "cls": "cls_token", "mask": "mask_token"}  # fmt: skip
TEMPLATE = "tokenizer.chat_template"


def rebuild_tokenizer(
    vocabulary: FileVocabulary, fields: Mapping[str, Any], source: str, notes: list[str]
) -> Tokenizer:  # fmt: skip
    """The tokenizer, with its special tokens by name and its chat templates.

    Args:
        vocabulary: What the file says.
        fields: Of the file, for the templates.
        source: Named in errors.
        notes: Gains what is left out.

    Raises:
        CheckpointError: For tokens and merges that do not fit.
    """
    make = {"gpt2": _byte_level, "llama": _sentence_piece, "bert": _word_piece, "t5": _unigram}
    backend = make[vocabulary.model](vocabulary)
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        tokens = [vocabulary.tokens[i] for i, own in enumerate(vocabulary.types) if own == kind]
        add([AddedToken(token, special=kind == CONTROL, normalized=False) for token in tokens])
    backend.post_processor = _around(vocabulary)
    named = {ROLES[role]: vocabulary.tokens[index] for role, index in vocabulary.named.items() if role in ROLES}
    if vocabulary.model == "bert":
        named = {"cls_token": named.get("bos_token", "[CLS]"), "sep_token": named.get("eos_token", "[SEP]"), **named}
    return Tokenizer(backend, named, _templates(fields, source, notes), source=source)


def _own_tokens(vocabulary: FileVocabulary) -> dict[str, int]:
    """Token -> id, without the names that an export gives to rows that no token has."""
    return {
        token: i for i, token in enumerate(vocabulary.tokens)
        if vocabulary.types[i] != UNUSED or token != f"[PAD{i}]"
    }  # fmt: skip


def _byte_level(vocabulary: FileVocabulary) -> tokenizers.Tokenizer:
    splitting = splitting_named(vocabulary.pre)
    model = models.BPE(vocab=_own_tokens(vocabulary), merges=vocabulary.merges, ignore_merges=splitting.whole_words)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(vocabulary: FileVocabulary) -> tokenizers.Tokenizer:
    vocab = _own_tokens(vocabulary)
    unknown = next((token for token, i in vocab.items() if vocabulary.types[i] == UNKNOWN), None)
    by_score = sorted((token for token in vocab if len(token) > 1), key=lambda token: -vocabulary.scores[vocab[token]])
    merges = [
        (token[:cut], token[cut:]) for token in by_score for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]  # fmt: skip
    has_bytes = "<0x00>" in vocab
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    backend = tokenizers.Tokenizer(model)
    lead = vocabulary.flags["add_space_prefix"]
    steps: list[Any] = [normalizers.Prepend(SPACE)] if lead else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tail: list[Any] = [decoders.Strip(" ", 1, 0)] if lead else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return backend


def _word_piece(vocabulary: FileVocabulary) -> tokenizers.Tokenizer:
    def spelled(token: str, index: int) -> str:
        if token.startswith(SPACE) and len(token) > 1:
            return token[1:]
        return token if vocabulary.types[index] == CONTROL or is_bracketed(token) else f"##{token}"

    vocab = {spelled(token, i): i for token, i in _own_tokens(vocabulary).items()}
    unknown = vocabulary.tokens[vocabulary.named.get("unknown", 0)]
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=vocabulary.flags["lowercase"], strip_accents=vocabulary.flags["strip_accents"]
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _unigram(vocabulary: FileVocabulary) -> tokenizers.Tokenizer:
    own = _own_tokens(vocabulary)
    if list(own.values()) != list(range(len(own))):
        raise CheckpointError(
            "tokenizer.ggml.tokens: rows that no token has stand between others; Unigram has none there"
        )
    characters = CharacterMap(vocabulary.characters)
    for text in probe():  # a damaged map is one line here; the library would end the program
        characters.replaced(text)
    try:
        scores = [(token, float(vocabulary.scores[i])) for token, i in own.items()]
        backend = tokenizers.Tokenizer(models.Unigram(scores, vocabulary.named.get("unknown", 2), False))
        if vocabulary.characters:
            backend.normalizer = normalizers.Precompiled(vocabulary.characters)
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"tokenizer.ggml: no Unigram model: {error!s:.160}") from None
    scheme = "always" if vocabulary.flags["add_space_prefix"] else "never"
    cut: list[Any] = [pre_tokenizers.WhitespaceSplit()] if vocabulary.flags["remove_extra_whitespaces"] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)])
    backend.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    return backend


def is_bracketed(token: str) -> bool:
    """Whether a token of BERT's stands as it is in a file, and neither begins nor continues a word ("[unused7]")."""
    return token.startswith("[") and token.endswith("]") and len(token) > 2


def _around(vocabulary: FileVocabulary) -> processors.TemplateProcessing | None:
    """What stands before and after every text."""
    named, flags = vocabulary.named, vocabulary.flags
    last = "seperator" if vocabulary.model == "bert" else "eos"
    missing = [role for role, flag in (("bos", "add_bos_token"), (last, "add_eos_token"))
               if flags[flag] and role not in named]  # fmt: skip
    if missing:
        raise CheckpointError(f"tokenizer.ggml.add_{missing[0]}_token is true, and no {missing[0]}_token_id is given")
    before = [vocabulary.tokens[named["bos"]]] if flags["add_bos_token"] else []
    after = [vocabulary.tokens[named[last]]] if flags["add_eos_token"] else []
    if not before and not after:
        return None
    ids = {token: index for index, token in enumerate(vocabulary.tokens) if token in (*before, *after)}
    return processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=list(ids.items()),
    )  # fmt: skip


def _templates(fields: Mapping[str, Any], source: str, notes: list[str]) -> dict[str, str]:
    templates = {}
    for key, text in fields.items():
        if (key == TEMPLATE or key.startswith(TEMPLATE + ".")) and isinstance(text, str):
            name = key.removeprefix(TEMPLATE).removeprefix(".") or "default"
            try:
                check_syntax(text, source)
                templates[name] = text
            except TemplateError as error:
                notes.append(f"a chat template is left out: {error}")
    return templates
