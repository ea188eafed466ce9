"""A hub, a mirror, or what stands in between, that means harm: nothing is written outside the cache, nothing wrong is
believed, nothing is waited for without an end, and whatever it answers is one line. Faults 81 to 90 by number."""

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import lapis
from lapis.checkpoint.hub.models import hub_id
from lapis.checkpoint.hub.repository import list_files, safe_name, safe_revision
from lapis.checkpoint.remote import requests
from lapis.checkpoint.remote.requests import retry_after
from lapis.errors import CheckpointError
from lapis.text.corpus.files import hub_files
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

from .hub_server import Asked, Hub, serving

REPO = "aina/words"
SIDE = {"config.json": b'{"model_type": "llama"}', "README.md": b"# a few words\n"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("words")
    train_tokenizer(["in Malaysia they say Kuala Lumpur. " * 40], 290).save(folder)
    return SIDE | {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests, "PAUSE", 0.001)
    with serving(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        hub.put(REPO, files)
        yield hub


def outside(tmp_path: Path) -> list[Path]:
    """All files that are not in the cache."""
    return [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.relative_to(tmp_path).parts]


def refused(source: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.open(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    "revision",
    ["/etc/passwd", "//a", "../../x", "a/../b", "a//b", "a/", "-x", "a b", "a\nb", ".git", "%2e%2e", "x" * 300],
)
def test_a_revision_is_no_path(hub: Hub, tmp_path: Path, revision: str) -> None:
    """An adapter_config.json can name the model and its revision, and the record of revisions is a file."""
    assert hub_id(f"{REPO}@{revision}") is None and not safe_revision(revision)
    place = tmp_path / "victim"
    place.write_text("mine")
    adapter = tmp_path / "here" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": f"{REPO}@{place}"})
    )
    assert hub_id(f"{REPO}@{place}") is None
    with pytest.raises(CheckpointError):
        list_files(REPO, "model", REPO, revision)
    with pytest.raises(CheckpointError):
        lapis.open(f"{REPO}@{place}")
    assert place.read_text() == "mine"


def test_the_revisions_that_there_are(hub: Hub) -> None:
    for revision in ("main", "v1.0", "refs/pr/1", "refs/convert/parquet", "feature/x_y", "0123abc", "2024-01"):
        assert safe_revision(revision) and hub_id(f"{REPO}@{revision}") == (REPO, revision)
    for name in ("a.json", "1_Pooling/config.json", "ä.txt", "with space.txt", "..a", "a.."):
        assert safe_name(name)
    for bad in ("", "/a", "a/", "a//b", "..", "a/../b", ".", "a\0b", "a\\b", "x" * 300, 5, None, "a\x1b[0m"):
        assert not safe_name(bad)


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit", "Location"])
def test_headers_lead_nowhere(hub: Hub, tmp_path: Path, files: dict[str, bytes], header: str) -> None:
    """The library that downloads took an ETag for the name of a file."""

    def fault(asked: Asked) -> tuple[int, dict[str, str], bytes] | None:
        if "/resolve/" not in asked.path:
            return None
        body = files[asked.path.rsplit("/", 1)[1]]
        return 200, {"ETag": '"x"', header: '"../../../../escaped"'}, body

    hub.fault = fault
    assert Tokenizer.open(REPO).encode("Kuala")
    assert outside(tmp_path) == []
    assert not list(tmp_path.rglob("*escaped*"))


def swap(files: dict[str, bytes], name: str, body: bytes) -> Any:
    return lambda asked: (200, {"ETag": '"x"'}, body) if asked.path.endswith(f"/{name}") else None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "README.md"])
