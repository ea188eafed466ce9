"""Rows: every token once, nothing across documents, the same order wherever one resumes, and counts that add up."""

import json
import os
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import ConfigError, DataError, OutputError, TemplateError
from lapis.text.chat.chat import encode_chat
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.packing import best_fit, pack
from lapis.text.rows.rows import IGNORE, Cursor, Rows, shuffled
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.objectives.supervised.next_token import Causal

HERE = Path("here.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Saya suka makan nasi lemak. 나는 밥을 좋아한다. user assistant"] * 5, 320)


def docs(*texts: str) -> list[Document]:
    return [Document(text, HERE, i + 1) for i, text in enumerate(texts)]


def talk(*contents: str) -> ChatRecord:
    return ChatRecord([{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)], HERE, 1)


def pieces(rows: Rows, numbers: Any = None) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every segment, row after row. Checks segments and positions on the way."""
    batch = rows.take(np.arange(len(rows)) if numbers is None else numbers)
    result = []
    for ids, targets, segments, positions in zip(
        *(getattr(batch, name).tolist() for name in ("ids_BT", "targets_BT", "segments_BT", "positions_BT")),
        strict=True,
    ):
        assert segments == sorted(segments, key=lambda s: s or 10**9), "segments count up, padding is last"
        for segment in range(1, max(segments) + 1):
            places = [t for t, s in enumerate(segments) if s == segment]
            assert [positions[t] for t in places] == list(range(len(places)))
            result.append(([ids[t] for t in places], [targets[t] for t in places]))
        padding = [t for t, s in enumerate(segments) if s == 0]
        assert all(targets[t] == IGNORE and positions[t] == 0 for t in padding)
    return result


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("saya 밥\n"), max_size=40), min_size=1, max_size=8), st.integers(2, 40))
def test_documents_lose_no_token_and_cross_no_border(tokenizer: Tokenizer, texts: list[str], length: int) -> None:
    framed = [[0, *tokenizer.encode(text), 0] for text in texts if text]
    if not framed:
        with pytest.raises(DataError, match="every document is empty"):
            pack(docs(*texts), tokenizer, length=length)
        return
    rows = pack(docs(*texts), tokenizer, length=length)
    expected, at = [], 0
    for ids in framed:  # what a document alone gives, cut where a row ends
        inputs, targets = ids[:-1], ids[1:]
        while inputs:
            room = length - at % length
            expected.append((inputs[:room], targets[:room]))
            at += len(inputs[:room])
            inputs, targets = inputs[room:], targets[room:]
    assert pieces(rows) == expected
    assert rows.counts["empty"] == len(texts) - len(framed)
    assert rows.counts["tokens"] + rows.counts["padding"] == len(rows) * length
    assert rows.counts["bytes"] == sum(len(text.encode()) for text in texts)


def test_a_document_in_pieces_is_one_document(tokenizer: Tokenizer) -> None:
    halves = [Document("Saya suka", HERE, 1, more=True), Document(" makan", HERE, 1), *docs("nasi")]
    assert pieces(pack(halves, tokenizer, length=99)) == pieces(
        pack(docs("Saya suka makan", "nasi"), tokenizer, length=99)
    )


def test_a_tokenizer_that_begins_texts_with_bos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    special = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    both = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": both,
        "pair": [*both, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": special},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    bos = Tokenizer.open(tmp_path)
    assert bos.adds_bos
    result = pieces(pack(docs("nasi", "lemak"), bos, length=99))
    for (inputs, targets), text in zip(result, ("nasi", "lemak"), strict=True):
        assert (inputs, targets) == ([1, *bos.encode(text)], [*bos.encode(text), 0])


def test_chats_are_whole_and_only_the_assistant_carries_loss(tokenizer: Tokenizer) -> None:
    chats = [talk("Saya?", "suka"), talk("a", "b", "c", "d " * 9), talk("nasi " * 5, "lemak"), talk("x", "y")]
    rows = pack(chats, tokenizer, length=80)
    expected = []
    for chat in chats:
        ids, mask = encode_chat(tokenizer, chat.messages)
        expected.append((ids[:-1], [i if own else IGNORE for i, own in zip(ids[1:], mask[1:], strict=True)]))
    assert sorted(pieces(rows)) == sorted(expected)
    assert rows.counts["supervised"] == sum(t != IGNORE for _, targets in expected for t in targets)
    assert rows.counts["padding"] == len(rows) * 80 - rows.counts["tokens"]
    assert rows.take(np.arange(len(rows))).supervised == rows.counts["supervised"]


def test_faults_55_and_56_long_and_silent_chats_are_counted(tokenizer: Tokenizer) -> None:
    long, silent, good = talk("a", "nasi " * 50), talk("nasi " * 50, "b"), talk("a", "b")
    cut = pack([long, silent, good], tokenizer, length=30)
    whole = len(encode_chat(tokenizer, long.messages)[0])
    assert [cut.counts[k] for k in ("chats", "cut_chats", "dropped_silent", "dropped_long")] == [2, 2, 1, 0]
    assert cut.counts["cut_tokens"] >= whole - 31
    dropped = pack([long, silent, good], tokenizer, length=30, too_long="drop")
    assert [dropped.counts[k] for k in ("chats", "cut_chats", "dropped_silent", "dropped_long")] == [1, 0, 0, 2]
    for rows in (cut, dropped):
        assert (rows.take(np.arange(len(rows))).targets_BT != IGNORE).any(dim=1).all(), "no row is without loss"
    with pytest.raises(DataError, match="1 longer than 10 tokens"):
        pack([long], tokenizer, length=10, too_long="drop")
    with pytest.raises(DataError, match="1 without a token of the assistant"):
        pack([silent], tokenizer, length=10)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_fits_and_wastes_little(sizes: list[int]) -> None:
    order, begins = best_fit(np.asarray(sizes), 30)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    fills = [sum(sizes[i] for i in order[a:b]) for a, b in pairwise(begins)]
    assert max(fills) <= 30 and begins[-1] == len(sizes)
    assert sum(fill <= 15 for fill in fills) <= 1, "two rows that are half empty would be one"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 5), st.integers(0, 3))
def test_order_is_a_permutation_that_can_be_asked_anywhere(count: int, seed: int, epoch: int) -> None:
    whole = shuffled(np.arange(count), count, seed, epoch)
    assert sorted(whole.tolist()) == list(range(count))
    for place in (0, count // 2, count - 1):
        assert shuffled(np.array([place]), count, seed, epoch)[0] == whole[place]


def test_order_differs_by_seed_and_epoch_and_looks_random() -> None:
    orders = [shuffled(np.arange(5000), 5000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(np.arange(5000), one)[0, 1]) < 0.05
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.05
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    big = shuffled(np.array([0, 10**12]), 10**12 + 1, 3, 4)
    assert (big >= 0).all() and (big <= 10**12).all()


def test_cursor_resumes_exactly_over_epochs(tokenizer: Tokenizer) -> None:
    rows = pack(docs(*(f"saya {i} nasi" for i in range(40))), tokenizer, length=16)
    cursor, seen, saved = Cursor(seed=5), [], []
    for _ in range(3 * len(rows) // 4 + 1):
        saved.append(json.loads(json.dumps(cursor.to_json())))
        batch, cursor = rows.batch(cursor, 4)
        seen.append(batch.ids_BT)
    again = Cursor.from_json(saved[7])
    for i in range(7, len(seen)):
        batch, again = rows.batch(again, 4)
        assert torch.equal(batch.ids_BT, seen[i])
    assert again == cursor and cursor.epoch >= 2
    numbers, _ = rows.indices(Cursor(seed=5), 2 * len(rows))
    assert set(Counter(numbers.tolist()).values()) == {2}, "every row once an epoch"
    ranks = [rows.take(numbers[rank::2]).ids_BT for rank in (0, 1)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), rows.take(numbers).ids_BT)
    for bad in ({}, {"epoch": -1, "row": 0, "seed": 0}, {"epoch": 0, "row": True, "seed": 0}, None):
        with pytest.raises(DataError, match="cursor"):
            Cursor.from_json(bad)
    with pytest.raises(DataError, match="the data changed"):
        rows.batch(Cursor(row=10**6), 1)


def test_files_and_memory_hold_the_same_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, items in (("docs", docs("saya", "nasi lemak " * 30)), ("chats", [talk("a", "b"), talk("c", "d")])):
        memory, written = pack(items, tokenizer, length=20), pack(items, tokenizer, tmp_path / name, length=20)
        opened = Rows.open(tmp_path / name)
        assert memory.digest == written.digest == opened.digest
        assert pieces(memory) == pieces(opened)
        assert Tokenizer.open(tmp_path / name / "tokenizer").digest() == tokenizer.digest() == opened.info["tokenizer"]
    assert (
        pack(docs("saya", "nasi"), tokenizer, length=20).digest
        != pack(docs("nasi", "saya"), tokenizer, length=20).digest
    )
    with pytest.raises(OutputError, match="exists"):
        pack(docs("x"), tokenizer, tmp_path / "docs")


def test_packed_folders_that_are_damaged_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    pack(docs("saya suka"), tokenizer, folder, length=20)
    with pytest.raises(DataError, match=r"no rows\.json"):
        Rows.open(tmp_path)
    tokens = (folder / "tokens-00000.bin").read_bytes()
    (folder / "tokens-00000.bin").write_bytes(tokens[:-1])
    with pytest.raises(DataError, match=r"tokens-00000\.bin: has .* bytes"):
        Rows.open(folder)
    (folder / "tokens-00000.bin").write_bytes(tokens)
    info = json.loads((folder / "rows.json").read_text())
    for change in (
        {"length": 0},
        {"kind": "chats"},
        {"shards": [{"rows": 0, "arrays": {"tokens": ["object", 5], "starts": ["int64", 2]}}]},
        {"rows": "x"},
        {"shards": 1},
        {"shards": []},
        {"format": 1},
    ):
        (folder / "rows.json").write_text(json.dumps(info | change))
        with pytest.raises(DataError, match=r"rows\.json"):
            Rows.open(folder)


def test_fault_32_rows_cut_while_they_are_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They were mapped into memory, and reading beyond the new end of a file killed the process (SIGBUS)."""
    for name, items in (("docs", docs("nasi lemak " * 30_000)), ("chats", [talk("a", "b " * 9)] * 3000)):
        folder = tmp_path / name
        pack(items, tokenizer, folder, length=200)
        rows = Rows.open(folder)
        rows.take(np.arange(2))
        for file in sorted(folder.glob("tokens-*.bin")):
            os.truncate(file, 4096)
        with pytest.raises(DataError, match=r"tokens-00000\.bin: was changed while it was in use") as caught:
            rows.take(np.arange(len(rows)))
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match=r"tokens-00000\.bin: has 4,096 bytes"):
            Rows.open(folder)


