"""What is looked at and measured is of all files, whatever their order: no file stands for the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lapis.language.adapt import adapt
from lapis.language.card.folder import gather, read_chats
from lapis.language.extend import extend
from lapis.language.fertility import fertility
from lapis.language.inputs import check_inputs
from lapis.language.plan import read_plan
from lapis.language.texts import first_bytes, from_each, read_texts, spread
from lapis.text.corpus import corpus

from .conftest import ENGLISH, MALAY, STEP, make, write
from .test_card_few import talk


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Files of as many documents that tell by their first letter where they are from."""
    return [
        write(tmp_path / f"{name}.jsonl", [f"{name} {n} {text}" for n, text in enumerate(MALAY * 2)]) for name in "AB"
    ]


def shares(texts: list[str]) -> float:
    """Which share of the bytes is of file A."""
    sizes = {name: sum(len(text.encode()) for text in texts if text[0] == name) for name in "AB"}
    return sizes["A"] / sum(sizes.values())


def test_held_out_documents_are_of_all_files(two: list[Path]) -> None:
    learn, held = read_texts(two)
    assert sorted(held) == sorted(read_texts(two[:1])[1] + read_texts(two[1:])[1])
    assert held == read_texts(two[::-1])[1] == spread(held) and learn[0][0] == "A", "learned from in their order"
    part = list(first_bytes(held, sum(len(text) for text in held) // 2))
    assert 0.3 < shares(part) < 0.7
    _, held = read_texts(two, 30_000)
    assert {text[0] for text in held} == {"A", "B"} and held == read_texts(two[::-1], 30_000)[1]


def test_so_many_bytes_are_of_each_file_by_its_size(tmp_path: Path, two: list[Path]) -> None:
    whole = [document.text for document in corpus.documents(two)]
    assert list(from_each(two, 10**7)) == list(from_each(two, None)) == list(from_each([*two, two[0]], None)) == whole
    some = list(from_each(two, 10_000))
    assert 9_500 <= sum(len(text.encode()) for text in some) <= 10_001 and abs(shares(some) - 0.5) < 0.05
    large = write(tmp_path / "C.jsonl", [text.replace("A", "B", 1) for text in whole * 2])
    assert shares(list(from_each([two[0], large], 20_000))) == pytest.approx(0.2, abs=0.03)
    assert {text[0] for text in from_each([tmp_path], 9_000)} == {"A", "B"}


def test_an_adaptation_is_measured_on_all_its_files(plan: Callable[..., dict[str, Any]], two: list[Path]) -> None:
    held = []
    for number, files in enumerate((two, two[::-1])):
        out = Path(plan()["out"]).with_name(f"out{number}")
        settings = plan(text=[str(file) for file in files], chat=None, chats=[], vocab=0, card=False, tokens=2 * STEP)
        folder = Path(adapt({**settings, "out": str(out), "language": "", "scored": 1500})["steps"]["measure"])
        held.append([document.text for document in corpus.documents(folder / "text.held.jsonl")])
    assert held[0] == held[1] and 0.2 < shares(held[0]) < 0.8


def test_bits_of_all_files_are_those_of_any_order(tmp_path: Path, two: list[Path]) -> None:
    model = make(tmp_path / "model", 0)
    one, other = (fertility(model, files, scored=800).languages["target"] for files in (two, two[::-1]))
    assert one["bits_per_byte"] == other["bits_per_byte"] and one["scored_bytes"] == other["scored_bytes"]


def test_a_card_measures_all_texts_and_chats_given(tmp_path: Path, two: list[Path]) -> None:
    model = make(tmp_path / "model", 0)
    one, other = (gather([model], {"text": files}, 3000).held["target"].texts for files in (two, two[::-1]))
    assert one == other and 0.3 < shares(list(one)) < 0.7
    chats = [talk(tmp_path / f"chats{name}.jsonl", *(f"{name} {n}" for n in range(count))) for name, count in
             (("A", 40), ("B", 40), ("C", 3))]  # fmt: skip
    prompts = [chat.messages[0]["content"] for chat in read_chats(chats)]
    assert len(prompts) == 32 and [prompt[0] for prompt in prompts].count("A") in (14, 15)
    assert prompts[:4] == ["A 0", "B 0", "C 0", "A 1"]
    assert [chat.messages for chat in read_chats(chats[::-1])] == [chat.messages for chat in read_chats(chats)]
    assert [chat.messages[0]["content"] for chat in read_chats(chats[:1])] == [f"A {n}" for n in range(32)]


def test_a_second_file_of_another_language_is_told(
    plan: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.language.inputs.READ", 9_000)
    english = write(tmp_path / "english.jsonl", ENGLISH[300:512])
    settings = plan(text=[str(tmp_path / "ms.jsonl"), str(english)], vocab=0)
    notes = check_inputs(read_plan(settings), tmp_path / "out")
    assert any("of the documents look like ms; the rest is another language" in note for note in notes), notes


def test_tokens_per_byte_are_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.language.extend.SAMPLE", 2_000)
    model = make(tmp_path / "model", 0)
    paths = [write(tmp_path / "ms.jsonl", MALAY), write(tmp_path / "en.jsonl", ENGLISH)]
    one, other = (extend(model, files, tmp_path / f"out{i}", add=20, replay=files).to_json() for i, files in
                  enumerate((paths, paths[::-1])))  # fmt: skip
    assert one["tokens_per_byte"] == pytest.approx(other["tokens_per_byte"])
    assert one["replay_changed"] == pytest.approx(other["replay_changed"])
