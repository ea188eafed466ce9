"""What a tour is measured on: held-out chats and text from all over their files, which are often sorted by source."""

import json
from pathlib import Path
from typing import Any

import pytest

from lapis.tour import measure
from lapis.tour.material import Material, evenly


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def sorted_material(tmp_path: Path) -> Material:
    """Held-out files that begin with one kind and end with another, in both languages."""
    for code in ("en", "ms"):
        kinds = ["plain"] * 40 + ["odd"] * 40
        talks = [[("user", f"{kind} {i}?"), ("assistant", kind)] for i, kind in enumerate(kinds)]
        chats = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
        texts = [{"text": "\n\n".join(f"{kind} {i} {part} " + "x" * 400 for part in range(20))}
                 for i, kind in enumerate(["plain"] * 6 + ["odd"] * 6)]  # fmt: skip
        for name in (code, f"{code}.valid"):
            write(tmp_path / "instruct" / f"{name}.jsonl", chats)
        for name in ("train", "valid"):
            write(tmp_path / "corpus" / code / f"{name}.jsonl", texts)
    return Material(tmp_path, "ms")


@pytest.mark.parametrize("share", [0.06, 0.2])
def test_a_little_held_out_material_is_of_all_kinds(sorted_material: Material, share: float) -> None:
    for half in measure.held_out_halves(sorted_material, share, least=6):
        for code in ("en", "ms"):
            said = [chat.messages[1]["content"] for chat in half.chats[code]]
            assert said.count("odd") == pytest.approx(len(said) / 2, abs=1) and len(said) >= 6
            assert len({prompt.text for prompt in half.prompts[code]}) == len(said)
    texts = [text for half in measure.held_out_halves(sorted_material, share, least=6) for text in half.texts["en"]]
    assert {text.split()[0] for text in texts} == {"plain", "odd"} and len(set(texts)) == len(texts)


def test_each_half_has_text_where_few_pieces_are_short_enough(tmp_path: Path) -> None:
    long = [{"text": "y" * 9000} for _ in range(30)]
    for code in ("en", "ms"):
        write(tmp_path / "instruct" / f"{code}.valid.jsonl", [])
        write(tmp_path / "corpus" / code / "train.jsonl", long)
        write(tmp_path / "corpus" / code / "valid.jsonl", [*long, {"text": "one " * 99}, {"text": "two " * 99}])
    write(tmp_path / "instruct" / "en.jsonl", [])
    halves = Material(tmp_path, "ms").held_out_texts("ms", 2400)
    assert [[text[:3] for text in half] for half in halves] == [["one"], ["two"]]


def test_evenly() -> None:
    assert evenly(range(12), 5) == [0, 2, 4, 7, 9] and evenly("abc", 5) == ["a", "b", "c"]
    assert evenly("", 3) == [] and evenly("abc", 0) == []
