"""Labeled files: three formats, one meaning; and the line of what is wrong."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.errors import ConfigError, DataError
from lapis.text.corpus.labels import bare_texts, classes_of, labeled, numbers_of
from lapis.text.corpus.pictures import pictures
from lapis.text.rows.sequences import encode_framed, together
from lapis.text.tokenizer.tokenizer import train_tokenizer

ROWS = [("spam", 'call "now"'), ("ham", "see you, then"), ("ham", "3 o'clock\u2028yes")]


def test_all_formats_give_the_same_examples(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("label\ttext\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS))
    (tmp_path / "a.csv").write_text('text,label\n"call ""now""",spam\n"see you, then",ham\n3 o\'clock\u2028yes,ham\n')
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"label": a, "text": b}) + "\n" for a, b in ROWS))
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "a.tsv").read_bytes()))
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "b.csv.zst").write_bytes(pyarrow.compress((tmp_path / "a.csv").read_bytes(), "zstd", asbytes=True))
    (tmp_path / "c.json").write_text(json.dumps([{"label": a, "text": b} for a, b in ROWS], indent=1))
    for name in ("a.tsv", "a.csv", "a.jsonl", "b.tsv.gz", "b.csv.zst", "c.json"):
        result = list(labeled(tmp_path / name))
        assert [(e.label, e.text) for e in result] == ROWS, name
        assert [e.line for e in result] == ([1, 2, 3] if ".json" in name else [2, 3, 4])
    assert list(bare_texts(tmp_path / "a.tsv")) == list(bare_texts([tmp_path / "a.jsonl"])) == [b for _, b in ROWS]
    twice = [tmp_path / "a.tsv", tmp_path / ".." / tmp_path.name / "a.tsv", str(tmp_path / "*.tsv")]
    assert list(bare_texts(twice)) == [b for _, b in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "", "the file is empty"),
        ("x.tsv", "label\ttext\n", "holds no examples"),
        ("x.tsv", "lable\ttext\nham\ta\n", 'needs one column "label"; did you mean "lable"'),
        ("x.tsv", "label\ttext\nham\ta\nham b\n", "line 3: has 1 column; the header has 2"),
        ("x.tsv", "label\ttext\nham\t \n", "line 2: text is"),
        ("x.tsv", b"label\ttext\nham\t\xff\n", "line 2: not UTF-8 at byte 15"),
        ("x.tsv", b"label\ttext\nham\ta\0\n", "line 2: a NUL byte"),
        ("x.csv", 'label,text\nham,"a"b\n', "line 2: not csv"),
        ("x.jsonl", '{"label": 1.5, "text": "a"}\n', "line 1: label is 1.5"),
        ("x.jsonl", '{"text": "a"}\n', "line 1: the field label is missing"),
        ("x.jsonl", "[1]\n", "line 1: is no object"),
        ("x.txt", "a", "labeled texts are .tsv, .csv, .jsonl"),
        ("x.tsv.gz", b"\x1f\x8b\x08\0\0\0", "the gzip stream ends too early; it is truncated"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        list(labeled(tmp_path / name))
    assert message in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_label_outside_the_classes_is_told_with_file_and_line() -> None:
    assert classes_of(["10", "9", "0"]) == ["0", "9", "10"] and classes_of(["b", "a", "b"]) == ["a", "b"]
    assert numbers_of(["b", "a"], ["f line 2", "f line 3"], ["a", "b"]) == [1, 0]
    with pytest.raises(DataError, match=r'f line 3: the label "spma" is not one of the classes; did you mean "spam"'):
        numbers_of(["ham", "spma"], ["f line 2", "f line 3"], ["ham", "spam"])


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=12))
def test_together_holds_every_sequence_once_and_apart(sequences: list[list[int]]) -> None:
    batch = together(sequences)
    for i, ids in enumerate(sequences):
        row, first, last = int(batch.row_B[i]), int(batch.first_B[i]), int(batch.last_B[i])
        assert batch.ids_RT[row, first : last + 1].tolist() == ids
        assert batch.positions_RT[row, first : last + 1].tolist() == list(range(len(ids)))
        assert batch.segments_RT[row, first : last + 1].unique().numel() == 1
    assert int((batch.segments_RT > 0).sum()) == sum(map(len, sequences))
    for row in batch.segments_RT.tolist():
        assert [s for s in row if s] == sorted(s for s in row if s)


def test_a_text_is_cut_within_its_frame() -> None:
    tokenizer = train_tokenizer(["some words to learn from " * 9], 270, "masked")
    cls, sep = tokenizer.id("[CLS]"), tokenizer.id("[SEP]")
    (short, long, empty), cut = encode_framed(tokenizer, ["words", "words " * 30, ""], 12)
    assert short == tokenizer.encode("words", add_special_tokens=True)
    assert len(long) == 12 and (long[0], long[-1]) == (cls, sep) and empty == [cls, sep] and cut == 1
    with pytest.raises(ConfigError, match="context is 2; the tokenizer alone puts 2"):
        encode_framed(tokenizer, ["words"], 2)


def test_pictures_of_arrays_files_and_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (4, 6, 6, 3), np.uint8)
    for i, name in enumerate(["cat", "cat", "dog", "dog"]):
        (tmp_path / "all" / name).mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels[i]).save(tmp_path / "all" / name / f"{i}.png")
    np.savez(tmp_path / "all.npz", pixels=pixels, labels=np.array(["cat", "cat", "dog", "dog"]))
    folder, arrays = pictures(tmp_path / "all"), pictures(tmp_path / "all.npz")
    assert folder.labels == arrays.labels == ("cat", "cat", "dog", "dog")
    assert folder.shape == arrays.shape == (3, 6, 6)
    expected = pixels.transpose(0, 3, 1, 2)[[2, 0]] / 255 * 2 - 1
    for result in (folder, arrays):
        np.testing.assert_allclose(result.take([2, 0]).numpy(), expected, atol=1e-6)
    floats = random.random((4, 6, 6))
    np.testing.assert_allclose(pictures((floats, [0, 1, 2, 3])).take([1]).numpy()[0, 0], floats[1], atol=1e-6)

    image.fromarray(pixels[0, :5]).save(tmp_path / "all" / "dog" / "z.png")
    with pytest.raises(DataError, match=r"z.png: is 6x5 where 0.png is 6x6; bring all to one size, or give resize=N"):
        pictures(tmp_path / "all")
    assert pictures(tmp_path / "all", 4).take([0, 4]).shape == (2, 3, 4, 4)
    (tmp_path / "all" / "dog" / "z.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"z.png: is no picture"):
        pictures(tmp_path / "all")


def test_arrays_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    good = np.zeros((3, 4, 4))
    for pixels, labels, message in [
        (np.zeros((3, 4)), [0, 1, 2], "has the shape"),
        (good, [0, 1], "3 pictures, labels"),
        (good, [0.5, 1.5, 2.5], "one word or number each"),
        (np.where(np.arange(3)[:, None, None] == 1, np.nan, good), [0, 1, 2], "picture 1 holds NaN"),
    ]:
        with pytest.raises(DataError, match=message):
            pictures((pixels, labels))
    np.savez(tmp_path / "x.npz", pixels=np.array([{}], object), labels=[0])
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):  # objects would be unpickled
        pictures(tmp_path / "x.npz")
