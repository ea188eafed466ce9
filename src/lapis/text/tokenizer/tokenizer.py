"""A tokenizer: text to ids and back, its special tokens and chat templates, saved as a folder; a new one is trained.

`tokenizer.json` does the work (the `tokenizers` library); `tokenizer_config.json` names the special tokens and holds
the chat template. Text that looks like a special token is plain text, unless the caller says that the text is its own.
The spellings of the files are in folder.py and backend.py, chats in lapis.text.chat.
"""

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from lapis.checkpoint.files import contained, describe_absence
from lapis.checkpoint.hub.models import local_folder
from lapis.errors import CheckpointError, ConfigError, DataError, LapisError
from lapis.text.chat.chat import turn_end
from lapis.text.chat.template import check_syntax
from lapis.text.corpus.corpus import texts
from lapis.text.tokenizer.backend import END_OF_TEXT, open_backend, plain_backend
from lapis.text.tokenizer.folder import (
    BYTE_OF,
    CHATML,
    TOKEN_FLAGS,
    TOKENIZER_FILES,
    TRAINED_PATTERN,
    has_file,
    read_end_ids,
    read_templates,
    template_files,
)
from lapis.text.tokenizer.trial import MOST_IDS, is_panic
from lapis.text.tokenizer.words import batches, marked_letters, refuse_half_characters

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"


class _HasFiles(Protocol):
    """What is needed of an opened checkpoint."""

    front: Path | None

    def beside(self) -> Path: ...


