"""Folders whose tokenizer is a SentencePiece model: the ids of transformers and of sentencepiece itself."""

import io
import json
import os
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
REAL = ("en", "ms", "id", "uk", "zh", "ko")
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
    place = tmp_path_factory.mktemp("model")
    write_folder(place, request.param, list(WORDS.values()) * 4, 420)
    return request.param, place


def write_folder(place: Path, name: str, lines: list[str], vocab: int) -> None:
    """A folder of one of KINDS with a model that learns from lines."""
    model_type, options, kind, tokenizer_class = KINDS[name]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=vocab, model_type=model_type,
        character_coverage=1.0, hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    name = "sentencepiece.bpe.model" if kind == "xlm-roberta" else "spiece.model" if kind == "t5" else "tokenizer.model"
    (place / name).write_bytes(made.getvalue())
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))


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


def test_what_spells_a_special_token_is_plain_text(folder: tuple[str, Path]) -> None:
    kind, place = folder
    own = sentencepiece.SentencePieceProcessor(model_file=str(next(place.glob("*.model"))))
    ours, shift = Tokenizer.open(place), 1 if kind == "xlm-roberta" else 0
    unknown = ours.encode("\N{SNOWMAN}")[-1]
    for token in ours.special:
        if token not in ("<unk>", "<mask>") and "extra_id" not in token:  # of which the model itself knows nothing
            expected = [i + shift if i != own.unk_id() else unknown for i in own.encode(f"the {token} sea")]
            assert ours.encode(f"the {token} sea") == ours.encode_spans(f"the {token} sea")[0] == expected, token
        index = ours.id(token)
        assert index in ours.encode(f"the {token} sea", special=True)
        assert index == unknown or index not in ours.encode(f"the{token}sea {token}")
    around = ours.encode("the sea", add_special_tokens=True)
    assert around == transformers.AutoTokenizer.from_pretrained(place).encode("the sea")


@pytest.mark.real_data
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_two_thousand_strings_of_six_languages(kind: str, tmp_path: Path) -> None:
    """Models that learned from one half of the lines, on lines of the other: letters and words never seen, too."""
    corpus = Path(os.environ.get("LAPIS_DATA", "../shared/data")) / "corpus"
    if not corpus.is_dir():
        pytest.skip("LAPIS_DATA has no corpus")
    lines = {language: lines_of(corpus / language / "valid.jsonl", 800) for language in REAL}
    write_folder(tmp_path, kind, [line for each in lines.values() for line in each[::2]], 3000)
    strings = [line for each in lines.values() for line in each[1::2][:334]]
    assert len(strings) >= 2000
    ours, theirs = Tokenizer.open(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode_batch(strings) == theirs(strings, add_special_tokens=False)["input_ids"]
    own = sentencepiece.SentencePieceProcessor(model_file=str(next(tmp_path.glob("*.model"))))
    shift = 1 if kind == "xlm-roberta" else 0
    unknown = own.unk_id()
    for ids, text in zip(ours.encode_batch(strings), strings, strict=True):
        pieces = own.encode(text)
        if unknown not in pieces and not (kind == "llama" and text != text.strip()):
            assert ids == [i + shift for i in pieces], text


def lines_of(path: Path, count: int) -> list[str]:
    """Lines of the texts of a jsonl file, none twice, the first 200 letters of each."""
    seen: dict[str, None] = {}
    with path.open(encoding="utf-8") as file:
        for record in file:
            seen.update((line[:200], None) for line in json.loads(record)["text"].splitlines() if len(line) > 3)
            if len(seen) >= count:
                break
    return list(seen)[:count]


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
