"""Files packed by many: the rows are those of one naive pass, whoever did which part and whoever died."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lapis.errors import DataError, OutputError
from lapis.text.chat.chat import encode_chat
from lapis.text.corpus.corpus import chats, documents
from lapis.text.rows import corpus_parts
from lapis.text.rows.packing import pack
from lapis.text.rows.parallel_packing import Job, share
from lapis.text.rows.part_writer import Shape
from lapis.text.rows.rows import IGNORE, Rows
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

WORDS = "saya suka makan nasi lemak di Kuala Lumpur 나는 밥을 좋아한다 ｌ 我们 喜欢 茶\u3000x\xa0y".split(" ")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 5, 330)


def sentences(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, 30))) for _ in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Texts in every form, small ones, a long .txt and a long .jsonl; `shares` is to cut them into stretches."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(5):
        (folder / f"small-{i}.txt").write_text(sentences(i, 1)[0])
    (folder / "long.txt").write_text("\n\n".join("\n".join(sentences(10 + i, 3)) for i in range(80)) + "\n")
    lines = [json.dumps({"text": text, "id": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(sentences(7, 150))]
    (folder / "long.jsonl").write_text("\n\n".join(lines))
    (folder / "z.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:20]).encode()))
    table = pyarrow.table({"text": sentences(9, 100), "n": list(range(100))})
    pyarrow.parquet.write_table(table, folder / "many.parquet", row_group_size=9)
    return folder


def naive(texts: list[str], tokenizer: Tokenizer, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and targets of the stream, by the book: one list, cut into rows."""
    ids = [i for text in texts for i in [0, *tokenizer.encode(text)]]
    targets = [i for text in texts for i in [*tokenizer.encode(text), 0]]
    rows = range(0, len(ids), length)
    pad = -len(ids) % length
    ids, targets = ids + [0] * pad, targets + [IGNORE] * pad
    return [ids[a : a + length] for a in rows], [targets[a : a + length] for a in rows]


def whole(texts: Any) -> list[str]:
    result: list[str] = []
    for document in texts:
        if document.rest:
            result[-1] += document.text
        else:
            result.append(document.text)
    return result


def taken(rows: Rows) -> list[list[list[int]]]:
    return [a.tolist() for a in rows.arrays(np.arange(len(rows)))]


@pytest.mark.parametrize("span", [300, 2_000, 1 << 30])
def test_parts_give_the_rows_of_one_naive_pass(
    span: int, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_parts, "SPAN", span)
    ids, targets = naive(whole(documents(corpus)), tokenizer, 48)
    rows = pack(corpus, tokenizer, length=48)
    assert len(rows.shards) > 10 or span > 300
    result = taken(rows)
    assert result[0] == ids and result[1] == targets
    one = pack(documents(corpus), tokenizer, length=48)
    assert taken(one) == result and one.counts == rows.counts


def test_one_worker_and_three_write_the_same_bytes(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_parts, "SPAN", 1500)
    for workers in (1, 3):
        pack(corpus, tokenizer, tmp_path / f"by-{workers}", 48, workers=workers)
    one, three = ({p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()} for f in
                  (tmp_path / "by-1", tmp_path / "by-3"))  # fmt: skip
    assert one == three and len(one) > 20
    assert Rows.open(tmp_path / "by-3").digest == pack(corpus, tokenizer, length=48).digest


def test_parquet_zst_and_gz_give_the_rows_of_jsonl(tmp_path: Path, tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    talks: list[Any] = [
        [{"role": "user", "content": f"{text}?"}, {"role": "assistant", "content": text[::-1]}]
        for text in sentences(3, 40)
    ]
    for name, records in (
        ("texts", [{"text": text, "n": 1} for text in sentences(2, 60)]),
        ("chats", [{"messages": talk} for talk in talks]),
    ):
        raw = "".join(json.dumps(record) + "\n" for record in records).encode()
        (tmp_path / f"{name}.jsonl").write_bytes(raw)
        (tmp_path / f"{name}-gz.jsonl.gz").write_bytes(gzip.compress(raw))
        half = len(raw) // 2
        frames = [pyarrow.Codec("zstd").compress(piece, asbytes=True) for piece in (raw[:half], raw[half:])]
        (tmp_path / f"{name}-zst.jsonl.zst").write_bytes(b"".join(frames))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / f"{name}.parquet")
        result = [pack(path, tokenizer, length=64) for path in sorted(tmp_path.glob(f"{name}*"))]
        assert len(result) == 4 and len({rows.digest for rows in result}) == 1
        assert [taken(rows) for rows in result[1:]] == [taken(result[0])] * 3
    table = pyarrow.Table.from_pylist([{"messages": [*talks[0], call, *talks[0]]}, {"messages": talks[1]}])
    pyarrow.parquet.write_table(table, tmp_path / "tools.parquet")
    first, second = chats(tmp_path / "tools.parquet")
    assert first.messages == [*talks[0], call, *talks[0]] and second.messages == talks[1], "no field of null is made"


