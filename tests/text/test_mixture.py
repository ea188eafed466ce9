"""Mixtures: every source has its share at any moment, and the stream is the same wherever and however one reads it."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import ConfigError, DataError
from lapis.text.corpus.corpus import Document
from lapis.text.rows.coverage import lines
from lapis.text.rows.data_sources import PackingSettings, open_data
from lapis.text.rows.mixture import Mixture, draw, draws
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["saya suka makan nasi lemak"] * 5, 300)


def source(word: str, count: int, tokenizer: Tokenizer) -> Any:
    return pack([Document(f"{word} {i}", Path("x"), i) for i in range(count)], tokenizer, length=12)


@pytest.fixture(scope="module")
def mixture(tokenizer: Tokenizer) -> Mixture:
    return Mixture(
        {
            "a": (source("saya", 40, tokenizer), 0.5),
            "b": (source("nasi", 7, tokenizer), 0.3),
            "c": (source("lemak", 90, tokenizer), 0.2),
        }
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=7))
def test_shares_are_kept_to_less_than_a_row_at_any_moment(shares: list[int]) -> None:
    taken, bound = [0] * len(shares), 1 - Fraction(1, 2 * len(shares) - 2)
    for n in range(1, 2 * sum(shares) + 1):
        taken[draw(shares, taken)] += 1
        assert all(
            abs(Fraction(n * share, sum(shares)) - got) <= bound for share, got in zip(shares, taken, strict=True)
        )
    assert taken == [2 * share for share in shares]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=3, max_size=12), seed=st.integers(0, 9))
def test_one_stream_for_any_batches_ranks_and_resumes(mixture: Mixture, sizes: list[int], seed: int) -> None:
    """Resumed after every batch, each time with another batch size: the rows of one long read."""
    whole, end = mixture.indices(mixture.start(seed), sum(sizes))
    result, saved = [], None
    for size in sizes:
        batch, saved = next(draws(mixture, size, seed, saved))
        saved = json.loads(json.dumps(saved))
        result.append(batch.rows)
        world = 2
        ranks = [mixture.take(batch.rows[rank::world]).ids_BT for rank in range(world)]
        together = torch.empty(size, mixture.length, dtype=torch.int64)
        together[0::2], together[1::2] = ranks
        assert torch.equal(together, batch.to("cpu").ids_BT)
    assert np.concatenate(result).tolist() == whole.tolist()
    assert mixture.resumed(saved) == end


def test_sources_are_read_whole_in_every_epoch_of_theirs(mixture: Mixture) -> None:
    rows, _ = mixture.indices(mixture.start(3), 20 * len(mixture))
    for at, one in enumerate(mixture.sources):
        begin = int(mixture.begins[at])
        own = rows[(rows >= begin) & (rows < begin + len(one))] - begin
        for epoch in range(len(own) // len(one)):
            assert sorted(own[epoch * len(one) : (epoch + 1) * len(one)].tolist()) == list(range(len(one)))
        assert abs(len(own) / len(rows) - mixture.weights[at]) < 1 / len(rows)
    assert rows[:30].tolist() != mixture.indices(mixture.start(4), 30)[0].tolist()


def test_rows_of_a_mixture_are_those_of_its_sources(mixture: Mixture) -> None:
    numbers = np.array([0, len(mixture) - 1, 0, len(mixture.sources[0])])
    ids = mixture.take(numbers).ids_BT
    a, b, c = (one.take(np.arange(len(one))).ids_BT for one in mixture.sources)
    assert torch.equal(ids, torch.stack([a[0], c[-1], a[0], b[0]]))
    summary = "\n".join(lines(mixture))
    assert (
        "50.0% a" in summary and "read 5.4" not in summary.split("\n")[-1] and summary.count("times in an epoch") == 3
    )


def test_weights_from_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, word in (("one", "saya"), ("two", "nasi"), ("three", "suka")):
        (tmp_path / f"{name}.txt").write_text(f"{word} " * 40)
    pack(tmp_path / "three.txt", tokenizer, tmp_path / "packed", length=12)
    one, two, packed = (str(tmp_path / name) for name in ("one.txt", "two.txt", "packed"))
    expected = PackingSettings(tokenizer, "documents", 12)
    by_name = open_data({one: 0.7, two: 0.1, packed: 0.2}, expected)
    listed = [{"path": one, "weight": 7}, {"path": [two], "weight": 1}, {"path": packed, "weight": 2}]
    by_list = open_data(listed, expected)
    assert isinstance(by_name, Mixture) and isinstance(by_list, Mixture)
    assert by_name.facts == by_list.facts and by_name.shares == [7, 1, 2] and by_name.digest == by_list.digest
    assert by_name.facts[two]["digest"] == pack(two, tokenizer, length=12).digest
    both = open_data([one, two], expected)
    assert not isinstance(both, Mixture) and both.counts["documents"] == 2
    for bad, says in (
        ({one: 0}, "the weight of .*one.txt is 0"),
        ({one: "much"}, "the weight of .*one.txt is 'much'"),
        ({one: float("nan")}, "is nan"),
        ({one: True}, "is True"),
        ([{"path": one}], r"data\[0\] is .*each has path and weight"),
        ([{"path": one, "weight": 1}, two], r"data\[1\] is"),
        ([{"path": one, "weight": 1}, {"path": one, "weight": 2}], "stands twice"),
        ([one, packed], "packed folders in a list need weights"),
        ({}, "at least one source"),
    ):
        with pytest.raises(ConfigError, match=says):
            open_data(bad, expected)
    with pytest.raises(ConfigError, match=r"packed: was packed in rows of 12, but context is 20"):
        open_data({one: 1, packed: 1}, PackingSettings(tokenizer, "documents", 20))
    with pytest.raises(DataError, match=r"one\.txt: holds documents; this objective learns from chats"):
        open_data({one: 1}, PackingSettings(tokenizer, "chats", 12))


def test_a_cursor_of_other_sources_is_refused(mixture: Mixture) -> None:
    for bad in (None, {}, {"taken": [1, 2], "seed": 0}, {"taken": [1, 2, -3], "seed": 0}, {"taken": 5, "seed": 0}):
        with pytest.raises(DataError, match="the data cursor"):
            mixture.resumed(bad)


def test_large_files_are_packed_once_into_the_cache(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lapis.text.rows import data_sources, packing

    monkeypatch.setattr(data_sources, "LARGE", 100)
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.txt"
    file.write_text("saya suka nasi lemak " * 50)
    expected = PackingSettings(tokenizer, "documents", 12, workers=1)
    first, again = open_data(str(file), expected), open_data(str(file), expected)
    assert first.digest == again.digest == packing.pack(file, tokenizer, length=12).digest
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1
    file.write_text("saya suka makan " * 50)
    assert open_data(str(file), expected).digest != first.digest
