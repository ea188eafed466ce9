"""What a language costs: every figure by its definition, a curve that encoding confirms, and when not to extend."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models

from lapis.errors import DataError
from lapis.families.config import ModelConfig, Rope
from lapis.language.extend import extend
from lapis.language.fertility import fertility
from lapis.language.recommend import COUNTED, ENOUGH, Curve, knee_of, recommend
from lapis.language.texts import first_bytes, is_held_out, read_texts
from lapis.model.load import save
from lapis.model.size import measure
from lapis.model.transformer import Transformer
from lapis.report.pages.fertility import fertility_page
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

from .conftest import make, write

REAL = Path(os.environ.get("LAPIS_MODELS", "/nowhere"))
ENGLISH = "The old house stands by the river, and the children of the village play in its garden every day. "
PLACES = ["학교에서", "집에서", "공원에서", "시장에서", "도서관에서"]
KOREAN = [
    f"나는 오늘 {a} 친구들과 함께 밥을 먹고 {b} 책을 {n} 읽었습니다." for a in PLACES for b in PLACES for n in range(9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    tokenizer = train_tokenizer([ENGLISH * 20], 300)
    torch.manual_seed(0)
    config = ModelConfig(
        family="llama", dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, vocab=tokenizer.rows,
        context=128, tied=True, rope=Rope(theta=1e4),
    )  # fmt: skip
    folder.mkdir()
    save(Transformer(config), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def korean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("text") / "ko.jsonl", KOREAN)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "en.txt"
    path.write_text("\n".join(ENGLISH for _ in range(80)))
    return path


def test_figures_are_by_their_definitions(model: Path, korean: Path, english: Path) -> None:
    result = fertility(model, [korean], replay=[english], scored=600)
    held = [text for text in KOREAN if is_held_out(text)]
    tokenizer, target = Tokenizer.open(model), result.languages["target"]
    ids = [i for text in held for i in tokenizer.encode(text)]
    size = sum(len(text.encode()) for text in held)
    assert (target["documents"], target["bytes"]) == (len(held), size)
    assert target["tokens_per_byte"] == pytest.approx(len(ids) / size)
    assert target["tokens_per_word"] == pytest.approx(len(ids) / sum(len(text.split()) for text in held))
    assert target["single_byte_share"] > 0.7 > 0.05 > result.languages["replay"]["single_byte_share"]
    assert target["bits_per_byte"] > 1 and result.languages["replay"]["bits_per_byte"] > 1
    assert target["characters_per_second"] > 0


def test_one_text_as_both_languages_has_one_set_of_figures(model: Path, korean: Path) -> None:
    """All of them are of held-out documents; the share of the vocabulary grows with what is read."""
    target, replay = fertility(model, [korean], replay=[korean], run=False).languages.values()
    assert target == replay
    used = {i for text in KOREAN if is_held_out(text) for i in Tokenizer.open(model).encode(text)}
    assert target["vocabulary_share"] == len(used) / Tokenizer.open(model).vocab_size


@pytest.mark.real_model
@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="LAPIS_MODELS names no folder of real models")
def test_a_model_that_knows_malay_is_not_to_be_extended(data_dir: Path) -> None:
    """The figures are those of docs/evidence/language.md."""
    result = fertility(REAL / "gemma3", [data_dir / "corpus" / "ms" / "train.jsonl"], run=False)
    assert result.languages["target"]["tokens_per_byte"] == pytest.approx(0.237, abs=5e-4)
    assert result.languages["target"]["bits_per_byte"] is None
    add, reason = result.recommendation["add"], result.recommendation["reason"]
    assert add == 0 and reason.startswith("do not extend: the 95 new tokens that occur 100 times or more"), reason
    assert "would save 8.4% of tokens, below 10%" in reason
    assert [point["added"] for point in result.curve][-1] == 2_533


def test_so_few_bytes_cannot_be_scored(model: Path, korean: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    for scored in (0, -5):
        status, _, error = run("fertility", model, korean, "--scored", scored)
        assert (status, error) == (1, f"lapis: fertility: scored is {scored}; give 1 byte or more\n")


def test_the_curve_is_what_extending_brings(model: Path, korean: Path, tmp_path: Path) -> None:
    result = fertility(model, [korean], run=False)
    learn, held = read_texts([korean])
    (tmp_path / "learn.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in learn))
    size, base = sum(len(text.encode()) for text in held), measure(_shape(model), 128)
    for point in result.curve[1:]:
        out = tmp_path / str(point["added"])
        extend(model, [tmp_path / "learn.jsonl"], out, add=point["added"])
        tokens = sum(map(len, Tokenizer.open(out).encode_batch(held)))
        assert point["tokens_per_byte"] == pytest.approx(tokens / size)
        grown = measure(_shape(out), 128)
        assert point["parameters"] == grown.total - base.total
        assert point["flops_per_byte"] == pytest.approx(grown.flops_per_token * tokens / size)
        assert point["kv_bytes_per_byte"] == pytest.approx(base.kv_cache_bytes / 128 * tokens / size)
    assert [point["added"] for point in result.curve] == sorted({point["added"] for point in result.curve})


def _shape(folder: Path) -> ModelConfig:
    from lapis.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    assert checkpoint.family is not None
    return checkpoint.family.read_config(checkpoint.config)


def test_a_recommendation_is_what_can_be_learned_or_counted() -> None:
    falling = np.linspace(1.0, 0.5, 1001)
    counts = np.array([ENOUGH] * 400 + [COUNTED] * 300 + [COUNTED - 1] * 300)
    assert recommend(Curve(falling, counts))["add"] == 700
    assert (
        "400 of them occur 100 times or more in this text, the others 10 or more"
        in recommend(Curve(falling, counts))["reason"]
    )
    assert recommend(Curve(falling, np.array([ENOUGH] * 1000)))["reason"] == (
        "1,000 new tokens save 50% of tokens; each occurs 100 times or more in this text"
    )
    rare_characters = np.array([5] * 300 + [ENOUGH] * 700)  # which come before all merges
    assert recommend(Curve(falling, rare_characters))["reason"].endswith(
        "; 400 of them occur 100 times or more in this text, the others 5 or more"
    )
    dear = recommend(Curve(falling, np.array([ENOUGH] * 1000), falling + np.linspace(0, 1, 1001)))
    assert dear["add"] == 0 and dear["reason"] == (
        "do not extend: FLOPs per byte are fewest with 0 new tokens, which save 0.0% of tokens, below 10%; rows of "
        "more cost more than shorter text spares"
    )
    few = recommend(Curve(falling, np.array([ENOUGH] * 90 + [COUNTED] * 910)))
    assert few["add"] == 0 and "do not extend" in few["reason"] and "too seldom" in few["reason"]
    none = recommend(Curve(falling, np.array([ENOUGH - 1] * 1000)))
    assert none["reason"].startswith(f"do not extend: no new token occurs {ENOUGH} times in this text, and rarer")
    flat = recommend(Curve(np.linspace(1.0, 0.95, 1001), np.array([1000] * 1000)))
    assert flat["add"] == 0 and "save 5.0% of tokens" in flat["reason"]
    assert recommend(Curve(np.array([1.0]), np.array([], int)))["add"] == 0


def test_the_knee_is_where_the_curve_bends() -> None:
    bend = np.concatenate((np.linspace(1, 0.2, 51), np.linspace(0.2, 0.1, 950)))
    assert knee_of(bend) == 50
    assert knee_of(np.ones(9)) == 0


def test_the_same_documents_are_held_out_each_time(korean: Path, english: Path) -> None:
    assert read_texts([korean]) == read_texts([korean])
    learn, held = read_texts([korean])
    assert sorted(learn + held) == sorted(KOREAN) and sorted(held) == sorted(filter(is_held_out, KOREAN))
    learn, held = read_texts([english])
    assert len(held) >= 1 and sum(map(len, learn + held)) == len(english.read_text())
    with pytest.raises(DataError, match="holds 1 text; give at least 2"):
        one = korean.with_name("one.txt")
        one.write_text("one short text")
        read_texts([one])


def test_no_text_that_is_learned_from_is_held_out(tmp_path: Path) -> None:
    """However often it is there, and whichever side chance has put all of few texts on."""
    learned, chosen = (next(t for t in KOREAN if is_held_out(t) is held) for held in (False, True))
    file = tmp_path / "few.jsonl"
    for text in (learned, chosen):
        write(file, [text] * 10)
        with pytest.raises(DataError, match="holds 1 text; give at least 2"):
            read_texts([file])
    for held in (False, True):
        one, other = [text for text in KOREAN if is_held_out(text) is held][:2]
        write(file, [one, other, one, other])
        learn, kept = read_texts([file, file])
        assert {*learn} | {*kept} == {one, other} and len(learn) == len(kept) == 2, "a file counts once"


def test_replay_of_the_language_itself_is_told(tmp_path: Path, korean: Path) -> None:
    notes = fertility(make(tmp_path / "base", 0), [korean], replay=[korean], run=False).notes
    assert any("100% of the replay documents stand in the target's text, too; replay is text of" in n for n in notes)


def test_a_tokenizer_that_cannot_be_extended_is_measured(tmp_path: Path, korean: Path) -> None:
    words = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *"abc나는오늘"])}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    result = fertility(tmp_path, [korean])
    assert result.curve == [] and result.recommendation["add"] == 0
    assert "WordPiece" in result.recommendation["reason"]


def test_the_command_prints_one_object_and_writes_a_page(
    model: Path, korean: Path, english: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    page = tmp_path / "page.html"
    command = ["fertility", model, korean, "--replay", english, "--against", model]
    status, output, error = run(*command, "--no-run", "--json", "--html", page)
    assert status == 0, error
    result = json.loads(output)
    assert set(result) >= {"languages", "curve", "recommendation", "against"}
    assert set(result["recommendation"]) == {"add", "reason"}
    assert {"added", "tokens_per_byte", "parameters", "flops_per_byte"} <= set(result["curve"][0])
    assert result["against"]["languages"] == result["languages"]
    assert page.read_text() == fertility_page(result).render()


def test_the_page_names_what_is_recommended_and_marks_its_row() -> None:
    figures = {"tokens_per_byte": 0.8, "single_byte_share": 0.5}
    curve = [
        {"added": added, "tokens_per_byte": 0.8 * (1 - saved), "saved": saved, "rarest": 9}
        for added, saved in ((0, 0.0), (2000, 0.6), (9000, 0.75))
    ]
    result = {"model": "m", "languages": {"target": figures}, "curve": curve, "knee": 2000,
              "recommendation": {"add": 2000, "reason": "it pays"}}  # fmt: skip
    page = fertility_page(result).render()
    assert "2,000 more tokens would save 60%" in page
    marked = page.split('<tr class="mark"')
    assert len(marked) == 2 and "2,000" in marked[1].split("</tr>")[0]


def test_texts_are_cut_at_a_character_and_hold_one() -> None:
    assert list(first_bytes(["한국", "어"], 3)) == ["한"]
    assert list(first_bytes(["한국", "어"], 8)) == ["한국", "어"]
    assert list(first_bytes(["한국", "어"], 1)) == ["한"]
    one, other = "a" * 300, "b" * 300
    assert list(first_bytes([one, other], 550)) == [one, "b" * 250]
    assert list(first_bytes([one, other], 350)) == [one], "a scrap of a document is none"
    assert list(first_bytes([one, "b", other], 301)) == [one, "b"]