class Tokenizer:
    """Ids for text and text for ids. Thread-safe. Make one with `Tokenizer.open` or `train_tokenizer`.

    named: special token by its name in templates ("bos_token", "eos_token", ...). templates: chat templates by name;
    the usual one is "default". stop_ids: what config.json and generation_config.json call the end.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named: Mapping[str, str],
        templates: Mapping[str, str],
        stop_ids: Sequence[int] = (),
        source: str = "this tokenizer",
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        backend.no_truncation()  # a folder may carry the lengths of its last use
        backend.no_padding()
        self.source = source
        self.named = dict(named)
        self.templates = dict(templates)
        self.stop_ids = tuple(stop_ids)
        self._backend = backend
        self._plain: tokenizers.Tokenizer | None = None
        self._files = files
        self._lock = threading.Lock()
        self.added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: i for i, token in self.added.items() if token.special}

    @classmethod
    def open(cls, folder: "str | Path | _HasFiles") -> "Tokenizer":
        """Opens a tokenizer or model folder, or that of a model of the hub. Every file is opened inside it only.

        Args:
            folder: Its path, or a checkpoint that was opened.

        Raises:
            CheckpointError: For a file that is missing, damaged, or contradicts another; it names file and field.
            TemplateError: For a chat template that does not parse.
        """
        if isinstance(folder, (str, Path)):
            root = Path(folder)
        elif folder.front is not None and has_file(folder.front, "tokenizer.json"):
            root = folder.front  # an adapter's own, with which it was trained
        else:
            root = folder.beside()
        if not os.path.isdir(root):
            cached = local_folder(folder if isinstance(folder, str) else root)
            if cached is None:
                raise CheckpointError(f"{root}: {describe_absence(root)}")
            root = cached
        backend, named, as_stored = open_backend(root)
        templates = read_templates(root)
        for name, text in templates.items():
            check_syntax(text, f"{root} ({name} template)" if len(templates) > 1 else str(root))
        names = [name for name in TOKENIZER_FILES if has_file(root, name)]
        names += [name for name in template_files(root) if name not in names]
        files = {name: contained(root, name).read_bytes() for name in names if not name.endswith(".model")}
        if not as_stored:
            files["tokenizer.json"] = backend.to_str(pretty=True).encode()
        return cls(backend, named, templates, read_end_ids(root), str(root), files)

    def save(self, folder: str | Path) -> None:
        """Writes the files into an existing folder; what was opened and not changed keeps its bytes."""
        for name, raw in (self._files or self._made_files()).items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)

    def encode(self, text: str, special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text.

        Args:
            text: What spells a special token in it is plain text.
            special: It becomes that token instead; only for text of one's own.
            add_special_tokens: Also what the tokenizer puts around a text (a BOS token, BERT's [CLS] and [SEP]).
        """
        return self.encode_batch([text], special, add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], special: bool = False, add_special_tokens: bool = False
    ) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        with self._lock:
            try:
                encodings = self._encoder(special).encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            except (UnicodeEncodeError, TypeError):  # the library has a TypeError for half characters
                refuse_half_characters(texts)
                raise
            except BaseException as error:
                raise self._stopped(error) from None
        return [encoding.ids for encoding in encodings]

    def _encoder(self, special: bool) -> tokenizers.Tokenizer:
        if not special and self._plain is None:
            self._plain = plain_backend(self._backend)
        encoder = self._backend if special or self._plain is None else self._plain
        encoder.encode_special_tokens = not special
        return encoder

    def encode_spans(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the [start, end) of its characters in the text (a byte of a character has all of it)."""
        with self._lock:
            try:
                encoding = self._encoder(special).encode(text, add_special_tokens=False)
            except (UnicodeEncodeError, TypeError):
                refuse_half_characters([text])
                raise
            except BaseException as error:
                raise self._stopped(error) from None
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids. skip_special: leave special tokens out."""
        ids = [int(i) for i in ids]
        if ids and not (0 <= min(ids) and max(ids) < 2**32):
            raise DataError(f"token id {min(ids) if min(ids) < 0 else max(ids)}: there is no such token")
        try:
            return str(self._backend.decode(ids, skip_special_tokens=skip_special))
        except BaseException as error:
            raise self._stopped(error) from None

    def _stopped(self, error: BaseException) -> BaseException:
        """A panic of the library as a refusal; every other error as it is."""
        if not is_panic(error):
            return error
        why = " ".join(str(error).split())[:200]
        return CheckpointError(f"{self.source}: the tokenizer is broken: {why}; use another one")

    @property
    def vocab_size(self) -> int:
        """Number of tokens with the added ones. The highest id may be larger where ids have gaps: see `rows`."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def rows(self) -> int:
        """Embedding rows that the ids need: the highest id plus one."""
        rows = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if rows > MOST_IDS:
            raise CheckpointError(f"{self.source}: has a token of the id {rows - 1:,}; ids go to {MOST_IDS:,} at most")
        return rows

    def check_rows(self, rows: int) -> None:
        """Raises CheckpointError where a token's id has no row in an embedding of `rows` rows. More rows are fine."""
        beyond = sorted((i, token.content) for i, token in self.added.items() if i >= rows)
        if beyond:
            index, token = beyond[0]
            raise CheckpointError(
                f'{self.source}: the token "{token}" has id {index}, but the embedding has {rows:,} rows; '
                "take it out of tokenizer_config.json, or add rows"
            )
        if self.rows > rows:
            raise CheckpointError(f"{self.source}: needs {self.rows:,} embedding rows, but the model has {rows:,}")

    def token(self, id: int) -> str:
        """A token as the vocabulary spells it ("Ġhello")."""
        token = self._backend.id_to_token(id) if 0 <= id < 2**32 else None
        if token is None:
            raise DataError(f"token id {id}: {self.source} has no such token")
        return str(token)

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        token_id = self._backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def text(self, id: int) -> str:
        """One token as a reader can see it: spaces as they are, control characters and half characters escaped."""
        token = self.token(id)
        if id not in self.added:
            token = self.bytes_of(id).decode(errors="backslashreplace") if self._byte_level else token.replace("▁", " ")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)

    def bytes_of(self, id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character; none for an id without a token."""
        token = self._backend.id_to_token(id) or ""
        if id not in self.added and self._byte_level and all(c in BYTE_OF for c in token):
            return bytes(BYTE_OF[c] for c in token)
        if id not in self.added and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return (token if id in self.added else token.replace("▁", " ")).encode()

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self._backend.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()  # its JSON, without the vocabulary

    def _named_id(self, name: str) -> int | None:
        return self.id(self.named[name]) if name in self.named else None

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    @cached_property
    def adds_bos(self) -> bool:
        """True where the tokenizer itself begins every text with its BOS token."""
        return self.bos_id is not None and self.encode("a", add_special_tokens=True)[:1] == [self.bos_id]

    @property
    def document_lead(self) -> int | None:
        """The id behind which a document is trained and scored: BOS where the tokenizer adds it, else the end of the
        document before; None where it names neither."""
        return self.bos_id if self.adds_bos or self.eos_id is None else self.eos_id

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a reply: eos, what generation_config says, and what closes a turn in the template."""
        ids = [self.eos_id, *self.stop_ids]
        if self.templates:
            try:
                ids.append(turn_end(self))
            except LapisError:
                pass  # a template that refuses a plain question and answer closes nothing that can be seen
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def chat_template(self) -> str | None:
        """The template for chats without tools, or None."""
        return self.templates.get("default")

    def document(self) -> dict[str, Any]:
        """What encodes, as the object that tokenizer.json holds."""
        document: dict[str, Any] = json.loads(self._backend.to_str())
        return document

    def digest(self) -> str:
        """sha256 over vocabulary, merges, special tokens and templates: what the ids of a chat depend on."""
        import hashlib

        parts = [self._backend.to_str(), json.dumps([self.named, self.templates], sort_keys=True)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _made_files(self) -> dict[str, bytes]:
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.named,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(i): {"content": t.content, "special": t.special, **{name: getattr(t, name) for name in TOKEN_FLAGS}}
                for i, t in sorted(self.added.items())
            },
        }
        if list(self.templates) == ["default"]:
            config["chat_template"] = self.templates["default"]
        elif self.templates:
            config["chat_template"] = [{"name": name, "template": text} for name, text in self.templates.items()]
        return {
            "tokenizer.json": self._backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
        }


