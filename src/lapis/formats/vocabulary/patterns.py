"""How text is cut before tokens are merged: the names that a GGUF file may give, and which of them a tokenizer does.

llama.cpp knows a splitting by its name alone (`tokenizer.ggml.pre`), so a tokenizer is compared with each by what it
does to a probe of text, never by how its pattern is written. What a name does is what llama.cpp does by it. Leaves out
names whose splitting another name here has (ALIASES), but for reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from lapis.errors import CheckpointError

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_NOT_SMALL, _NOT_CAPITAL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_FALCON = r"[\p{P}\$\+<=>\^~\|`]+"


def _llama(digits: str) -> str:
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"


def _cased(endings: str, digits: str) -> str:
    """Words that begin anew at a capital after a small letter, for which llama.cpp looks at a to z and A to Z alone.

    So the tokenizers that these names come from (o200k, Tekken) are cut otherwise by it where they have marks.
    """
    lead, letters = r"[^\r\n\p{L}\p{N}]?", (f"{_NOT_SMALL}*{_NOT_CAPITAL}+", f"{_NOT_SMALL}+{_NOT_CAPITAL}*")
    word = "|".join(f"{lead}{part}{endings}" for part in letters)
    return rf"{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"


@dataclass(frozen=True)
class Splitting:
    """One way to cut text. steps: patterns, each applied to the pieces of the one before. whole_words: a piece that is
    a token is taken as it is, whatever its merges are."""

    steps: tuple[str, ...]
    whole_words: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Cuts, and spells bytes in GPT-2's alphabet."""
        cuts = [pre_tokenizers.Split(Regex(step), "isolated") for step in self.steps]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITTINGS = {
    "gpt-2": Splitting((_GPT2,)),
    "qwen2": Splitting((_llama(r"\p{N}"),)),
    "llama-bpe": Splitting((_llama(r"\p{N}{1,3}"),), whole_words=True),
    "smollm": Splitting((r"\p{N}", _GPT2)),
    "smaug-bpe": Splitting((_llama(r"\p{N}{1,3}"),)),
    "qwen35": Splitting(
        (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",)
    ),
    "gpt-4o": Splitting((_cased(f"{_ENDINGS}?", r"\p{N}{1,3}"),)),
    "tekken": Splitting((_cased("", r"\p{N}"),), whole_words=True),
    "falcon": Splitting((_FALCON, _GPT2, r"[0-9][0-9][0-9]")),
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}

# other names for the same, as llama.cpp reads them
ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "gpt-2": ("phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
              "modern-bert", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
    "smaug-bpe": ("dbrx", "chatglm-bpe", "glm4"),
    "gpt-4o": ("llama4", "kanana2"),
}  # fmt: skip


def splitting_named(name: str) -> Splitting:
    """The splitting that a file's `tokenizer.ggml.pre` names. Raises CheckpointError where it is not known."""
    for own, others in ALIASES.items():
        if name in others:
            name = own
    if name not in SPLITTINGS:
        raise CheckpointError(f"tokenizer.ggml.pre is {name!r:.40}; lapis knows {', '.join(SPLITTINGS)} and their like")
    return SPLITTINGS[name]


def names_of(pre_tokenizer: Any, whole_words: bool, texts: Sequence[str]) -> list[str]:
    """The names whose splitting cuts every text as `pre_tokenizer` does; those that treat whole words alike first.

    Args:
        pre_tokenizer: Of the tokenizers library, or None for one that does not cut.
        whole_words: Whether the tokenizer takes a piece that is a token as it is.
        texts: The probe, normalized as the tokenizer does.
    """
    if pre_tokenizer is None:
        return []
    pieces = [[piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] for text in texts]

    def cuts_alike(splitting: Splitting) -> bool:
        own = splitting.pre_tokenizer()
        return all(
            [piece for piece, _ in own.pre_tokenize_str(text)] == expected
            for text, expected in zip(texts, pieces, strict=True)
        )

    names = [name for name, splitting in SPLITTINGS.items() if cuts_alike(splitting)]
    return sorted(names, key=lambda name: SPLITTINGS[name].whole_words != whole_words)
