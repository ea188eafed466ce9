"""Data sets of the hub, from a hub that this file plays: which files are taken, and what is said where none can be."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lapis.errors import DataError
from lapis.text.corpus.files import choose

COMMIT = "a" * 40


def parquet(*texts: str) -> bytes:
    raw = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), raw)
    return raw.getvalue()


SETS = {
    ("me/words", "main"): {
        "README.md": b"# words",
        "data/train-0.jsonl": b'{"text": "satu"}\n',
        "data/train-1.parquet": parquet("dua", "tiga"),
        "data/test-0.jsonl": b'{"text": "bukan"}\n',
    },
    ("me/tables", "main"): {"words.csv": b"text\nsatu\n"},
    ("me/tables", "refs/convert/parquet"): {"default/train/0000.parquet": parquet("satu")},
}


def git(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].removeprefix("/api/datasets/").removeprefix("/datasets/").split("/")
        name = "/".join(parts[:2])
        if self.path.startswith("/api/"):
            revision = "/".join(parts[3:]).replace("%2F", "/") or "main"
            files = SETS.get((name, revision))
            known = any(other == name for other, _ in SETS)
            if files is None:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
                return
            entries = [{"rfilename": file, "size": len(body), "blobId": git(body)} for file, body in files.items()]
            self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": entries}).encode(), {})
        else:
            result = [files["/".join(parts[4:])] for (n, _), files in SETS.items()
                     if n == name and "/".join(parts[4:]) in files]  # fmt: skip
            etag = f'"{hashlib.sha256(result[0]).hexdigest()}"'
            self.answer(200, result[0], {"ETag": etag, "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


READ = """
import json, sys
from lapis.errors import LapisError
from lapis.text.corpus.corpus import documents
for spec in sys.argv[1:]:
    try:
        print(json.dumps([d.text for d in documents(spec)]))
    except LapisError as error:
        print(json.dumps(str(error)))
"""


def read(endpoint: str, home: Path, *specs: str, **environment: str) -> list[Any]:
    settings = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "LAPIS_CACHE": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", READ, *specs], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_is_read_whole_and_again_without_the_hub(endpoint: str, tmp_path: Path) -> None:
    specs = ["hub:me/words", "hub:me/words/data/test-*", "hub:me/tables", "hub:me/words/dta", "hub:me/words@v9",
             "hub:me/none", "hub:words"]  # fmt: skip
    words, test, tables, misspelled, revision, none, short = read(endpoint, tmp_path, *specs)
    assert (words, test, tables) == (["satu", "dua", "tiga"], ["bukan"], ["satu"])
    assert misspelled == 'hub:me/words/dta: no file matches; did you mean "data"?'
    assert "has no revision v9" in revision and "no such data set" in none and "expected hub:OWNER/NAME" in short
    again, absent = read("http://127.0.0.1:9", tmp_path, "hub:me/words", "hub:me/other", HF_HUB_OFFLINE="1")
    assert again == words and "not in the cache" in absent
    (down,) = read("http://127.0.0.1:9", tmp_path / "other", "hub:me/words")
    assert "the hub did not answer" in down and "\n" not in down


def test_which_files_are_meant() -> None:
    names = ["README.md", "train.jsonl", "test.jsonl", "dataset_infos.json"]
    assert choose("hub:a/b", names, None) == ["train.jsonl"]
    assert choose("hub:a/b", ["a.txt", "b.txt.gz", "test.txt"], None) == ["a.txt", "b.txt.gz"]
    assert choose("hub:a/b", ["contest.txt", "trained.md"], None) == ["contest.txt"]
    many = ["en/train-0.parquet", "ms/train-0.parquet", "ms/test-0.parquet"]
    assert choose("hub:a/b", many, "ms") == ["ms/test-0.parquet", "ms/train-0.parquet"]
    with pytest.raises(DataError, match=r"several folders \(en, ms\); name one, as in hub:a/b/en"):
        choose("hub:a/b", many, None)
    with pytest.raises(DataError, match="holds no"):
        choose("hub:a/b", ["README.md", "x.csv"], None)
