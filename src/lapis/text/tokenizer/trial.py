"""tokenizer.json from anybody in, a tokenizer that can be used out, or one line that says why not.

Most files consist of steps that are known to be harmless, and are opened at once. All others are tried in a process
with limits first (trial_process.py); the verdict is remembered by the file's digest. What a step may do to a text is
checked on what was opened: the text that a model reads is in proportion to the text that was given.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tokenizers

from lapis.checkpoint.files import JSON_LIMIT
from lapis.errors import CheckpointError
from lapis.parsing import ParseError, parse_json
from lapis.processes import process_environment, python
from lapis.text.corpus.file_stream import cache_folder
from lapis.text.tokenizer.folder import TRAINED_PATTERN

MOST_IDS = 1 << 23  # of a vocabulary; the largest known have a million tokens
MOST_STEPS = 64
MOST_GROWTH = 512  # bytes that the steps of a normalizer may make of one
WALL_SECONDS = 120.0
NORMALIZERS = frozenset(
    {"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "BertNormalizer",
     "ByteLevel", "Prepend", "Replace", "Precompiled"}
)  # fmt: skip
PRE_TOKENIZERS = frozenset(
    {"Sequence", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Split", "Punctuation", "Digits",
     "BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit", "FixedLength", "Delimiter"}
)  # fmt: skip
# all of these but Precompiled, whose table can be broken, and what stands around them
_PLAIN = NORMALIZERS - {"Precompiled"} | PRE_TOKENIZERS | {
    "BPE", "WordPiece", "WordLevel", "Unigram", "TemplateProcessing", "BertProcessing", "RobertaProcessing",
    "ByteFallback", "Fuse", "BPEDecoder", "CTC",
}  # fmt: skip
_TYPE = re.compile(rb'"type"\s*:\s*"((?:[^"\\]|\\.)*)"')
_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"((?:[^"\\]|\\.)*)"')
_REGEX = re.compile(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = frozenset({
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _LETTERS + r"\p{N}{1,3}" + _REST,  # Llama 3
    _LETTERS + r"\p{N}" + _REST,  # Qwen 2
    TRAINED_PATTERN,
    r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+",  # earlier ones of lapis
})  # fmt: skip

log = logging.getLogger("lapis")
_verdicts: dict[str, str] = {}


def open_stored(path: Path) -> tuple[tokenizers.Tokenizer, bool]:
    """Opens a tokenizer.json.

    Args:
        path: The file.

    Returns:
        The tokenizer, and whether it is just what the file holds.

    Raises:
        CheckpointError: For what is no tokenizer, or one that cannot be used without harm.
    """
    with path.open("rb") as file:
        raw = file.read(JSON_LIMIT + 1)
    if len(raw) > JSON_LIMIT:
        raise CheckpointError(f"{path}: more than {JSON_LIMIT:,} bytes of JSON, which is the limit")
    if not is_plain(raw) and (wrong := try_out(raw)):
        raise CheckpointError(f"{path}: the tokenizer was stopped when it was tried: {wrong}")
    try:
        with _panics_untold():
            backend = tokenizers.Tokenizer.from_buffer(raw)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a tokenizer: {why}; fetch the file again") from None
    _check_steps(backend, path)
    dropout = getattr(backend.model, "dropout", None)
    if dropout:
        log.warning("%s: BPE dropout of %g would give a text other ids each time; it is off", path, dropout)
        backend.model.dropout = None
    return backend, not dropout


@contextmanager
def _panics_untold() -> Iterator[None]:
    """The library writes a panic to standard error itself, in many lines; the caller tells it in one.

    What else is written meanwhile is passed on.
    """
    try:
        own_stderr = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    panicked = False
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            raise
        finally:
            os.dup2(own_stderr, 2)
            os.close(own_stderr)
            if not panicked:
                written.seek(0)
                os.write(2, written.read())


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of the library, which is no Exception and belongs to none of its classes."""
    return type(error).__name__ == "PanicException"


def is_plain(raw: bytes) -> bool:
    """Whether a file names only steps that need no trial; a word that looks like another costs one."""
    if b"\\u00" in raw and re.search(rb"\\u00[2-7]", raw):  # letters that are spelled so that they are not seen
        return False
    if b'"merges"' in raw and set(_PREFIX.findall(raw)) - {b""}:  # cut off tokens that may be shorter
        return False
    patterns = set(_REGEX.findall(raw))
    try:
        known = all(json.loads(pattern) in KNOWN for pattern in patterns)
    except ValueError:
        return False
    return known and b'"String":""' not in raw.replace(b" ", b"") and {
        name.decode("utf-8", "replace") for name in _TYPE.findall(raw)
    } <= _PLAIN  # fmt: skip