def test_chats_in_many_parts_are_whole_and_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_parts, "SPAN", 900)
    lines = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text[:20]}]}
        for text in sentences(4, 60)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    rows = pack(file, tokenizer, tmp_path / "out", 80, workers=2)
    assert len(rows.shards) > 3
    result = []
    for ids, targets, segments, _ in zip(*taken(rows), strict=True):
        for segment in range(1, max(segments) + 1):
            at = [t for t, s in enumerate(segments) if s == segment]
            result.append(([ids[t] for t in at], [targets[t] for t in at]))
    expected = []
    for chat in chats(file):
        ids, mask = encode_chat(tokenizer, chat.messages)
        ids, mask = ids[:81], mask[:81]
        if any(mask[1:]):
            expected.append((ids[:-1], [i if own else IGNORE for i, own in zip(ids[1:], mask[1:], strict=True)]))
    assert sorted(result) == sorted(expected)


def test_faults_name_the_line_of_the_file_from_any_part(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_parts, "SPAN", 400)
    good = [json.dumps({"text": text}) for text in sentences(5, 100)]
    file = tmp_path / "a.jsonl"
    for name, line, says in (("bad", '{"text": 5}', "text is a number"), ("cut", '{"text": "a"', "not JSON")):
        file.write_text("\n".join([*good[:70], line, *good[70:]]))
        for workers in (1, 2):
            with pytest.raises(DataError, match=f"line 71: {says}"):
                pack(file, tokenizer, tmp_path / name, 48, workers=workers)
    text = tmp_path / "b.txt"
    text.write_bytes("\n".join(good).encode() + b"\nab\xffcd")
    with pytest.raises(DataError, match=f"line 101: not UTF-8 at byte {text.stat().st_size - 3} "):
        pack(text, tokenizer, tmp_path / "out", 48)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.txt"], "nothing is left"


def job_of(corpus: Path, tokenizer: Tokenizer, length: int = 48) -> Job:
    from lapis.text.corpus.files import files

    return Job(Shape("documents", length), None, corpus_parts.parts(files(corpus)), tokenizer.digest())


RANK = """
import sys, os, signal
from pathlib import Path
from lapis.text.rows import corpus_parts, parallel_packing
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer
corpus_parts.SPAN = 1500
corpus, tokenizer, out, dies = sys.argv[1:]
if dies == "dies":  # with a part in its hands, its arrays half written
    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
    parallel_packing.Shard.to_json = killed
pack(corpus, Tokenizer.open(tokenizer), out, 48, workers=1)
"""


def rank(number: int, world: int, corpus: Path, out: Path, dies: str = "") -> Any:
    tokenizer = corpus.parent / "tokenizer"
    environment = {**os.environ, "RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, "-c", RANK, str(corpus), str(tokenizer), str(out), dies]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_fault_69_a_rank_that_dies_is_made_up_for(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    out = tmp_path / "out"
    doomed = rank(0, 3, corpus, out, "dies")
    assert doomed.wait() == -signal.SIGKILL
    assert list((tmp_path / ".out.lapis" / ".journal").glob("0.*")), "it had begun"
    ranks = [rank(number, 3, corpus, out) for number in (1, 2)]
    assert [r.wait() for r in ranks] == [0, 0], [r.stderr.read() for r in ranks]
    assert not (tmp_path / ".out.lapis").exists()
    monkeypatch.setattr(corpus_parts, "SPAN", 1500)
    alone = pack(corpus, tokenizer, tmp_path / "alone", 48, workers=1)
    assert Rows.open(out).digest == alone.digest and taken(Rows.open(out)) == taken(alone)
    late = rank(0, 3, corpus, out)  # a rank that comes when all is done
    assert late.wait() == 0


def test_fault_60_a_pack_that_was_killed_goes_on(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_parts, "SPAN", 1500)
    out = tmp_path / "out"
    from lapis.text.rows import parallel_packing

    real, seen = parallel_packing.write_shard, []  # type: ignore[attr-defined]

    def dies(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(parallel_packing, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(corpus, tokenizer, out, 48, workers=1)
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".out.lapis" / "out").glob("*.bin")}
    assert len(done) == 6 and not out.exists()
    pack(corpus, tokenizer, out, 48, workers=1)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.bin")}
    assert done.items() <= times.items(), "what was done is not done again"
    assert Rows.open(out).digest == pack(corpus, tokenizer, length=48).digest
    with pytest.raises(OutputError, match="exists"):
        share(job_of(corpus, tokenizer), tokenizer, out, workers=1)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        pack(corpus, tokenizer, tmp_path / "two", 48, workers=1)
    (corpus / "small-0.txt").write_text("saya lain")
    pack(corpus, tokenizer, tmp_path / "two", 48, workers=1)
    assert Rows.open(tmp_path / "two").digest == pack(corpus, tokenizer, length=48).digest, "old parts are not taken"
