"""A tour, from settings to page: claims a folder, makes or opens the material, runs the story, writes its findings.

A part whose file is there is not done again, so a tour that was stopped goes on. Leaves out: the story (recipe.py).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint.commit import commit
from lapis.checkpoint.staging import is_made
from lapis.errors import ConfigError
from lapis.model.threads import threads
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.tour.clock import Clock, Screen, spelled
from lapis.tour.material import ENGLISH, Material, write_world
from lapis.tour.recipe import StoryFromScratch
from lapis.tour.setup import machine
from lapis.tour.setup.folder import completed, settle_machine, settled_machine
from lapis.tour.setup.size import CONTEXT, StorySize
from lapis.tour.world import LANGUAGES, World

LEAST_MINUTES, MOST_MINUTES = 0.1, 10_000.0  # below, no held-out text is left to score
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
    return completed(out, record, lambda screen: _run(settings, screen))


def _run(settings: Tour, screen: Screen) -> dict[str, Any]:
    """The findings of the story."""
    out, size = settings.out, StorySize.of(settings.minutes, real=settings.data is not None)
    screen.note("how fast this machine is, with one thread and with several")
    computer, pace = _settled(settings, size)
    clock = Clock(_left(out, size, real=settings.data is not None), 1 / pace, screen)
    clock.note(
        f"{sum(size.tokens.values()) / 1e6:.1f} million tokens to learn: about {spelled(clock.seconds_left)} "
        f"minutes on this machine as it is now ({computer.summary})"
    )
    if not machine.multiplies_bfloat16():
        clock.note("this processor has no bfloat16 instructions; with them it would take about a third")
    with threads(computer.threads):
        return _run_story(settings, size, computer, clock)


def _settled(settings: Tour, size: StorySize) -> tuple[machine.Machine, float]:
    """What the tour computes with, as settled when it began, and the seconds that a token takes now."""
    model = Transformer(size.model(size.vocabulary))
    if (computer := settled_machine(settings.out)) is not None:
        return computer, machine.seconds_per_token(model, computer, CONTEXT)
    computer, pace = machine.settle(settings.precision, model, CONTEXT)
    settle_machine(settings.out, computer)
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
    story = StoryFromScratch(out, settings.seed, size, computer, material, tokenizer, clock)
    return story.tell() | {"minutes": settings.minutes}


def _left(out: Path, size: StorySize, *, real: bool) -> dict[str, float]:
    """What of a tour is still to be done, as work for the clock."""
    work = dict[str, float](size.work)
    done = {"world": real or (out / "world").is_dir(), "tokenizer": (out / "tokenizer").is_dir()}
    for run in size.tokens:
        done[run] = (out / run).is_dir()
        done[f"text for {run}"] = (out / "data" / f"{run}.jsonl").exists()
    return {part: amount for part, amount in work.items() if not done.get(part)}


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