def try_out(raw: bytes) -> str:
    """Why a file is no good, by a process that can be ended; "" where it is good, which the cache remembers."""
    key = hashlib.sha256(raw).hexdigest()
    good = cache_folder() / "tokenizers" / f"{key}-{tokenizers.__version__}"
    if key not in _verdicts and not good.is_file():
        _verdicts[key] = _run(raw)
        if not _verdicts[key]:
            with suppress(OSError):
                good.parent.mkdir(parents=True, exist_ok=True)
                good.touch()
    return _verdicts.get(key, "")


def _run(raw: bytes) -> str:
    command = python(str(Path(__file__).with_name("trial_process.py")))
    variables = {**process_environment(whole=False), "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(command, input=raw, capture_output=True, env=variables, timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it took more than {WALL_SECONDS:.0f} s"
    try:
        verdict = parse_json(done.stdout)
        return str(verdict.get("wrong", ""))
    except (ParseError, AttributeError):
        return "its process ended: it takes too much memory or time"


def _check_steps(backend: tokenizers.Tokenizer, path: Path) -> None:
    """What the steps of an opened tokenizer may do, from their own description, which has no vocabulary in it."""
    for part, known, what in (
        (backend.normalizer, NORMALIZERS, "normalizer"), (backend.pre_tokenizer, PRE_TOKENIZERS, "pre-tokenizer"),
    ):  # fmt: skip
        steps = list(_steps(state_of(part))) if part is not None else []
        unknown = [str(step.get("type")) for step in steps if step.get("type") not in known]
        if unknown:
            raise CheckpointError(f"{path}: the {what} {unknown[0]:.40} is not known here; lapis reads {_few(known)}")
        if len(steps) > MOST_STEPS:
            raise CheckpointError(f"{path}: a {what} of {len(steps):,} steps; the limit is {MOST_STEPS}")
        growth = 1.0
        for step in steps:
            growth *= _growth(step)
        if growth > MOST_GROWTH:
            raise CheckpointError(f"{path}: its {what} may make a text {growth:,.0f} times as long; it is not used")
    around = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else {}
    for step in _steps(around):
        pieces = [piece for name in ("single", "pair") for piece in step.get(name) or []]
        ids = [index for token in (step.get("special_tokens") or {}).values() for index in token.get("ids", [])]
        if len(pieces) > MOST_STEPS or len(ids) > MOST_STEPS * 4:
            raise CheckpointError(f"{path}: it puts {max(len(pieces), len(ids)):,} pieces around a text")


def _growth(step: Mapping[str, Any]) -> float:
    """Bytes that a step of a normalizer may make of one."""
    kind = step.get("type")
    if kind == "Replace":
        pattern, content = step.get("pattern") or {}, len(str(step.get("content", "")).encode())
        matched = len(str(pattern.get("String", "")).encode()) if "String" in pattern else 0
        return max(1.0, content / matched if matched else 1.0 + content)
    if kind == "Prepend":
        return 1.0 if len(str(step.get("prepend", ""))) <= 64 else float("inf")
    if kind == "Precompiled":
        return _longest_entry(str(step.get("precompiled_charsmap") or ""))
    return {"NFKC": 11.0, "NFKD": 11.0, "NFD": 3.0, "BertNormalizer": 3.0, "ByteLevel": 2.0}.get(str(kind), 1.5 if
        kind == "Lowercase" else 1.0)  # fmt: skip


def _longest_entry(table: str) -> float:
    """The longest text that a table of SentencePiece puts in the place of a character: a trie, then such texts."""
    try:
        raw = base64.b64decode(table, validate=True)
    except (binascii.Error, ValueError):
        return float("inf")
    size = int.from_bytes(raw[:4], "little")
    return float(max(map(len, raw[4 + size :].split(b"\0")), default=1)) if raw else 1.0


def _steps(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a part, those of a sequence one after the other."""
    waiting = [state]
    while waiting:
        step = waiting.pop(0)
        inner = step.get("normalizers") or step.get("pretokenizers") or step.get("processors") or []
        if inner:
            waiting = [*inner, *waiting]
        else:
            yield step


def state_of(part: Any) -> dict[str, Any]:
    """A step of a tokenizer as it stands in tokenizer.json."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _few(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
