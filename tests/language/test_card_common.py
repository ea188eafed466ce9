"""Models whose contexts hold different chats: changes, and the gap, are of what all sides were measured on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapis.language.card.bootstrap import Counts, change, difference, ratio, share_of_way
from lapis.language.card.card import make_card
from lapis.language.card.folder import read_chats
from lapis.language.card.readme import readme
from lapis.language.card.scores import HeldOutText
from lapis.language.extend import extend
from lapis.report.pages.card import card_page

from .conftest import MALAY, make, write
from .test_card_few import talk


def test_a_change_is_of_documents_that_both_sides_have() -> None:
    before, after = Counts([10.0, 0.0], [10.0, 0.0]), Counts([9.0, 40.0], [10.0, 10.0])
    less = change(before, after)
    assert less["value"] == pytest.approx(-0.1) and less["n"] == 1
    assert less["interval"] == pytest.approx([-0.1, -0.1])
    assert (less["before"], less["after"]) == pytest.approx((1.0, 0.9))
    assert change(after, before)["value"] == pytest.approx(1 / 0.9 - 1)
    assert difference(before, after)["value"] == pytest.approx(-0.1)
    assert difference(before, after)["interval"] == pytest.approx([-0.1, -0.1])


def test_a_way_is_of_documents_that_all_three_have() -> None:
    start = Counts([10.0, 20.0, 99.0, 0.0], [10.0, 10.0, 10.0, 0.0])
    reached = Counts([8.0, 16.0, 0.0, 7.0], [10.0, 10.0, 0.0, 10.0])
    end = Counts([6.0, 12.0, 1.0, 1.0], [10.0, 10.0, 10.0, 10.0])
    way = share_of_way(start, reached, end)
    assert way["value"] == pytest.approx(0.5) and way["interval"] == pytest.approx([0.5, 0.5]) and way["n"] == 2
    assert np.isnan(share_of_way(end, reached, start)["value"]) and share_of_way(end, reached, start)["n"] == 2


def test_an_interval_is_that_of_the_common_documents() -> None:
    rng = np.random.default_rng(2)
    numbers = rng.uniform(1, 9, (2, 20))
    kept = np.arange(20) % 3 > 0
    old, new = (Counts(list(row[kept]), [1.0] * int(kept.sum())) for row in numbers)
    whole = Counts(list(numbers[0]), [1.0] * 20)
    lacking = Counts(list(numbers[1] * kept), list(kept.astype(float)))
    assert change(whole, lacking) == change(old, new) and difference(whole, lacking) == difference(old, new)
    assert ratio(lacking) == ratio(new)
    none = change(Counts([1.0, 0.0], [1.0, 0.0]), Counts([0.0, 1.0], [0.0, 1.0]))
    assert np.isnan(none["value"]) and none["n"] == 0


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base that has no room for the longest of three chats, and the same with more tokens, which has."""
    place = tmp_path_factory.mktemp("common")
    base = make(place / "base", 0)
    extend(base, [write(place / "ms.jsonl", MALAY)], place / "start", add=60)
    chats = read_chats(
        [talk(place / "chats.jsonl", "Apa itu?", "Kucing?", "kanak-kanak itu bermain di dalam taman setiap hari")]
    )
    held = {"target": HeldOutText(MALAY[:4], chats, code="ms")}
    return make_card({"base": base, "start": place / "start"}, held, tuned=place / "start")


def test_a_longer_chat_is_told_and_changes_no_change(card: dict[str, Any]) -> None:
    of = {name: card["scores"][name]["target"]["response_bits_per_byte"] for name in ("base", "start")}
    assert (of["base"]["n"], of["start"]["n"]) == (2, 3)
    changed = card["changes"]["start"]["target"]["response_bits_per_byte"]
    assert changed["n"] == 2 and changed["before"] == of["base"]["value"] and changed["after"] != of["start"]["value"]
    assert changed["value"] == pytest.approx(changed["after"] / changed["before"] - 1)
    assert card["notes"]["base"] == ["1 chat of target is longer than its context and was left out"]
    page = card_page(card).render()
    assert f"{changed['before']:.3f} → {changed['after']:.3f}; " in page
    for text in (page, readme(card)):
        assert "2–3 chats" in text and "were measured on different numbers" in text


def test_a_model_without_ids_for_a_prompt_says_nothing(tmp_path: Path) -> None:
    """So that the replies of all models stand beside the same prompts."""
    folder = make(tmp_path / "model", 0)
    card = make_card({"a": folder, "b": folder}, {"target": HeldOutText([" \n ", *MALAY[:3]])})
    assert [row["prompt"] for row in card["replies"]] == [" ".join(text.split()[:8]) for text in MALAY[:3]]
    assert card["scores"]["a"]["target"]["in_language"]["n"] == 3
