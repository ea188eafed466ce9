"""A tour, from settings to page: claims a folder, makes or opens the material, runs the story, writes its findings.

A part whose file is there is not done again, so a tour that was stopped goes on. Leaves out: the story (recipe.py).
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint.commit import commit, commit_file
from lapis.checkpoint.staging import disk_errors, is_made, try_lock
from lapis.errors import ConfigError, OutputError
from lapis.model.threads import threads
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.tour.clock import Clock, on_terminal, spelled
from lapis.tour.material import ENGLISH, Material, write_world
from lapis.tour.page import page
from lapis.tour.recipe import Story
from lapis.tour.setup import machine
from lapis.tour.setup.size import CONTEXT, StorySize
from lapis.tour.world import LANGUAGES, World

LEAST_MINUTES, MOST_MINUTES = 0.1, 10_000.0  # below, no held-out text is left to score
SECONDS = ".seconds"  # the note of how long all sittings took together
TOKENIZER_CHARACTERS = 1_500_000  # of text of both languages, from which the tokenizer is trained


@dataclass(frozen=True)
class Tour:
    """The settings of a tour.

    Args:
        minutes: The size of the story (size.py).
        language: To move to.
        data: A folder of real text (material.py), or None for the built-in world.
        out: Where models and report go.
        seed: Of the world, the weights and the order of the data.
        precision: Of training; auto = bf16 where the processor multiplies in it, else float32.
    """

    minutes: float = 5.0
    language: str = "ms"
    data: Path | None = None
    out: Path = Path("runs/tour")
    seed: int = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"


def tour(settings: Tour) -> dict[str, Any]:
    """Runs a tour, or goes on with it, or reads the findings of a finished one. Progress goes to standard error.

    Returns:
        The keys of `lapis tour --json`.

    Raises:
        ConfigError: Minutes or language cannot be.
        OutputError: The folder holds a tour with other settings.
        DataError: The material is not what material.py draws.
    """
    out = settings.out
    if not LEAST_MINUTES <= settings.minutes <= MOST_MINUTES:
        raise ConfigError(f"tour: minutes is {settings.minutes:g}; give {LEAST_MINUTES:g} to {MOST_MINUTES:g}")
    if settings.data is None and settings.language not in set(LANGUAGES) - {ENGLISH}:
        known = ", ".join(sorted(set(LANGUAGES) - {ENGLISH}))
        raise ConfigError(
            f'tour: the built-in world moves from English to another language, {known}; not to "{settings.language}"'
        )
    if settings.data is not None:
        Material(settings.data, settings.language)  # refused now, before a folder is made
    record = {**asdict(settings), "data": str(settings.data) if settings.data else None, "out": None}
    _claim(out, record)
    result, report = out / "tour.json", out / "report.html"
    with _locked(out):
        if not result.exists():
            ran = _run(settings) | {"minutes": settings.minutes, "report": str(report), "folder": str(out)}
            with commit_file(result) as path:
                path.write_text(json.dumps(ran, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        findings: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if not report.exists():
            with commit_file(report) as path:
                path.write_text(page(findings), encoding="utf-8")
    noted = _read_note(out / SECONDS)
    return findings | {"seconds": float(noted) if isinstance(noted, int | float) else 0.0}


def _run(settings: Tour) -> dict[str, Any]:
    """The findings of the story. The seconds of all sittings are noted apart: the findings are the same at any pace."""
    out, started = settings.out, time.monotonic()
    seconds_file = out / SECONDS
    noted = _read_note(seconds_file)
    earlier = float(noted) if isinstance(noted, int | float) else 0.0
    size = StorySize.of(settings.minutes, real=settings.data is not None)
    screen = on_terminal()
    try:
        screen.note("how fast this machine is, with one thread and with several")
        computer, pace = _settled(out / ".machine", settings, size)
        clock = Clock(_left(out, size, real=settings.data is not None), 1 / pace, screen)
        clock.note(
            f"{sum(size.tokens.values()) / 1e6:.1f} million tokens to learn: about {spelled(clock.seconds_left)} "
            f"minutes on this machine as it is now ({computer.summary})"
        )
        if not machine.multiplies_bfloat16():
            clock.note("this processor has no bfloat16 instructions; with them it would take about a third")
        with threads(computer.threads):
            return _run_story(settings, size, computer, clock)
    finally:
        screen.close()
        with suppress(OSError, OutputError):  # without it a rerun only counts fewer seconds
            _write_note(seconds_file, earlier + time.monotonic() - started)


def _settled(note: Path, settings: Tour, size: StorySize) -> tuple[machine.Machine, float]:
    """What the tour computes with, as settled when it began, and the seconds that a token takes now."""
    model = Transformer(size.model(size.vocabulary))
    settled = _read_note(note)
    if isinstance(settled, dict) and set(settled) == {entry.name for entry in fields(machine.Machine)}:
        computer = machine.Machine(**settled)
        return computer, machine.seconds_per_token(model, computer, CONTEXT)
    computer, pace = machine.settle(settings.precision, model, CONTEXT)
    _write_note(note, asdict(computer))
    return computer, pace


def _run_story(settings: Tour, size: StorySize, computer: machine.Machine, clock: Clock) -> dict[str, Any]:
    out = settings.out
    root = settings.data or out / "world"
    if settings.data is None and not is_made(root):
        clock.begin("world", f"a world of its own, told in English and {LANGUAGES[settings.language]}")
        world = World(settings.seed, size.people)
        write_world(world, root, settings.language, size.characters("base"), size.chats, clock.at)
    material = Material(root, settings.language)
    tokenizer = _tokenizer(out / "tokenizer", material, size.vocabulary, clock)
    story = Story(out, settings.seed, size, computer, material, tokenizer, clock)
    return story.tell() | {"names": {code: LANGUAGES.get(code, code) for code in material.languages}}


def _left(out: Path, size: StorySize, *, real: bool) -> dict[str, float]:
    """What of a tour is still to be done, as work for the clock."""
    work = dict[str, float](size.work)
    done = {"world": real or (out / "world").is_dir(), "tokenizer": (out / "tokenizer").is_dir()}
    for run in size.tokens:
        done[run] = (out / run).is_dir()
        done[f"text for {run}"] = (out / "data" / f"{run}.jsonl").exists()
    return {part: amount for part, amount in work.items() if not done.get(part)}


def _claim(out: Path, record: Mapping[str, Any]) -> None:
    """Makes the folder, or finds in it a tour with the same settings."""
    note = out / ".tour"
    before = _read_note(note)
    if isinstance(before, dict):
        other = [f"{key} was {before.get(key)}" for key, value in record.items() if before.get(key) != value]
        if other:
            raise OutputError(f"{out}: holds another tour ({', '.join(other)}); give another --out, or remove it")
    elif out.exists() and any(not entry.name.startswith((note.name, f".{note.name}.")) for entry in out.iterdir()):
        why = "its .tour cannot be read" if note.exists() else "is no tour"
        raise OutputError(f"{out}: exists already and {why}; give another --out")
    else:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        _write_note(note, record)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """No other tour works in the folder meanwhile."""
    handle = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not try_lock(handle):
            raise OutputError(f"{out}: another tour is at work in it; wait for it, or give another --out")
        yield
    finally:
        os.close(handle)


def _read_note(path: Path) -> Any:
    """The JSON of a note; None where there is none, or only a piece of one."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _write_note(path: Path, value: Any) -> None:
    with commit_file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(value))


def _tokenizer(folder: Path, material: Material, vocabulary: int, clock: Clock) -> Tokenizer:
    """A byte-level BPE of both languages, from as much text of the one as of the other."""
    if not is_made(folder):
        clock.begin("tokenizer", f"a tokenizer of up to {vocabulary:,} tokens for both languages")
        with commit(folder) as staging:
            texts = staging.path / "texts.jsonl"
            material.mix(dict.fromkeys(material.languages, 0.5), texts, TOKENIZER_CHARACTERS, 0)
            trained = train_tokenizer([texts], vocabulary)
            texts.unlink()
            trained.save(staging.path)
    return Tokenizer.open(folder)
