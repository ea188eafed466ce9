"""Time left, the size of a story, and the result in words: what a newcomer reads before any figure."""

import time
from itertools import pairwise

import pytest

from lapis.tour.clock import Clock, TourLines, spelled
from lapis.tour.page import advice, sentence
from lapis.tour.setup.size import RUNS, StorySize


class RecordingScreen:
    """A screen that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shares: list[float] = []

    def note(self, text: str, heading: bool = False) -> None:
        self.lines.append(text)

    def at(self, share: float, said: str) -> None:
        self.shares.append(share)
        self.lines.append(said)

    def close(self) -> None:
        pass


def test_time_left_follows_from_the_pace_and_falls_to_nothing() -> None:
    screen = RecordingScreen()
    clock = Clock({"base": 3000.0, "chat": 1000.0}, 1000.0, screen)
    assert clock.seconds_left == pytest.approx(4.0)
    clock.begin("base", "base: read")
    time.sleep(0.05)
    clock.at(0.5, "loss 1")
    assert clock.seconds_left < 4.0
    clock.begin("chat", "chat: talk")
    assert clock.seconds_left == pytest.approx(1000 / clock.pace)
    clock.end()
    assert clock.seconds_left == 0 and screen.shares == sorted(screen.shares) and screen.shares[-1] == 1
    assert "base: read" in screen.lines and any("loss 1" in line and "left" in line for line in screen.lines)


def test_a_machine_that_becomes_slower_is_told_so() -> None:
    clock = Clock({"base": 1000.0}, 1000.0, RecordingScreen())
    clock.begin("base", "base")
    for step in range(1, 6):
        time.sleep(0.02)  # 50 tokens a second
        clock.at(step / 1000)
    assert clock.pace < 1000
    assert clock.seconds_left < 3, "a slow beginning is not taken for the pace of the whole"


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    lines = TourLines(seconds=0.02)
    for share in range(10):
        lines.at(share / 10, f"at {share}")
    assert capsys.readouterr().err == ""
    time.sleep(0.03)
    lines.at(1.0, "at the end")
    assert capsys.readouterr().err == "  at the end\n"
    assert [spelled(seconds) for seconds in (0.4, 61, 3601)] == ["0:00", "1:01", "60:01"]


def test_the_size_of_a_story_is_a_function_of_its_minutes_alone() -> None:
    full = StorySize.of(5, real=False)
    assert dict(full.tokens) == RUNS and full == StorySize.of(5, real=False)
    sizes = [StorySize.of(minutes, real=False) for minutes in (0.1, 1, 2, 5, 10)]
    for smaller, larger in pairwise(sizes):
        assert all(smaller.tokens[run] <= larger.tokens[run] for run in RUNS)
        assert smaller.people <= larger.people and smaller.held_out <= larger.held_out
        assert smaller.chats <= larger.chats
    for size in sizes:
        assert size.tokens["chat"] == size.tokens["tuned"], "both tunings see as much"
        assert set(size.work) >= set(RUNS) | {"world", "tokenizer", "sweep", "measuring"}


def result(chat: float, tuned: float, grafted: float, target: float, yardstick: float) -> dict[str, object]:
    def part(english: float | None, malay: float | None) -> dict[str, dict[str, float | None]]:
        return {"en": {"answers": english}, "ms": {"answers": malay}}

    return {
        "languages": ["en", "ms"], "names": {"en": "English", "ms": "Malay"}, "minutes": 5.0,
        "tokens": {"base": 2_000_000, "chat": 1_000_000}, "gap_closed": {"en": 0.5, "ms": 0.25}, "cost": 0.1,
        "scores": {
            "adapted": part(0.0, 0.0), "chat": part(chat, 0.0), "tuned": part(tuned, 0.05),
            "grafted": part(grafted, target), "yardstick": part(0.0, yardstick),
        },
    }  # fmt: skip


def test_few_answers_have_a_reason_and_a_remedy() -> None:
    good = result(0.85, 0.9, 0.7, 0.28, 0.6)
    said = sentence(good)
    assert "Malay" in said and "28 of 100" in said and "60 when tuned on Malay chats" in said and "70 of 100" in said
    assert advice(good) == ""
    for short in (result(0.1, 0.1, 0.05, 0.01, 0.1), result(0.85, 0.9, 0.7, 0.1, 0.3)):
        assert "lapis tour --minutes 10" in advice(short)
    assert "lapis plan" in advice(result(0.85, 0.9, 0.3, 0.1, 0.6))
    far = advice(result(0.9, 0.9, 0.9, 0.0, 0.57))  # as a tour to Chinese ends
    assert "reaches Malay little" in far and "with them it is 57" in far and "lapis train" in far


def test_real_text_is_told_by_likelihood() -> None:
    real = result(0.0, 0.0, 0.0, 0.0, 0.0)
    for part in real["scores"].values():  # type: ignore[attr-defined]
        part["en"]["answers"] = part["ms"]["answers"] = None
    for name, nll in (("adapted", 2.0), ("tuned", 1.0)):
        real["scores"][name]["ms"]["response_nll"] = nll  # type: ignore[index]
    assert "25% in Malay and 50% in English of the way" in sentence(real) and advice(real) == ""
    real["scores"]["tuned"]["ms"]["response_nll"] = 1.99  # type: ignore[index]
    assert "Tuning on the chats changed little (2.00 to 1.99 nats" in advice(real)
