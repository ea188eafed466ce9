"""A tokenizer that knows more of a language: merges are learned on text as it leaves it, and appended.

    base = ExtendableTokenizer.open(folder)
    counts = base.count_words(texts)                 the text as the old tokenizer cuts it
    gained = base.learn(counts, 10_000)              new tokens and their merges, which rank after all old ones
    base.write(staging, gained)                      the folder's tokenizer files, extended

This is continued BPE (Purason et al., arXiv:2512.03989; their pruning of old tokens is not done here). Old tokens keep
their ids; new ones come after them and after added tokens. How text is split into pieces stays as it is, so no merge
reaches over the border of two pieces. Byte-level BPE, and BPE over characters that falls back to bytes
(SentencePiece's), can be extended: they spell any text and have an order of merges to append to. Only words are
learned: what holds an ASCII digit, or nothing but ASCII punctuation and white space, stays as it was cut.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lapis.checkpoint.files import contained
from lapis.errors import CheckpointError
from lapis.text.tokenizer.backend import open_backend
from lapis.text.tokenizer.folder import BYTE_OF, CONFIG, TOKENIZER_FILES, has_file, template_files, write_json
from lapis.text.tokenizer.merges import Pair, learn_merges, saved_by
from lapis.text.tokenizer.words import SPACE, WordCounts, WordCutter, batches, is_mark, marked_letters

LEAST = 5  # times that a token must occur in the text to be learned
LONGEST = 48  # of a new token, in characters of its spelling: sixteen syllables of three bytes
_DIGIT, _LETTER = re.compile(r"[0-9]"), re.compile(r"[^\x00-\x40\x5b-\x60\x7b-\x7f]")
_REASONS = {
    "WordPiece": "it takes the longest entry that fits, so there is no order of merges to append to, and a new entry "
    "would change how old words are cut",
    "Unigram": "its tokens have probabilities that were estimated together, so a new one would change how old words "
    "are cut",
    "WordLevel": "it knows whole words only",
}


@dataclass(frozen=True)
class Extension:
    """What a tokenizer gains.

    Attributes:
        tokens: New tokens as the vocabulary spells them, in the order of their ids.
        first: The id of the first.
        merges: Merges to append, as pairs of tokens.
        counts: How often each new token occurred when it was learned.
        enough: Whether the text carried as many as were asked for.
        old_tokens: Of each new token the ids that the old tokenizer has for it.
        characters: How many of the new tokens, from the first on, are characters that the vocabulary lacked.
    """

    tokens: list[str]
    first: int
    merges: list[tuple[str, str]]
    counts: list[int]
    enough: bool
    old_tokens: list[tuple[int, ...]]
    characters: int = 0

    def cut(self, count: int) -> "Extension":
        """The first `count` of the new tokens, with the merges that they need."""
        lacking = set(self.tokens[count:])
        end = next(
            (i for i, (left, right) in enumerate(self.merges) if not lacking.isdisjoint((left, right, left + right))),
            len(self.merges),
        )
        return replace(
            self, tokens=self.tokens[:count], merges=self.merges[:end], counts=self.counts[:count],
            old_tokens=self.old_tokens[:count], characters=min(count, self.characters),
        )  # fmt: skip


class ExtendableTokenizer:
    """A BPE tokenizer that merges can be appended to.

    source: The folder. backend: What encodes. byte_level: Whether its characters are bytes. size: The first free id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: Path) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text is plain text
        self.backend, self.source = backend, source
        self.document: dict[str, Any] = json.loads(backend.to_str())
        model = self.document["model"]
        self.byte_level = _refuse_other_kinds(self.document, source)
        self.added = {entry["content"]: entry["id"] for entry in self.document["added_tokens"]}
        self.ids: dict[str, int] = {**model["vocab"], **self.added}
        self.size = max(self.ids.values()) + 1

    @classmethod
    def open(cls, folder: Path) -> "ExtendableTokenizer":
        """Opens the tokenizer of a folder.

        Args:
            folder: With a tokenizer.json.

        Raises:
            CheckpointError: For a tokenizer of a kind that cannot be extended, with the reason, or files that are
                damaged.
        """
        return cls(open_backend(folder)[0], folder)

    @cached_property
    def spelling(self) -> dict[int, str]:
        """Id -> token, without added tokens."""
        return {i: token for token, i in self.document["model"]["vocab"].items() if token not in self.added}

    @cached_property
    def ranks(self) -> dict[Pair, tuple[int, int]]:
        """Pair of ids -> rank and result of its merge."""
        ids = self.document["model"]["vocab"]
        return {(ids[left], ids[right]): (rank, ids[left + right]) for rank, (left, right) in enumerate(self._pairs())}

    def count_words(self, texts: Iterable[str], progress: Callable[[int], None] | None = None) -> WordCounts:
        """Reads a text. progress: called with the bytes read so far."""
        counts, cutter = WordCounts(), WordCutter(self.ids, self.added, self.byte_level)
        marked: Counter[str] = Counter()
        for batch in batches(texts):
            counts.documents += len(batch)
            counts.bytes += sum(len(text.encode()) for text in batch)
            for text in batch:
                marked.update(marked_letters(text))
            for encoding in self.backend.encode_batch(batch, add_special_tokens=False):
                counts.words.update(cutter.words(encoding))
                counts.tokens += len(encoding)
            if progress:
                progress(counts.bytes)
        counts.characters, counts.marks = cutter.characters, marked.total()
        counts.cut_marks = sum(times for pair, times in marked.items() if len(self._split(pair)) > 1)
        return counts

    def learn(
        self,
        counts: WordCounts,
        add: int,
        *,
        least: int = LEAST,
        replay: WordCounts | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Extension:
        """Learns new tokens.

        Args:
            counts: The text, as `count_words` gives it.
            add: How many new tokens.
            least: Times that a token must occur.
            replay: Text whose ids must stay as they are: no pair that stands in it is merged, and none of its words is
                learned from.
            progress: Called with new tokens so far, and `add`.

        Returns:
            The extension; `enough` is False where the text carries fewer.
        """
        words = {word: n for word, n in counts.words.items() if self._is_word(word)}
        banned: set[Pair] = set()
        spared: set[str] = set()
        if replay is not None:
            spared = set(replay.characters)
            words = {word: n for word, n in words.items() if word not in replay.words}
            banned = {pair for word in replay.words for pair in pairwise(word)}
        chosen = [(c, n) for c, n in counts.characters.most_common() if n >= least and c not in spared][:add]
        words = self._with_characters(words, counts, [c for c, _ in chosen])
        spelling = self.spelling | {self.size + i: c for i, (c, _) in enumerate(chosen)}
        fit = _any if self.byte_level else _keeps_marks
        learned = learn_merges(
            words, spelling, self.ranks, self.size + len(chosen), add - len(chosen),
            least=least, longest=LONGEST, banned=banned, fit=fit, progress=progress,
        )  # fmt: skip
        names = dict(spelling)
        old: dict[int, tuple[int, ...]] = {
            self.size + i: tuple(self.ids[f"<0x{b:02X}>"] for b in c.encode()) for i, (c, _) in enumerate(chosen)
        }
        for left, right, merged in learned.merges:
            if merged not in names:
                names[merged] = names[left] + names[right]
                old[merged] = old.get(left, (left,)) + old.get(right, (right,))
        order = [*range(self.size, self.size + len(chosen)), *learned.counts]
        return Extension(
            tokens=[names[i] for i in order],
            first=self.size,
            merges=[(names[left], names[right]) for left, right, _ in learned.merges],
            counts=[n for _, n in chosen] + list(learned.counts.values()),
            enough=learned.enough,
            old_tokens=[old[i] for i in order],
            characters=len(chosen),
        )

    def read_extension(self, folder: Path) -> Extension:
        """What another tokenizer has more than this one, which it extends.

        Args:
            folder: A folder that `write` wrote.

        Raises:
            CheckpointError: Where it is no extension of this tokenizer.
        """
        other = ExtendableTokenizer.open(folder)
        tokens = [token for token, i in sorted(other.ids.items(), key=lambda entry: entry[1]) if i >= self.size]
        mine, theirs = self._pairs(), other._pairs()
        same = all(other.ids.get(token) == i for token, i in self.ids.items())
        if not same or theirs[: len(mine)] != mine or other.size != self.size + len(tokens):
            raise CheckpointError(f"{folder}: its tokenizer is no extension of that of {self.source}; extend it again")
        merges = theirs[len(mine) :]
        made = {left + right for left, right in merges}
        old: dict[str, tuple[int, ...]] = {}
        for token in tokens:
            if token not in made:
                old[token] = tuple(self.ids[f"<0x{b:02X}>"] for b in token.encode())
        for left, right in merges:
            if left + right not in self.ids and left + right not in old:
                old[left + right] = old.get(left, (self.ids.get(left, 0),)) + old.get(right, (self.ids.get(right, 0),))
        return Extension(
            tokens, self.size, merges, [], True, [old[token] for token in tokens],
            sum(token not in made for token in tokens),
        )  # fmt: skip

    def _pairs(self) -> list[tuple[str, str]]:
        entries = self.document["model"]["merges"]
        return [tuple(entry.split(" ") if isinstance(entry, str) else entry) for entry in entries]

    def tokens_saved(self, counts: WordCounts, extension: Extension) -> list[int]:
        """How many tokens fewer another text has with the first 0, 1, 2, ... of the new tokens.

        Args:
            counts: The text, as `count_words` gives it.
            extension: The new tokens.
        """
        characters = extension.tokens[: extension.characters]
        saved = [0]
        for character in characters:
            saved.append(saved[-1] + counts.characters[character] * (len(character.encode()) - 1))
        words = self._with_characters(dict(counts.words), counts, characters)
        spelling = self.spelling | {self.size + i: c for i, c in enumerate(characters)}
        ids = {token: i for i, token in spelling.items()}
        ids |= {token: extension.first + i for i, token in enumerate(extension.tokens)}
        pairs = ((ids[left], ids[right]) for left, right in extension.merges)
        further = saved_by(words, spelling, self.ranks, self.size + len(characters), pairs)
        return saved + [saved[-1] + n for n in further]

    def _with_characters(
        self, words: dict[tuple[int, ...], int], counts: WordCounts, characters: Sequence[str]
    ) -> dict[tuple[int, ...], int]:
        """Words with the given characters under their new ids, cut where another one that is unknown stands."""
        if not counts.characters:
            return words
        new = {character: self.size + i for i, character in enumerate(characters)}
        place = {self.size + i: new.get(character, -1) for i, character in enumerate(counts.characters)}
        result: Counter[tuple[int, ...]] = Counter()
        for word, times in words.items():
            run: list[int] = []
            for token in word:
                number = place.get(token, token)
                if number < 0:
                    result[tuple(run)] += times
                    run = []
                else:
                    run.append(number)
            result[tuple(run)] += times
        return {word: times for word, times in result.items() if len(word) > 1}

    def extended_document(self, extension: Extension) -> dict[str, Any]:
        """What tokenizer.json holds then. Added tokens get a place in the vocabulary, so that they keep their ids."""
        document = dict(self.document)
        model = document["model"] = dict(document["model"])
        new = {token: extension.first + i for i, token in enumerate(extension.tokens)}
        model["vocab"] = dict(sorted({**self.ids, **new}.items(), key=lambda entry: entry[1]))
        fresh = [list(pair) for pair in extension.merges]
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] = model["merges"] + ([" ".join(pair) for pair in fresh] if as_text else fresh)
        return document

    def extended(self, extension: Extension) -> tokenizers.Tokenizer:
        """The extended tokenizer, to encode with."""
        backend = tokenizers.Tokenizer.from_str(json.dumps(self.extended_document(extension)))
        backend.encode_special_tokens = True
        return backend

    def write(self, folder: Path, extension: Extension) -> list[str]:
        """Writes the tokenizer's files, extended, into a folder, over those of the old tokenizer that lie there.

        Args:
            folder: Where they go.
            extension: The new merges and tokens.

        Returns:
            Lines that say what else was done.
        """
        document = self.extended_document(extension)
        write_json(folder / "tokenizer.json", document)
        if (folder / "vocab.json").exists():
            write_json(folder / "vocab.json", document["model"]["vocab"])
        if (folder / "merges.txt").exists():
            pairs = (entry if isinstance(entry, str) else " ".join(entry) for entry in document["model"]["merges"])
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
        if (folder / "tokenizer.model").exists():
            (folder / "tokenizer.model").unlink()
            return ["tokenizer.model was left out: it cannot hold merges that are appended; tokenizer.json has all"]
        return []

    def copy_files(self, folder: Path) -> None:
        """Copies the tokenizer's files as they are."""
        names = [name for name in TOKENIZER_FILES if has_file(self.source, name)] + template_files(self.source)
        for name in dict.fromkeys(names):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(contained(self.source, name), folder / name)
        if not (folder / CONFIG).exists():
            write_json(folder / CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})

    def text(self, token: str) -> str:
        """A token's spelling as it reads."""
        if self.byte_level:
            return bytes(BYTE_OF.get(c, 0x3F) for c in token).decode(errors="replace")
        return token.replace(SPACE, " ")

    def _split(self, text: str) -> list[Any]:
        splitter = self.backend.pre_tokenizer
        return [text] if splitter is None else splitter.pre_tokenize_str(text)

    def _is_word(self, word: tuple[int, ...]) -> bool:
        """Whether merges may be learned from it: it holds no ASCII digit, and something beyond ASCII punctuation."""
        text = self.text("".join(self.spelling.get(i, "") for i in word))
        if _DIGIT.search(text):
            return False
        return bool(_LETTER.search(text)) or any(i >= self.size for i in word)


