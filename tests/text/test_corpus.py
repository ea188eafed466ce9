"""Files become documents and chats; whatever is wrong with them is one line with file, line, and byte or field."""

import gzip
import json
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import DataError, MissingExtra
from lapis.text.corpus import corpus
from lapis.text.corpus.corpus import chats, documents, files, kind_of, texts
from lapis.text.corpus.labels import bare_texts

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(read: Any, path: Path | str) -> str:
    """The one line with which the files are refused."""
    with pytest.raises(DataError) as caught:
        list(read(path))
    line = str(caught.value)
    assert "\n" not in line and Path(path).name in line
    return line


def test_files_folders_and_globs(tmp_path: Path) -> None:
    put(tmp_path, "b/one.txt", "one")
    put(tmp_path, "a.jsonl", '{"text": "two", "id": 5}\n\n{"text": "three"}')
    put(tmp_path, "b/four.jsonl.gz", gzip.compress(b'{"text": "four"}\n'))
    put(tmp_path, ".hidden/no.txt", "no")
    put(tmp_path, "readme.pdf", "no")
    assert [d.text for d in documents(tmp_path)] == ["two", "three", "four", "one"]
    assert [d.line for d in documents(tmp_path / "a.jsonl")] == [1, 3]
    assert [p.name for p in files([f"{tmp_path}/**/*.txt", tmp_path / "b"])] == ["one.txt", "four.jsonl.gz"]
    assert kind_of(tmp_path) == "documents" and kind_of(put(tmp_path, "c.jsonl", json.dumps(GOOD))) == "chats"
    assert list(texts(tmp_path)) == ["two", "three", "four", "one", "a", "b"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab \n\té한🙂"), min_size=1, max_size=300).filter(str.strip), st.integers(3, 9))
def test_a_text_in_pieces_is_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, piece: int) -> None:
    path = put(tmp_path_factory.mktemp("t"), "x.txt", b"\xef\xbb\xbf" + text.encode())
    before, corpus.PIECE = corpus.PIECE, piece  # type: ignore[attr-defined]
    try:
        result = list(documents(path))
    finally:
        corpus.PIECE = before  # type: ignore[attr-defined]
    assert "".join(d.text for d in result) == text
    assert [d.more for d in result] == [True] * (len(result) - 1) + [False]
    at = 0
    for d in result:
        assert d.line == 1 + text.count("\n", 0, at)
        at += len(d.text)


