"""tokenizer.json from anybody: tried in a process with limits where a step is not known to be harmless, and bounded."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lapis.errors import LapisError
from lapis.text.rows.packing import pack
from lapis.text.tokenizer import trial
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.text.tokenizer.trial import is_plain


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    train_tokenizer(["Saya suka makan nasi lemak. user assistant"] * 5, 300).save(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_verdicts", {})
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder: Path, **parts: Any) -> None:
    """Puts parts into tokenizer.json; model__x changes a field of the model."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    for name, value in parts.items():
        if name.startswith("model__"):
            document["model"][name.removeprefix("model__")] = value
        else:
            document[name] = value
    path.write_text(json.dumps(document))


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def table(*texts: bytes) -> dict[str, Any]:
    raw = (8).to_bytes(4, "little") + bytes(8) + b"\0".join(texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


DEEP: Any = {"type": "NFC"}
for _ in range(100):
    DEEP = sequence(DEEP)

# what the library of regular expressions may see through: then it is no harm
PERHAPS = {"backtracking", "backtracking by words", "backtracking in a normalizer"}
HOSTILE: dict[str, dict[str, Any]] = {
    "a character becomes gigabytes": {"normalizer": sequence(*[replace({"String": "a"}, "a" * 100)] * 5)},
    "and so by a regular expression": {"normalizer": sequence(*[replace({"Regex": "."}, "a" * 100)] * 5)},
    "and so between characters": {"normalizer": sequence(*[replace({"String": ""}, "a" * 30)] * 6)},
    "one long word in its place": {"normalizer": replace({"String": "a"}, "a" * 10**6)},
    "backtracking": {"pre_tokenizer": split(r"(a+)+$")},
    "backtracking by words": {"pre_tokenizer": split(r"(?:\w+\s?)+!")},
    "backtracking in a normalizer": {"normalizer": replace({"Regex": r"(.*)*x"}, "")},
    "a regular expression that is none": {"pre_tokenizer": split("(")},
    "a broken table": {"normalizer": table(b"x")},
    "a table that ends early": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a table of 4 GB": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "steps without an end": {"normalizer": sequence(*[{"type": "NFC"}] * 1000)},
    "steps in steps": {"normalizer": DEEP},
    "a step that is not known": {"normalizer": {"type": "Python"}},
    "a pre-tokenizer that is not known": {"pre_tokenizer": {"type": "Exec"}},
    "a text a million times": {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                               "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10_000}},
    "a word put before": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "a model that is none": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "an id beyond all": {"model__vocab": {"a": 10**30}},
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_tokenizer_that_means_harm_is_one_line(folder: Path, kind: str) -> None:
    change(folder, **HOSTILE[kind])
    # VmHWM, since a new process's ru_maxrss begins with its parent's
    script = (
        "import resource, sys\nfrom lapis.errors import LapisError\n"
        "from lapis.text.tokenizer.tokenizer import Tokenizer\n"
        "try:\n    words = Tokenizer.open(sys.argv[1])\n    words.encode('banana ' * 100, add_special_tokens=True)\n"
        "except LapisError as error:\n    print(error)\n"
        "own = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(int(own[0].split()[1]) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) in (2, 1 if kind in PERHAPS else 2), done.stdout + done.stderr
    assert len(lines) == 1 or (lines[0].startswith(str(folder)) and len(lines[0]) < 500)
    assert done.stderr.count("\n") <= 1, done.stderr
    assert max(map(int, lines[-1].split())) < 1000  # megabytes


@pytest.mark.parametrize("tried_first", [True, False])
def test_a_panic_is_one_line(
    folder: Path, tried_first: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A prefix longer than the tokens that it is cut from; the library tells of it on standard error, by itself."""
    if not tried_first:  # as if it were of a kind that nobody has met yet
        monkeypatch.setattr(trial, "is_plain", lambda raw: True)
    change(folder, model__continuing_subword_prefix="x" * 50)
    with pytest.raises(LapisError, match="out of range") as refused:
        Tokenizer.open(folder)
    assert "\n" not in str(refused.value) and capfd.readouterr().err == ""


def test_ids_of_a_billion_take_no_memory(folder: Path) -> None:
    """`pack` took 3.9 GB for them."""
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    change(folder, model__vocab={**vocab, "zzz": 10**9})
    (folder / "corpus.txt").write_text("nasi lemak")
    with pytest.raises(LapisError, match="id 1,000,000,000; ids go to"):
        pack([str(folder / "corpus.txt")], Tokenizer.open(folder))


def test_dropout_is_off_aloud(folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """With it two packs of one corpus differ."""
    text = "Saya suka makan nasi lemak. " * 50
    expected = Tokenizer.open(folder).encode(text)
    change(folder, model__dropout=0.5)
    with caplog.at_level("WARNING", "lapis"):
        words = Tokenizer.open(folder)
    assert "BPE dropout of 0.5" in caplog.text and "it is off" in caplog.text
    assert all(words.encode(text) == expected for _ in range(3))
    (tmp_path / "saved").mkdir()
    words.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["model"]["dropout"] is None
    assert Tokenizer.open(tmp_path / "saved").digest() == words.digest()


def test_good_ones_need_no_trial_or_one(folder: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What published tokenizers are made of is opened at once; a harmless pattern that is not known is tried once."""
    assert is_plain((good / "tokenizer.json").read_bytes())
    runs: list[bytes] = []
    run = trial._run
    monkeypatch.setattr(trial, "_run", lambda raw: runs.append(raw) or run(raw))
    expected = Tokenizer.open(folder).encode("nasi lemak")
    assert not runs
    change(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": [
        split(r"\s*\p{L}+|\s*\p{N}{1,2}|\s+"),
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]})  # fmt: skip
    assert Tokenizer.open(folder).encode("nasi lemak") == expected and len(runs) == 1
    monkeypatch.setattr(trial, "_verdicts", {})  # another process finds the verdict in the cache
    assert Tokenizer.open(folder).encode("nasi lemak") == expected and len(runs) == 1
