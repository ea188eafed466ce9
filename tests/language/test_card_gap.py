"""The gap begins at one model for all ways that are compared: the first that was adapted without chat."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapis.language.card import card as card_module
from lapis.language.card.bootstrap import Counts
from lapis.language.card.card import make_card
from lapis.language.card.folder import gap_start, gather
from lapis.language.card.readme import readme
from lapis.language.card.scores import HeldOutText, Measured
from lapis.report.pages.card import card_page

from .conftest import MALAY, make, write
from .test_card_few import talk


def adaptation(folder: Path, onto: str, *steps: str) -> Path:
    """A folder of `lapis adapt` with steps that hold nothing."""
    for step in ("measure", *steps):
        (folder / step).mkdir(parents=True)
    plan = {"base": "b", "chat": "c", "text": ["t"], "out": "o", "onto": onto, "vocab": 20}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder


@pytest.mark.parametrize(
    ("models", "begins"),
    [
        ({"base": "b", "start": "ms/start", "adapted": "ms/adapted", "grafted": "ms/grafted"}, "adapted"),
        ({"adapted": "ms/adapted", "calibrated": "ms/calibrated", "grafted": "ms/grafted"}, "calibrated"),
        ({"calibrated": "ms/calibrated", "adapted": "ms/adapted", "restored": "elchat/restored"}, "calibrated"),
        (
            {"adapted": "ms/adapted", "merged": "ms/merged", "grafted": "ms/grafted",
             "elchat/adapted": "elchat/adapted", "elchat/merged": "elchat/merged", "restored": "elchat/restored"},
            "merged",
        ),
        (
            {"adapted": "elchat/adapted", "restored": "elchat/restored", "ms/adapted": "ms/adapted",
             "grafted": "ms/grafted"},
            "ms/adapted",
        ),
        ({"adapted": "ms/adapted", "ko/adapted": "ko/adapted", "ko/calibrated": "ko/calibrated"}, "adapted"),
        ({"base": "ms/adapted", "adapted": "elchat/adapted", "restored": "elchat/restored"}, ""),
        ({"restored": "elchat/restored"}, ""),
        ({"base": "b", "mine": "mine"}, None),
        ({"base": "b", "adapted": "flow/adapted", "elchat": "flow/elchat"}, "adapted"),
    ],
)  # fmt: skip
def test_a_gap_begins_at_the_first_model_without_chat(
    models: dict[str, str], begins: str | None, tmp_path: Path
) -> None:
    steps = ("start", "adapted", "merged", "calibrated")
    adaptation(tmp_path / "ms", "base", *steps, "grafted")
    adaptation(tmp_path / "ko", "base", *steps)
    adaptation(tmp_path / "elchat", "chat", *steps, "restored")
    assert gap_start({name: tmp_path / place for name, place in models.items()}) == begins


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """closed(models, from) -> their card; a folder is how many bits of a byte its model needs, tuned's needs 1."""

    def measured(folder: float, *_: object) -> Measured:
        counts = {key: Counts([folder] * 2, [1.0] * 2) for key in ("bits_per_byte", "response_bits_per_byte")}
        return Measured({"target": counts}, {"target": []})

    def card(models: Mapping[str, Any], begin: str | None, tuned: Any = 1.0) -> dict[str, Any]:
        return make_card(models, {"target": HeldOutText(MALAY[:5])}, tuned=tuned, gap_from=begin)

    monkeypatch.setattr(card_module, "score_model", measured)
    monkeypatch.setattr(card_module, "time_models", lambda *_: None)
    monkeypatch.setattr(card_module, "_templates", lambda _: {})
    return card


def test_both_ways_have_their_gap_in_one_table(closed: Callable[..., dict[str, Any]]) -> None:
    graft = {"base": 4.0, "adapted": 2.0, "merged": 3.0, "grafted": 2.5}
    both = {**graft, "elchat/adapted": 2.0, "elchat/restored": 1.5}
    card = closed(both, "merged")
    shares = {name: gap["value"] for name, gap in card["gaps"].items()}
    wanted = {"base": -0.5, "adapted": 0.5, "grafted": 0.25, "elchat/adapted": 0.5, "elchat/restored": 0.75}
    assert shares == pytest.approx(wanted) and card["gap_from"] == "merged"
    assert card["gap_closed"] == 0.75 and card["gap"] == card["gaps"]["elchat/restored"]
    assert closed(graft, "merged")["gap_closed"] == shares["grafted"]
    page, text = card_page(card).render(), readme(card)
    for shown in (page, text):
        assert "75%" in shown and "of the way from merged to the model that was tuned on chats" in shown
        assert shown.count("25% (25% to 25%)") == 1 and shown.count("−50% (−50% to −50%)") == 1


@pytest.mark.parametrize(
    ("models", "begin", "why"),
    [
        ({"base": 4.0, "adapted": 2.0}, "adapted", "there is no step after the adaptation"),
        ({"base": 4.0}, None, "there is no step after the adaptation"),
        ({"adapted": 2.0, "restored": 1.5}, "", "adapted without chat, and there is none among these; name the folder"),
        ({"adapted": 1.0, "grafted": 0.5}, "adapted", "tuned finds the replies no likelier than adapted does"),
    ],
)
def test_a_gap_that_nobody_knows_has_its_reason(
    models: dict[str, float], begin: str | None, why: str, closed: Callable[..., dict[str, Any]]
) -> None:
    card = closed(models, begin)
    assert card["gap_closed"] is None and why in card["reasons"]["gap_closed"]


def test_a_gap_without_a_common_chat_is_not_known() -> None:
    key = "response_bits_per_byte"
    one, other = {"target": {key: Counts([2.0, 0.0], [1.0, 0.0])}}, {"target": {key: Counts([0.0, 1.0], [0.0, 1.0])}}
    gaps, why = card_module._gaps_closed({"adapted": one, "grafted": one, "tuned": other}, "adapted", "grafted")
    assert not gaps and why == "no chat of the language fits into the contexts of adapted, grafted and tuned alike"


def test_a_gap_is_told_where_it_begins(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    for seed, name in enumerate(("adapted", "mine", "tuned")):
        make(tmp_path / name, seed)
    text, chats = write(tmp_path / "ms.jsonl", MALAY[:4]), talk(tmp_path / "chats.jsonl", "Apa itu?", "Apa?")
    places = [tmp_path / "adapted", tmp_path / "mine"]
    assert gather(places, {"text": [text]}, 800).gap_from == "adapted"
    status, output, error = run(
        "card", *places, "--tuned", tmp_path / "tuned", "--text", text, "--chats", chats, "--out", tmp_path / "card"
    )
    assert status == 0, error
    assert "% of the way from adapted to tuned\n" in output