@pytest.mark.parametrize("file", ["tokens-00000.bin", "starts-00000.bin", "rows.json", "lapis-manifest.json"])
def test_fault_59_rows_that_are_not_as_they_were_packed(tokenizer: Tokenizer, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "rows"
    pack(docs("saya suka nasi", "lemak"), tokenizer, folder, length=20)
    opened = Rows.open(folder)
    opened.verify()
    before = (folder / file).stat()
    raw = bytearray((folder / file).read_bytes())
    if file == "rows.json":
        raw[raw.index(b": ") + 1] = ord("\t")  # the same to a reader of JSON
    else:
        place = raw.index(b"tokens-00000.bin") + 60 if file.endswith("json") else 0
        raw[place] = ord("a") if raw[place] != ord("a") else ord("b")
    (folder / file).write_bytes(raw)
    os.utime(folder / file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="pack the data again"):
        Rows.open(folder).verify()
    if file == "tokens-00000.bin":
        with pytest.raises(DataError, match="was changed while it was in use"):
            opened.take(np.arange(1))
        with pytest.raises(DataError, match=r"tokens-00000\.bin: is not as it was packed"):
            Causal(tokenizer, str(folder), context=20)


def test_rows_of_somebody_who_means_harm_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Consistent files of which the values are not: no crash, no row that is not one."""
    for name, items in (("docs", docs("saya suka nasi lemak " * 40)), ("chats", [talk("a", "b " * 9)] * 30)):
        folder = tmp_path / name
        pack(items, tokenizer, folder, length=30)
        for array in sorted(folder.glob("*.bin")):
            good = array.read_bytes()
            for byte in (0x00, 0x7F, 0xFF):
                array.write_bytes(bytes([byte]) * len(good))
                with suppress(DataError):
                    rows = Rows.open(folder)
                    ids, targets, _, _ = rows.arrays(np.arange(len(rows)))
                    assert ids.min() >= 0 and max(ids.max(), targets.max()) < tokenizer.rows
            array.write_bytes(good)


def test_what_cannot_be_packed_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: holds a chat"):
        pack([*docs("a"), talk("a", "b")], tokenizer)  # type: ignore[list-item]
    with pytest.raises(DataError, match="line 1: holds a document"):
        pack([talk("a", "b"), *docs("a")], tokenizer)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="length is 1"):
        pack(docs("a"), tokenizer, length=1)
    picky = Tokenizer(tokenizer._backend, tokenizer.named, {"default": "{{ raise_exception('no such chats') }}"})
    with pytest.raises(TemplateError, match=r"here\.jsonl line 1: .*no such chats"):
        pack([talk("a", "b")], picky)
    nameless = Tokenizer(tokenizer._backend, {}, {})
    with pytest.raises(ConfigError, match="no eos_token"):
        pack(docs("a"), nameless)
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"text": 5}\n')
    with pytest.raises(DataError, match="line 2"):
        pack(file, tokenizer, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"], "nothing half-written"
