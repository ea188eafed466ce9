"""Unigram as a GGUF file says it: SentencePiece's map of characters, six languages in llama.cpp, damaged files."""

import base64
import struct
from pathlib import Path

import pytest
import sentencepiece

import lapis
from lapis.formats.export import export_gguf
from lapis.formats.importing import import_gguf
from lapis.formats.vocabulary.probe import probe
from lapis.formats.vocabulary.unigram import CharacterMap, spaced, unigram
from lapis.text.tokenizer.tokenizer import Tokenizer

from ..text.test_sentence_piece import texts
from .llama_cpp import LlamaCpp, need_llama_cpp
from .models import make_folder
from .models import unigram as unigram_tokenizer


def characters() -> bytes:
    return base64.b64decode(unigram_tokenizer().document()["normalizer"]["precompiled_charsmap"])


def test_characters_are_replaced_as_sentencepiece_does() -> None:
    theirs = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )
    ours = CharacterMap(characters())
    for text in (*probe(), *texts(), "ｶﾞ e\N{COMBINING ACUTE ACCENT} ﬁ ㍿ \N{ROMAN NUMERAL FOUR}"):
        assert ours.replaced(text) == theirs.normalize(text)


def test_a_map_without_its_last_zero_is_refused() -> None:
    """Its last text would have lost a byte in silence."""
    whole, cut = CharacterMap(characters()), characters().rstrip(b"\0")
    last = cut.rpartition(b"\0")[2].decode()
    letter = next(letter for letter in map(chr, range(0xE000, 0x30000)) if whole.replaced(letter) == last != letter)
    with pytest.raises(lapis.CheckpointError, match="points beyond its end"):
        CharacterMap(cut).replaced(letter)


def test_spaces_and_unknown_letters_by_hand() -> None:
    assert spaced("  a  b ", True, True) == "▁a▁b" and spaced(" a", True, False) == "▁▁a"
    assert spaced("a b", False, False) == "a▁b" and spaced("  ", True, True) == spaced("", True, False) == ""
    pieces = {"▁": 1, "a": 2, "b": 3, "ab": 4, "▁a": 5}
    encode = unigram(pieces, [0.0, -2.0, -2.0, -2.0, -5.0, -3.5], -5.0, 0)
    assert encode("▁ab") == [5, 3]  # -5.5, where ▁ + ab is -7 and ▁ + a + b is -6
    assert encode("▁xyb") == [1, 0, 3] and encode("") == []


def test_six_languages_in_llama_cpp(tmp_path: Path) -> None:
    need_llama_cpp()
    folder = make_folder(tmp_path / "model", "xlm-roberta-masked")
    export_gguf(folder, tmp_path / "x.gguf", type="f32")
    tokenizer = Tokenizer.open(folder)
    with LlamaCpp(tmp_path / "x.gguf", embedding=True) as theirs:
        for text in texts():
            assert theirs.encode(text) == tokenizer.encode(text), text


@pytest.mark.parametrize(
    "damaged, message",
    [
        (lambda raw: struct.pack("<I", 1 << 30) + raw[4:], "claims 1,073,741,824"),
        (lambda raw: raw[:4] + b"\xff" * (len(raw) - 4), "points beyond its end"),
    ],
)
def test_a_damaged_map_is_one_line(damaged: object, message: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "xlm-roberta-masked")
    export_gguf(folder, tmp_path / "x.gguf", type="f32")
    raw, own = (tmp_path / "x.gguf").read_bytes(), characters()
    assert raw.count(own) == 1 and callable(damaged)
    (tmp_path / "y.gguf").write_bytes(raw.replace(own, damaged(own)))
    with pytest.raises(lapis.CheckpointError, match=message) as error:
        import_gguf(tmp_path / "y.gguf", tmp_path / "back")
    assert "\n" not in str(error.value) and not (tmp_path / "back").exists()


def test_a_unigram_model_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "xlm-roberta-masked")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"byte_fallback": false', '"byte_fallback": true'))
    with pytest.raises(lapis.CheckpointError, match="spells what it does not know by bytes"):
        export_gguf(folder, tmp_path / "x.gguf", type="f32")
