"""`diff` with rows: which rows really moved, tokens that only b has, and which tensor a finding is about."""

import pytest
import torch

from lapis.weights.diff.diff import diff

EMBED = "model.embed_tokens.weight"


def pair_of(folders, tmp_path, base, changed, one=None, two=None):
    a = folders.write(tmp_path / "a", base, vocab=one or folders.words())
    return diff(a, folders.write(tmp_path / "b", changed, vocab=two or folders.words()), rows=True)


@pytest.mark.parametrize("wider", [False, True])
def test_no_row_moved_is_a_finding(folders, tmp_path, wider):
    base = folders.weights(1)
    changed = {n: t if n == EMBED else folders.near({n: t}, 2)[n] for n, t in base.items()}
    changed[EMBED] = changed[EMBED].float() if wider else changed[EMBED]
    table = pair_of(folders, tmp_path, base, changed)
    assert table.rows_finding() == "no row moved" in table.notes
    assert table.moved() == [] and "no row moved" in str(table)
    assert not any(entry["outliers"] for entry in table.outliers())


def test_rounding_alone_is_no_move(folders, tmp_path):
    base = {n: t * 1.01 for n, t in folders.weights(1, dtype=torch.float32).items()}
    table = pair_of(folders, tmp_path, base, {n: t.bfloat16() for n, t in base.items()})
    assert table.rows_finding() == "no row moved"


def test_one_row_that_moved_stands_apart(folders, tmp_path):
    base = folders.weights(1)
    changed = {n: t.clone() for n, t in base.items()}
    changed[EMBED][33] += 0.25
    table = pair_of(folders, tmp_path, base, changed)
    assert [row["token"] for row in table.moved()] == ["<|im_start|>"]
    assert table.rows_finding() == "<|im_start|> moved most"
    assert table.outliers()[0]["tokens"] == ["<|im_start|>"]


def test_a_finding_names_the_tensor_where_there_are_two(folders, tmp_path):
    base = folders.weights(1, tied=False)
    changed = {n: t.clone() for n, t in base.items()}
    changed[EMBED][5] += 0.5
    table = pair_of(folders, tmp_path, base, changed)
    assert table.rows_finding() == f"w5 ({EMBED}) moved most"
    assert "w5" in table.plot(rows=True).layout.title.text
    assert table.finding().startswith("embed changed most")


def test_tokens_that_only_b_has_are_listed(folders, tmp_path):
    one = folders.words(extra=["<|endoftext|>", "<|reserved_0|>", "<|reserved_1|>"])
    base = folders.weights(1, dtype=torch.float32)
    changed = {n: t.clone() for n, t in base.items()}
    changed[EMBED][33] = 3 * changed[EMBED][7]
    changed[EMBED][34] = -changed[EMBED][2]
    table = pair_of(folders, tmp_path, base, changed, one)
    rows = {row["token"]: row for row in table.new_rows}
    assert list(rows) == ["<|im_start|>", "<|im_end|>"] and rows["<|im_start|>"]["special"]
    start = rows["<|im_start|>"]
    assert (start["id"], start["nearest"]) == (33, "w7") and start["nearest_cosine"] == pytest.approx(1, abs=1e-5)
    assert start["norm"] == pytest.approx(float(changed[EMBED][33].norm()), rel=1e-5)
    units = torch.nn.functional.normalize(changed[EMBED].double(), dim=1)
    cosines = (units[:33] @ units[34]).numpy()
    assert rows["<|im_end|>"]["nearest_cosine"] == pytest.approx(cosines.max(), abs=1e-5)
    assert table.rows_finding() == "no row moved; 2 tokens are only in b"
    assert "2 tokens are only in a" in table.notes and table.to_json()["new_rows"] == table.new_rows