def train_tokenizer(
    files_or_texts: Iterable[str | Path], vocab: int, kind: Literal["chat", "masked"] = "chat"
) -> Tokenizer:
    """A byte-level BPE, split as Qwen 3.5 does it: combining marks stay with their letters, digits stand alone.

    Hindi, Thai, Tamil and vowelled Arabic have such marks. The same text gives the same tokenizer.

    Args:
        files_or_texts: A Path is a file or folder of text or chats, a str is text itself.
        vocab: Entries in all, at least 260 (256 bytes and the special tokens); fewer come out where the text has no
            more pairs.
        kind: "chat" has ChatML's special tokens and template, "masked" BERT's special tokens, [CLS] and [SEP] around
            every text (which a causal model may read as its beginning and end).

    Raises:
        DataError: Where there is no text.
    """
    special = [PAD, CLS, SEP, MASK] if kind == "masked" else [END_OF_TEXT, TURN_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab < (least := len(alphabet) + len(special)):
        raise ConfigError(f"vocab is {vocab}; the least is {least}: 256 bytes, {len(special)} special tokens")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINED_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    seen = [0]
    items = [files_or_texts] if isinstance(files_or_texts, (str, Path)) else files_or_texts
    backend.train_from_iterator(_counted(batches(_texts(items)), seen), trainer)
    if not seen[0]:
        raise DataError("there is no text to train a tokenizer on")
    if not any(any(marked_letters(backend.decode([i]))) for i in range(backend.get_vocab_size())):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "masked":
        around = [(token, special.index(token)) for token in (CLS, SEP)]
        backend.post_processor = processors.TemplateProcessing(
            f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1", around
        )
        named = {"bos_token": CLS, "eos_token": SEP, "pad_token": PAD, "cls_token": CLS, "sep_token": SEP}
        return Tokenizer(backend, {**named, "mask_token": MASK}, {})
    return Tokenizer(backend, {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}, {"default": CHATML})


def _texts(items: Iterable[str | Path]) -> Iterator[str]:
    for item in items:
        if isinstance(item, str):
            yield item
        else:
            yield from texts([item])


def _counted(batches: Iterable[list[str]], seen: list[int]) -> Iterator[list[str]]:
    """The batches; seen[0] counts their characters."""
    for batch in batches:
        seen[0] += sum(map(len, batch))
        yield batch