def test_fault_87_every_file_is_checked_against_the_list(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], name: str
) -> None:
    """Not only weights: a chat template that somebody swapped on the way is noticed."""
    evil = files[name].replace(b"a", b"o")
    hub.fault = swap(files, name, evil)
    assert f"{name} came with other bytes than the hub lists" in refused(REPO)
    assert evil not in [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    hub.fault = swap(files, name, files[name][:-1])
    assert name in refused(REPO)
    hub.fault = swap(files, name, files[name] + b"more")
    assert "sent more than" in refused(REPO)
    hub.fault = None
    assert Tokenizer.open(REPO).encode("Kuala")


LOGIN = b"<!DOCTYPE html><html><body>Welcome to the Hotel. <a href='/login'>Log in</a></body></html>"
GOOD = {"sha": "a" * 40, "siblings": []}
ANSWERS = {
    "a login page": LOGIN, "nothing": b"", "a list": b"[]", "null": b"null", "a number": b"3", "text": b'"a"',
    "deep": b"[" * 100_000, "cut": b'{"sha": "aaa', "no UTF-8": b'{"sha": "\xff"}', "no commit": b"{}",
    "digits": b'{"sha": ' + b"9" * 5000 + b"}", "twice": b'{"sha": 1, "sha": 2}',
    "a commit that is a path": json.dumps(GOOD | {"sha": "../../../evil"}).encode(),
    "a commit that is a list": json.dumps(GOOD | {"sha": ["a"]}).encode(),
    "files that are a word": json.dumps(GOOD | {"siblings": "x"}).encode(),
    "files that are numbers": json.dumps(GOOD | {"siblings": [1, 2]}).encode(),
    "a name that is a list": json.dumps(GOOD | {"siblings": [{"rfilename": ["a"]}]}).encode(),
    "a size that is a word": json.dumps(GOOD | {"siblings": [{"rfilename": "a", "size": "big"}]}).encode(),
    "a size below zero": json.dumps(GOOD | {"siblings": [{"rfilename": "a", "size": -1}]}).encode(),
    "a size of a yottabyte": json.dumps(GOOD | {"siblings": [{"rfilename": "a", "size": 10**24}]}).encode(),
    "a digest that is a path": json.dumps(GOOD | {"siblings": [{"rfilename": "a", "blobId": "../x"}]}).encode(),
    "a digest that is a list": json.dumps(
        GOOD | {"siblings": [{"rfilename": "a", "lfs": {"sha256": ["x"]}}]}
    ).encode(),
    "lfs that is a word": json.dumps(GOOD | {"siblings": [{"rfilename": "a", "lfs": "x"}]}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_no_hubs_is_one_line(hub: Hub, tmp_path: Path, answer: str) -> None:
    hub.fault = lambda asked: (200, {"Content-Type": "text/html"}, ANSWERS[answer])
    says = refused(REPO)
    assert says.startswith(f"{REPO}: what http://127.0.0.1") and "is no hub's answer" in says
    with pytest.raises(lapis.LapisError) as caught:
        hub_files("hub:aina/set")
    assert "is no hub's answer" in str(caught.value) and "\n" not in str(caught.value)
    assert outside(tmp_path) == []


def test_a_login_page_in_the_place_of_a_file(hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda asked: None if asked.path.startswith("/api/") else (200, {"Content-Type": "text/html"}, LOGIN)
    assert "config.json: the server sent more than" in refused(REPO)
    assert outside(tmp_path) == [] and LOGIN not in [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]


def test_sizes_are_capped(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    listing = {"sha": "b" * 40, "siblings": [{"rfilename": "config.json", "size": 2**49, "blobId": "c" * 40}]}
    hub.fault = lambda asked: (200, {}, json.dumps(listing).encode()) if asked.path.startswith("/api/") else None
    with pytest.raises(CheckpointError, match=r"config.json has .* no file of this kind has more than"):
        lapis.open(REPO)
    listing["siblings"] = [{"rfilename": "config.json", "size": 10, "blobId": "c" * 40},
                           {"rfilename": "model.safetensors", "size": 2**49, "lfs": {"sha256": "d" * 64}}]  # fmt: skip
    from lapis.checkpoint.hub.repository import fetch

    with pytest.raises(CheckpointError, match="are free; set HF_HUB_CACHE"):
        fetch(list_files(REPO, "model", REPO, None), "model.safetensors")
    from lapis.checkpoint.hub import repository

    monkeypatch.setattr(repository, "LISTING_LIMIT", 1000)
    hub.fault = lambda asked: (200, {}, b" " * 2000)
    assert "sent more than the 1,000 bytes" in refused(REPO)


def test_fault_82_one_byte_a_second_has_an_end(hub: Hub, files: dict[str, bytes], monkeypatch: Any) -> None:
    """It hung for ever: each byte came in time."""
    monkeypatch.setattr(requests, "WINDOW", 0.2)
    monkeypatch.setattr(requests, "TRIES", 2)
    hub.drip = lambda asked: 0.05 if asked.path.endswith("/tokenizer.json") else 0.0
    begin = time.monotonic()
    assert "bytes a second came, which is too slow" in refused(REPO)
    hub.put("aina/other", files)
    hub.drip = lambda asked: 0.05 if asked.path.startswith("/api/") else 0.0
    assert "too slow to go on" in refused("aina/other")
    assert time.monotonic() - begin < 60  # each of these bodies would take minutes


def test_headers_that_never_end_have_an_end(hub: Hub, monkeypatch: Any) -> None:
    monkeypatch.setattr(requests, "ANSWER", 0.3)
    monkeypatch.setattr(requests, "TRIES", 2)
    hub.drip_headers = 0.05
    assert "no answer in 0 s" in refused("aina/other")


def test_fault_88_retry_after_is_a_number_or_a_date(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now(UTC)
    assert retry_after("7") == 7.0 and retry_after("1.5") == 1.5
    later = retry_after(format_datetime(now + timedelta(seconds=20), usegmt=True))
    assert later is not None and 17 < later <= 20
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    for odd in ("", "soon", "-5", "1e9", "nan", "9" * 400, "Wed, 99 Oct 9999999 07:28:00 GMT", "\x00"):
        assert retry_after(odd) is None
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    answers = [(429, {"Retry-After": format_datetime(now + timedelta(seconds=20), usegmt=True)}, b"")]
    hub.fault = lambda asked: answers.pop() if answers else None
    assert Tokenizer.open(REPO).encode("Kuala")
    assert [round(seconds) for seconds in slept if seconds > 1] and max(slept) <= 20.1


def test_a_download_goes_on_where_it_broke_off(hub: Hub, files: dict[str, bytes]) -> None:
    name, cut = "tokenizer.json", [100, 50]

    def fault(asked: Asked) -> tuple[int, dict[str, str], bytes] | None:
        if not asked.path.endswith(name) or not cut:
            return None
        start = int((asked.range or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        body = files[name][start:]
        headers = {"Content-Length": str(len(body)), "Content-Range": f"bytes {start}-{len(files[name]) - 1}/*"}
        return 206 if start else 200, headers, body[: cut.pop(0)]

    hub.fault = fault
    assert Tokenizer.open(REPO).encode("Kuala")
    assert [asked.range for asked in hub.asked if asked.path.endswith(name)] == [None, "bytes=100-", "bytes=150-"]
