"""A card of little: one chat, one document, one model, a chat that does not fit, text without spaces."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lapis.errors import ConfigError
from lapis.language.card.card import make_card
from lapis.language.card.folder import gather, how_made, read_chats
from lapis.language.card.readme import readme
from lapis.language.card.scores import HeldOutText
from lapis.language.extend import extend
from lapis.language.plan import read_plan
from lapis.report.pages.card import card_page, gap_line, spelled, spelled_change, spelled_gap

from .conftest import ENGLISH, MALAY, make, write

ALONE = {"value": 0.5, "interval": [0.5, 0.5], "n": 1}
MANY = {"value": 0.5, "interval": [0.25, 0.75], "n": 3}


def talk(path: Path, *prompts: str) -> Path:
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": "Kucing itu."}] for p in prompts]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


def test_one_alone_has_no_interval() -> None:
    assert spelled("bits_per_byte", ALONE) == "0.500 (no interval)"
    assert spelled_change("stop_rate", ALONE) == ("+50\u00a0points", "no interval")
    assert spelled_gap(ALONE) == ("50%", "no interval") and spelled_gap(MANY) == ("50%", "25% to 75%")
    less = {"value": -0.004, "interval": [-0.5, 0.004], "n": 3}
    assert spelled_gap(less) == ("0%", "−50% to 0%")
    of, way = {"gap": ALONE, "gap_from": "adapted"}, "of the way from adapted to the model that was tuned on chats of"
    assert gap_line(of)[0] == "Gap closed: 50%" and gap_line(of)[1].startswith(f"(no interval; 1 chat) {way}")
    assert gap_line({**of, "gap": MANY})[1].startswith(f"(25% to 75%; 3 chats) {way}")


def test_a_chat_that_does_not_fit_is_no_reply(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", 0)
    chats = read_chats([talk(tmp_path / "chats.jsonl", "Apa itu?", "apa " * 200)])
    card = make_card({"a": folder, "b": folder}, {"target": HeldOutText(MALAY[:4], chats, code="ms")})
    assert [card["scores"]["a"]["target"][key]["n"] for key in ("stop_rate", "in_language", "response_nll")] == [1] * 3
    assert [row["prompt"] for row in card["replies"]] == ["Apa itu?"]
    page, text = card_page(card).render(), readme(card)
    assert "no interval %" not in page and "no interval; 1 chat" in page and "(no interval; 1 chat)" in text


def test_text_without_spaces_is_gone_on_with_from_its_beginning() -> None:
    longest, spaced = HeldOutText(["今天天气很好我们去公园散步吧" * 100, MALAY[0]]).prompts()
    assert len(longest) == 80 and spaced == " ".join(MALAY[0].split()[:8])


def test_snippets_of_no_distilled_rows_are_refused(tmp_path: Path) -> None:
    base, text = make(tmp_path / "base", 0), write(tmp_path / "ms.jsonl", MALAY)
    with pytest.raises(ConfigError, match="snippets are what distilled rows are trained on; give init distilled"):
        extend(base, [text], tmp_path / "out", add=5, snippets=7)


def test_a_card_of_one_model_compares_nothing(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    base, text = make(tmp_path / "base", 0), write(tmp_path / "ms.jsonl", MALAY[:4])
    status, output, error = run("card", base, "--text", text, "--out", tmp_path / "card")
    assert status == 0, error
    assert "base to base" not in output and "won: not known; there is one model only" in output
    written = (tmp_path / "card" / "README.md").read_text()
    assert "from base to base" not in written and "Made by lapis" in written
    assert "from base to base" not in (tmp_path / "card" / "index.html").read_text()


def test_chats_of_replay_without_its_text_are_refused(tmp_path: Path) -> None:
    base, text = make(tmp_path / "base", 0), write(tmp_path / "ms.jsonl", MALAY[:4])
    chats = [talk(tmp_path / "chats.jsonl", "What?")]
    for key, option in (("replay_chats", "--replay-chats"), ("replay_choices", "--replay-choices")):
        with pytest.raises(ConfigError, match=f"card: {option} is measured beside replay text, and there is none; "):
            gather([base], {"text": [text], key: chats}, 1000)
    replay = write(tmp_path / "en.jsonl", ENGLISH[:4])
    assert (
        len(gather([base], {"text": [text], "replay": [replay], "replay_chats": chats}, 1000).held["replay"].chats) == 1
    )


def test_an_adaptation_that_is_not_finished_is_told(tmp_path: Path) -> None:
    plan = {"base": str(make(tmp_path / "base", 0)), "text": ["t"], "out": str(tmp_path / "ko"), "vocab": 0}
    (tmp_path / "ko" / "measure").mkdir(parents=True)
    (tmp_path / "ko" / "plan.yaml").write_text(yaml.safe_dump(plan))
    text = {"text": [write(tmp_path / "ms.jsonl", MALAY[:4])]}
    assert gather([tmp_path / "ko"], text, 1000).notes == {"ko": ["is not finished: it has no adapted yet"]}
    (tmp_path / "ko" / "adapted").mkdir()
    assert gather([tmp_path / "ko"], text, 1000).notes == {}


def test_an_adaptation_has_its_name_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make(tmp_path / "base", 0)
    (tmp_path / "malay").mkdir()
    monkeypatch.chdir(tmp_path / "malay")
    plan = read_plan({"base": str(base), "text": ["t"], "out": ".", "vocab": 0})
    assert how_made(Path(), plan)["title"] == "malay"
