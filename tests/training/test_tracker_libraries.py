"""Weights & Biases and Trackio, played by modules with their signatures and their manners: what reaches them, and what
a run does where they fail at their start, on the way, or are not installed."""

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lapis.errors import MissingExtra, OutputError
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.result import TrainResult

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=6, batch=4, lr=1e-2, warmup=2, log_every=2, precision="float32", threads=1, sample_every=0, compile="off",
    save_every=2, eval_every=3,
)  # fmt: skip
RESERVED = ("project", "run", "timestamp", "step", "time", "metrics")  # Trackio's own names


class Library:
    """What both have: runs by id or name, with all that came, and what may go wrong."""

    name = ""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.opened: list[dict[str, Any]] = []
        self.finished = 0
        self.ignored: list[int] = []  # steps that came too late
        self.current: str | None = None
        self.refuses: str = ""  # with which error `init` ends
        self.breaks_at = 0  # the step from which `log` raises
        module = ModuleType(self.name)
        module.__spec__ = ModuleSpec(self.name, None)
        module.init, module.log, module.finish = self.init, self.log, self.finish  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, self.name, module)

    def init(self, **given: Any) -> Any:
        raise NotImplementedError

    def open(self, key: str, given: dict[str, Any]) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        print(f"{self.name}: initialized")  # to standard output, as Trackio does
        self.opened.append(given)
        self.current = key
        self.runs.setdefault(key, [])

    def log(self, values: dict[str, float], step: int) -> None:
        assert self.current is not None and not {*values} & {*RESERVED}
        if self.breaks_at and step >= self.breaks_at:
            raise ConnectionError("the server is gone\nand more")
        self.runs[self.current].append((step, dict(values)))

    def finish(self) -> None:
        assert self.current is not None
        self.finished, self.current = self.finished + 1, None

    @property
    def only(self) -> list[tuple[int, dict[str, float]]]:
        """What came of the one run."""
        (sent,) = self.runs.values()
        return sent


class Wandb(Library):
    name = "wandb"

    def init(self, *, project: str, name: str, dir: str, id: str, resume: str, config: dict[str, Any]) -> Any:
        assert (project, resume) == ("lapis", "allow") and not {*id} & {*"/\\#?%:"} and Path(dir).is_dir() and config
        self.open(id, {"name": name, "id": id})
        return self

    def log(self, data: dict[str, float], step: int) -> None:
        assert self.current is not None
        if self.runs[self.current] and step < self.runs[self.current][-1][0]:
            self.ignored.append(step)  # "Steps must be monotonically increasing, so this data will be ignored"
            return
        super().log(data, step)


class Trackio(Library):
    name = "trackio"

    def init(self, *, project: str, name: str, resume: str, config: dict[str, Any]) -> Any:
        assert (project, resume) == ("lapis", "allow") and not any(key.startswith("_") for key in config)
        self.open(name, {"name": name, "id": name})
        return self


@pytest.fixture(params=[Wandb, Trackio])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    return request.param(monkeypatch)  # type: ignore[no-any-return]


class Notes(Silent):
    """Remembers notes, and ends the run from within at an entry of a step. aside: called at the first step."""

    def __init__(self, ends_at: int = 0, aside: Callable[[], None] = lambda: None) -> None:
        self.notes: list[str] = []
        self.ends_at, self.aside = ends_at, aside

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, row: Any) -> None:
        if row["step"] == 1:
            self.aside()

    def row(self, row: Any) -> None:
        if row["step"] == self.ends_at:
            raise InterruptedError


