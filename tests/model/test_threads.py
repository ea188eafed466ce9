"""How many threads compute: the user's number, or the faster one as it was measured."""

import time
from collections.abc import Iterator

import pytest
import torch

from lapis.cli.main import main
from lapis.model import threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("slow", [1, 2])
def test_the_faster_count_is_taken(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products take longer with one of the counts, as they do where threads wait for each other."""

    def waiting(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if torch.get_num_threads() == slow:
            time.sleep(0.02)
        return x

    monkeypatch.setattr("torch.nn.functional.linear", waiting)
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    assert threads.choose_threads(CPU) == 3 - slow and torch.get_num_threads() == 2
    threads.settle_threads(CPU)
    assert torch.get_num_threads() == 3 - slow


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_what_the_user_set_is_kept_and_nothing_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(counts: list[int]) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr(threads, "fastest", never)
    for setting in threads.SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv(name, "2")
    torch.set_num_threads(2)
    assert threads.thread_counts() == [2] and threads.thread_counts(1) == [1]
    threads.settle_threads(CPU)
    assert torch.get_num_threads() == 2
    monkeypatch.delenv(name)
    threads.settle_threads(torch.device("cuda"))  # a GPU computes: nothing to measure
    assert torch.get_num_threads() == 2


def test_a_measurement_leaves_no_trace() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with threads.threads(1):
        assert threads.fastest([2, 1]) in (1, 2) and torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("command", [
    ["eval", "none", "--text", "t.txt"], ["lens", "none", "words"], ["generate", "none", "words"], ["chat", "none"],
    ["classify", "none", "words"], ["plan", "--base", "none", "--chat", "none", "--chats", "c.jsonl"],
])  # fmt: skip
def test_commands_that_compute_settle_their_threads(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run up to where it does so, which is before it opens a folder."""

    class Settled(BaseException):
        pass

    def settle(device: torch.device) -> None:
        raise Settled

    monkeypatch.setattr(threads, "settle_threads", settle)
    with pytest.raises(Settled):
        main(command)