def changed_share(
    old: tokenizers.Tokenizer, new: tokenizers.Tokenizer, texts: Iterable[str], special: bool = False
) -> float:
    """The share of a text's characters whose tokens are others with the new tokenizer than with the old one.

    Args:
        old: The tokenizer.
        new: It with more tokens.
        texts: The text.
        special: What spells a special token in it is that token; else it is plain text, as it is for both afterwards.
    """
    old.encode_special_tokens = new.encode_special_tokens = not special
    changed = total = 0
    for batch in batches(texts):
        pairs = zip(
            old.encode_batch(batch, add_special_tokens=False), new.encode_batch(batch, add_special_tokens=False),
            strict=True,
        )  # fmt: skip
        for text, (before, after) in zip(batch, pairs, strict=True):
            total += len(text)
            if before.ids == after.ids:
                continue
            same = set(zip(before.ids, before.offsets, strict=True))
            touched = np.zeros(len(text), bool)
            for token, (first, last) in zip(after.ids, after.offsets, strict=True):
                if (token, (first, last)) not in same:
                    touched[first:last] = True
            changed += int(touched.sum())
    old.encode_special_tokens = new.encode_special_tokens = True
    return changed / max(total, 1)


def _any(left: str, right: str) -> bool:
    return True  # of bytes; the tokenizer's splitting says which marks may stay with which letters


def _keeps_marks(left: str, right: str) -> bool:
    """Whether the two together do not begin with a mark that belongs to a letter before them."""
    return not is_mark(left[0]) or all(map(is_mark, left + right))


def _refuse_other_kinds(document: dict[str, Any], source: Path) -> bool:
    """Whether the tokenizer is byte-level. Raises CheckpointError where it cannot be extended."""
    model = document["model"]
    kind = str(model.get("type"))
    if kind != "BPE":
        reason = _REASONS.get(kind, "only BPE has merges that others can be appended to")
        raise CheckpointError(
            f"{source}: its tokenizer is {kind}, which cannot be extended: {reason}. Take a model with a BPE tokenizer"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise CheckpointError(
                f"{source}: its tokenizer has a {name} ({model[name]!r}), which decides what can stand where in a "
                "word; merges cannot be appended to it"
            )
    byte_level = '"ByteLevel"' in json.dumps([document.get("decoder"), document.get("pre_tokenizer")])
    if not byte_level and not model.get("byte_fallback"):
        raise CheckpointError(
            f"{source}: its tokenizer neither works on bytes nor falls back to them, so it cannot spell every text; "
            "take a model whose tokenizer does"
        )
    return byte_level