@pytest.fixture
def go(new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains into tmp_path/out."""

    def go(library: Library, watch: Notes, config: TrainConfig = CONFIG, **more: Any) -> TrainResult:
        objective = Causal(tokenizer, documents, context=32, valid=0.1)
        config = replace(config, track=config.track or (library.name,))
        return train(new_model(), objective, config, tmp_path / "out", watch=watch, **more)

    return go


def test_every_number_comes_once_and_in_order(library: Library, go: Any, capfd: pytest.CaptureFixture[str]) -> None:
    result = go(library, watch := Notes())
    assert [row["step"] for row in result.log] == [2, 3, 4, 6] and not library.ignored and library.finished == 1
    losses = {step: values["loss"] for step, values in library.only if "loss" in values}
    assert losses == {row["step"]: row["loss"] for row in result.log}
    held_out = {step: values["held_out/valid_loss"] for step, values in library.only if "loss" not in values}
    assert held_out == {row["step"]: row["held_out"]["valid_loss"] for row in result.log if "held_out" in row}
    assert library.opened[0]["name"].startswith("out") and not any("failed" in note for note in watch.notes)
    assert capfd.readouterr().out == ""  # which is for the result of a command alone


def test_one_that_cannot_start_ends_no_run(library: Library, go: Any, tmp_path: Path) -> None:
    library.refuses = "No API key configured. Use `wandb login`.\nSee the docs"
    result = go(library, watch := Notes())
    assert result.steps == 6 and (tmp_path / "out" / "model.safetensors").exists()
    assert [note for note in watch.notes if "failed" in note] == [
        f"train: {library.name} failed (No API key configured. Use `wandb login`.); the run goes on without it"
    ]


def test_one_that_breaks_on_the_way_ends_no_run(library: Library, go: Any) -> None:
    library.breaks_at = 4
    result = go(library, watch := Notes())
    assert result.steps == 6 and {step for step, _ in library.only} == {2, 3}
    assert [note for note in watch.notes if "failed" in note] == [
        f"train: {library.name} failed (the server is gone); the run goes on without it"
    ]


def test_a_run_that_goes_on_is_the_same_one_there(library: Library, go: Any) -> None:
    with pytest.raises(InterruptedError):
        go(library, Notes(ends_at=4))
    assert library.finished == 1 and {step for step, _ in library.only} == {2, 3}
    result = go(library, Notes())
    assert len(library.opened) == 2 and len(library.runs) == 1
    assert {step for step, _ in library.only} == {row["step"] for row in result.log} == {2, 3, 4, 6}


def test_two_trackers_go_on_with_one_run_each(monkeypatch: pytest.MonkeyPatch, go: Any) -> None:
    both, config = (Wandb(monkeypatch), Trackio(monkeypatch)), replace(CONFIG, track=("wandb", "trackio"))
    with pytest.raises(InterruptedError):
        go(None, Notes(ends_at=4), config)
    go(None, Notes(), config)
    assert [(len(library.opened), len(library.runs)) for library in both] == [(2, 1), (2, 1)]


def test_a_run_that_starts_anew_is_another_one_there(library: Library, go: Any) -> None:
    """In the same place: a finished run would take none of its steps, since they are lower."""
    with pytest.raises(InterruptedError):
        go(library, Notes(ends_at=4))
    go(library, Notes(), fresh=True)
    go(library, Notes(), overwrite=True)
    assert [{step for step, _ in sent} for sent in library.runs.values()] == [{2, 3}, {2, 3, 4, 6}, {2, 3, 4, 6}]
    assert not library.ignored


def test_a_run_that_is_refused_opens_none(library: Library, go: Any) -> None:
    """A second one in the same place, while the first is at work; and one with other settings."""

    def second() -> None:
        with pytest.raises(OutputError, match="out"):
            go(library, Notes())

    with pytest.raises(InterruptedError):
        go(library, Notes(4, second))
    assert len(library.opened) == 1
    with pytest.raises(Exception, match="differs"):
        go(library, Notes(), replace(CONFIG, lr=1.0))
    assert len(library.opened) == 1


def test_a_missing_one_is_told_before_anything(library: Library, go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library.name, None)
    with pytest.raises(MissingExtra, match=rf"^track: {library.name} is not installed; pip install 'lapis\[track\]'$"):
        go(library, Notes())