def test_fault_47_empty_files(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        for content in (b"", b"\n \n", b"\xef\xbb\xbf"):
            assert "is empty" in refused(documents, put(tmp_path, name, content))
    assert "holds no" in refused(documents, put(tmp_path, "d/x.pdf", "x").parent)


def test_fault_48_invalid_utf8_has_line_and_byte(tmp_path: Path) -> None:
    raw = "é\nab".encode() + b"\xff" + b"cd\n"
    assert "line 2: not UTF-8 at byte 5 (0xff)" in refused(documents, put(tmp_path, "a.txt", raw))
    assert "line 1: not UTF-8 at byte 1 (0xc3)" in refused(documents, put(tmp_path, "cut.txt", b"a\xc3"))
    assert "line 3: not UTF-8 at byte 7 (0xc3)" in refused(
        documents, put(tmp_path, "bom.txt", b"\xef\xbb\xbfa\nb\n\xc3(")
    )
    record = b'{"text": "a"}\n{"text": "\xe9"}\n'
    assert "line 2: not UTF-8 at byte 24 (0xe9)" in refused(documents, put(tmp_path, "a.jsonl", record))
    long = b"ab\n" * 1_000_000 + b"\x80"
    assert "line 1000001: not UTF-8 at byte 3000000 (0x80)" in refused(documents, put(tmp_path, "long.txt", long))
    assert "is UTF-16; convert the file to UTF-8" in refused(
        documents, put(tmp_path, "utf16.txt", "text".encode("utf-16"))
    )


def test_fault_49_byte_order_mark_is_stripped(tmp_path: Path) -> None:
    assert [d.text for d in documents(put(tmp_path, "a.txt", b"\xef\xbb\xbfhello"))] == ["hello"]
    assert [d.text for d in documents(put(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}'))] == ["hello"]


def test_fault_50_nul_bytes_are_reported(tmp_path: Path) -> None:
    assert "line 2: a NUL byte at byte 3" in refused(documents, put(tmp_path, "a.txt", b"ab\n\0c"))
    assert "line 1: a NUL byte at byte 9" in refused(documents, put(tmp_path, "a.jsonl", b'{"text":"\0"}'))
    for name, kind in (("u.txt", "utf-16"), ("u.jsonl", "utf-16-le"), ("u.csv", "utf-16-be")):
        line = refused(bare_texts, put(tmp_path, name, "label,text\nham,한국어".encode(kind)))
        assert line.endswith(f"{name} line 1: is UTF-16; convert the file to UTF-8")
    assert "text holds a NUL" in refused(documents, put(tmp_path, "b.jsonl", b'{"text":"a\\u0000"}'))


def test_fault_51_a_line_of_100_mb_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    assert sum(len(d.text) for d in documents(path)) == 100_000_000
    assert tracemalloc.get_traced_memory()[1] < 12_000_000
    tracemalloc.stop()
    assert "longer than 32 MB" in refused(documents, path.rename(tmp_path / "long.jsonl"))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"txt": "a"}, 'field text is missing; did you mean "txt"'),
        ({"text": 5}, "text is a number"),
        ({"text": None}, "text is null"),
        ({"text": ["a"]}, "text is a list"),
        ("a", "is text; expected an object"),
        (GOOD, "holds a chat"),
        ({"text": "a", **GOOD}, "both text and messages"),
        ({"text": "\ud800"}, "half a surrogate"),
    ],
)
def test_faults_52_and_53_documents_of_another_schema(record: Any, says: str, tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"text": "fine"}\n' + json.dumps(record))
    line = refused(documents, path)
    assert "line 2" in line and says in line


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"text": "a"}, "holds a document"),
        ({"mesages": []}, 'field messages is missing; did you mean "mesages"'),
        (chat(), "messages is empty"),
        ({"messages": "a"}, "messages is text"),
        (chat("a"), "messages[0] is text"),
        (chat({"content": "a"}), "messages[0].role is missing"),
        (
            chat(USER, {"role": "asistant", "content": "b"}),
            "messages[1].role is 'asistant'; did you mean \"assistant\"",
        ),
        (chat(USER, {"role": 3, "content": "b"}), "messages[1].role is 3"),
        (chat(USER, {"role": "assistant"}), "messages[1].content is missing"),
        (chat(USER, {"role": "assistant", "content": 4}), "messages[1].content is a number"),
        (chat(USER, {"role": "assistant", "content": None}), "messages[1].content is null"),
        (chat({"role": "user", "content": [{"type": "text"}]}, REPLY), "messages[0].content[0].text is null"),
        (chat(USER), "no message is the assistant's"),
        ({**GOOD, "tools": "x"}, "tools is text"),
    ],
)
def test_faults_52_and_57_chats_of_another_schema(record: Any, says: str, tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", json.dumps(GOOD) + "\n" + json.dumps(record))
    line = refused(chats, path)
    assert "line 2" in line and says in line


def test_chats_keep_what_templates_need(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    record = {**chat(USER, call, {"role": "tool", "content": "1"}, REPLY), "tools": [{"type": "function"}], "id": 3}
    (result,) = chats(put(tmp_path, "a.jsonl", json.dumps(record)))
    assert (result.messages, result.tools) == (record["messages"], record["tools"])
    assert "plain text" in refused(chats, put(tmp_path, "a.txt", "x"))


def test_fault_54_twins_and_nan_are_not_json(tmp_path: Path) -> None:
    assert 'line 1: the key "text" stands twice' in refused(
        documents, put(tmp_path, "a.jsonl", '{"text":"a","text":"b"}')
    )
    for word in ("NaN", "Infinity", "-Infinity"):
        assert f"line 1: {word} is not JSON" in refused(
            documents, put(tmp_path, "b.jsonl", f'{{"text":"a","x":{word}}}')
        )
    assert "line 2: not JSON at column 10: Expecting value; mend or remove it" in refused(
        documents, put(tmp_path, "c.jsonl", '{"text":"a"}\n{"text": a}\n')
    )
    assert "nested too deeply" in refused(documents, put(tmp_path, "d.jsonl", '{"text":' + "[" * 200_000))


def test_fault_58_truncated_or_false_gz(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": "a" * 9000}).encode() * 50)
    assert "truncated" in refused(documents, put(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2]))
    assert "truncated" in refused(documents, put(tmp_path, "a.txt.gz", gzip.compress(b"text" * 999)[:-9]))
    assert "not gzip" in refused(documents, put(tmp_path, "b.txt.gz", b"plain text"))


def test_files_that_are_not_there_or_unknown(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", '{"text": "a"}')
    assert 'no such file; did you mean "train.jsonl"?' in refused(documents, tmp_path / "trian.jsonl")
    assert "no file matches" in refused(documents, f"{tmp_path}/*.txt")
    assert 'end in ".csv" are not read; give .txt' in refused(documents, put(tmp_path, "a.csv", "a"))


def parquet(folder: Path, name: str, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name, **options)
    return folder / name


def test_fault_58_truncated_or_false_zst_and_parquet(tmp_path: Path) -> None:
    whole = pyarrow.Codec("zstd").compress(random.Random(0).randbytes(300).hex().encode() * 500, asbytes=True)
    assert "the zstd stream ends too early" in refused(documents, put(tmp_path, "a.txt.zst", whole[: len(whole) // 2]))
    assert "not zstd, or damaged" in refused(documents, put(tmp_path, "b.txt.zst", b"plain text"))
    texts = [random.Random(i).randbytes(200).hex() for i in range(300)]
    raw = parquet(tmp_path, "whole.parquet", {"text": texts}, row_group_size=100).read_bytes()
    for cut in (0, 3, len(raw) // 2, len(raw) - 1):
        assert "not parquet, or truncated" in refused(documents, put(tmp_path, "c.parquet", raw[:cut]))
    at = len(raw) // 2
    damaged = raw[:at] + bytes(200) + raw[at + 200 :]
    line = refused(documents, put(tmp_path, "d.parquet", damaged))
    assert "damaged after row" in line or "NUL" in line or "not UTF-8" in line


def test_parquet_that_is_not_text(tmp_path: Path) -> None:
    one = parquet(tmp_path, "one.parquet", {"id": [1], "body": ["a"], "n": [2]})
    assert [d.text for d in documents(one)] == ["a"] and kind_of(one) == "documents"
    assert "is empty" in refused(documents, parquet(tmp_path, "none.parquet", {"text": pyarrow.array([], "string")}))
    assert "row 2: text is null" in refused(documents, parquet(tmp_path, "null.parquet", {"text": ["a", None]}))
    assert "row 1: text is a number" in refused(documents, parquet(tmp_path, "n.parquet", {"text": [1]}))
    assert 'field text is missing; did you mean "txt"' in refused(
        documents, parquet(tmp_path, "m.parquet", {"txt": ["a"]})
    )
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"fine", b"caf\xe9"], "binary").buffers())
    assert "row 2: text is not UTF-8 at byte 3 (0xe9)" in refused(
        documents, parquet(tmp_path, "latin.parquet", {"text": latin})
    )


def test_two_fields_that_could_be_the_text_are_both_named(tmp_path: Path) -> None:
    both = {"text": "a", "content": "b"}
    for path in (
        put(tmp_path, "both.jsonl", json.dumps({"text": "a"}) + "\n" + json.dumps(both)),
        parquet(tmp_path, "both.parquet", {name: [value] for name, value in both.items()}),
    ):
        assert "text and content could both be the text; say which with field" in refused(documents, path)
    assert [d.text for d in documents(tmp_path / "both.parquet", field="content")] == ["b"]
    assert "the field body is missing" in refused(lambda p: documents(p, field="body"), tmp_path / "both.parquet")
    body = put(tmp_path, "body.jsonl", json.dumps({"body": "a", "text_id": 3}))
    assert [d.text for d in documents(body)] == ["a"]
    talk = put(tmp_path, "talk.jsonl", json.dumps({"messages": GOOD["messages"], "conversations": GOOD["messages"]}))
    assert "messages and conversations could both be the chat" in refused(chats, talk)
    named = put(tmp_path, "named.jsonl", json.dumps({"dialog": GOOD["messages"], "text": "x"}))
    assert kind_of(named, "dialog") == "chats" and len(list(chats(named, "dialog"))) == 1


def test_a_missing_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, "a.parquet", {"text": ["a"]})
    pressed = put(tmp_path, "a.txt.zst", pyarrow.Codec("zstd").compress(b"abc", asbytes=True))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source in (path, pressed):
        with pytest.raises(MissingExtra, match=r"pyarrow is not installed; pip install 'lapis\[data\]'"):
            list(documents(source))
