"""Folders whose tokenizer is a SentencePiece model: the ids of transformers and of sentencepiece itself."""

import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import transformers

from lapis.errors import CheckpointError, MissingExtra
from lapis.text.tokenizer.tokenizer import Tokenizer

WORDS = {
    "en": "the river runs to the sea and the people of the town walk along it every morning",
    "ms": "sungai mengalir ke laut dan orang di bandar itu berjalan di tepinya setiap pagi",
    "uk": "річка тече до моря і люди міста йдуть вздовж неї щоранку",
    "zh": "河流向大海，城里的人每天早上沿着它走",
    "ko": "강은 바다로 흐르고 도시의 사람들은 매일 아침 그 곁을 걷는다",
    "ta": "ஆறு கடலை நோக்கி ஓடுகிறது",
}  # fmt: skip
# kind -> type of the model, options of its trainer, model_type of the folder, class of its tokenizer
KINDS = {
    "llama": ("bpe", {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": True},
              "llama", "LlamaTokenizer"),
    "t5": ("unigram", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, "t5", "T5Tokenizer"),
    "xlm-roberta": ("unigram", {}, "xlm-roberta", "XLMRobertaTokenizer"),
}  # fmt: skip


def texts() -> list[str]:
    """Beginnings and ends of sentences of six languages, with doubled spaces, digits and letters never seen."""
    cut = [line[i:j] for line in WORDS.values() for i in (0, 3, 9) for j in (12, 25, len(line))]
    return [*WORDS.values(), *cut, "  two  spaces ", "1234 + 5", "é你😀", "a\nb"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder with a model that was trained here, and its kind."""
    model_type, options, kind, tokenizer_class = KINDS[request.param]
    made, place = io.BytesIO(), tmp_path_factory.mktemp("model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(WORDS.values()) * 4), model_writer=made, vocab_size=420, model_type=model_type,
        character_coverage=1.0, hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    name = "sentencepiece.bpe.model" if kind == "xlm-roberta" else "spiece.model" if kind == "t5" else "tokenizer.model"
    (place / name).write_bytes(made.getvalue())
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    return request.param, place


def test_ids_are_those_of_transformers(folder: tuple[str, Path]) -> None:
    kind, place = folder
    ours, theirs = Tokenizer.open(place), transformers.AutoTokenizer.from_pretrained(place)
    for text in texts():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), (kind, text)
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text), (kind, text)


def test_ids_are_those_of_sentencepiece(folder: tuple[str, Path]) -> None:
    kind, place = folder
    own = sentencepiece.SentencePieceProcessor(model_file=str(next(place.glob("*.model"))))
    ours = Tokenizer.open(place)
    shift = 1 if kind == "xlm-roberta" else 0  # fairseq puts one more token before the pieces
    for text in WORDS.values():
        assert ours.encode(text) == [i + shift for i in own.encode(text)], text


def test_what_is_written_again_needs_no_library(folder: tuple[str, Path], tmp_path: Path) -> None:
    ours = Tokenizer.open(folder[1])
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert [Tokenizer.open(tmp_path).encode(text) for text in texts()] == [ours.encode(text) for text in texts()]


def test_a_missing_library_is_one_line(folder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"SentencePiece model .* pip install 'lapis\[sentencepiece\]'"):
        Tokenizer.open(folder[1])


def test_a_damaged_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff nothing of the kind")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"cannot convert tokenizer\.model") as caught:
        Tokenizer.open(tmp_path)
    assert "\n" not in str(caught.value)
