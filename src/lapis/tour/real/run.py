"""`lapis tour --real`: checks a model and real text, says what the story will cost, and tells it.

Counted in tokens, so that it ends alike on every machine. A part whose folder is there is not done again, and a
training goes on from its last checkpoint. Leaves out: the story (story.py).
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lapis.checkpoint import open_checkpoint
from lapis.errors import ConfigError
from lapis.model.check import read_config
from lapis.model.load import load
from lapis.model.threads import choose_threads, threads
from lapis.text.chat.template_tokens import template_tokens
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.text.tokenizer.vocabulary import open_vocabulary
from lapis.tour.clock import Clock, Screen, spelled
from lapis.tour.material import Material
from lapis.tour.real.story import TOKENS, RealSize, RealStory, hold_tables
from lapis.tour.setup.folder import completed, settle_machine, settled_machine
from lapis.tour.setup.machine import Machine, multiplies_bfloat16, settle_precision
from lapis.tour.setup.size import CONTEXT
from lapis.training.setup.probe import training_speed
from lapis.weights.graft.layout import plan_graft

LEAST_TOKENS = 6 * CONTEXT  # below, a run would have no whole step
DATA = "LAPIS_DATA"  # names the folder of real text where --data does not
EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class RealTour:
    """The settings of a tour with a model that exists.

    Args:
        model: Base: a folder, or a model of the hub.
        chat: Its chat version; by default base is tuned on the English chats of `data`.
        language: To move to.
        data: A folder of real text (material.py); by default what the environment's LAPIS_DATA names.
        tokens: To learn, all runs together.
        out: Where models and report go.
        seed: Of the order of the data.
        precision: Of training; auto = bf16 where the processor multiplies in it, else float32.
    """

    model: str | None = None
    chat: str | None = None
    language: str = "ms"
    data: Path | None = None
    tokens: int = TOKENS
    out: Path = Path("runs/real")
    seed: int = 0
    precision: Literal["auto", "float32", "bf16"] = "auto"


def real_tour(settings: RealTour) -> dict[str, Any]:
    """Runs a tour, or goes on with it, or reads the findings of a finished one. Progress goes to standard error.

    Returns:
        The keys of `lapis tour --json`; no answers, since real text has no questions with one right answer.

    Raises:
        ConfigError: Without a model or text; for a model that cannot chat, or a number of tokens that cannot be.
        CheckpointError: For a model that cannot be opened, or a chat version of another model.
        DataError: The text is not what material.py draws.
        OutputError: The folder holds a tour with other settings.
    """
    if settings.model is None:
        raise ConfigError(f"tour: --real needs a model; give --model, a folder or a hub id such as {EXAMPLE}")
    if settings.tokens < LEAST_TOKENS:
        raise ConfigError(f"tour: tokens is {settings.tokens:,}; give at least {LEAST_TOKENS:,}")
    data = settings.data or os.environ.get(DATA)
    if not data:
        raise ConfigError(
            f"tour: --real needs real text; give --data, a folder with corpus/LANGUAGE/*.jsonl and "
            f"instruct/LANGUAGE.jsonl, or set {DATA}"
        )
    material = Material(Path(data), settings.language)
    places = {"base": settings.model} | ({"chat": settings.chat} if settings.chat else {})
    given = {role: os.path.abspath(place) if os.path.isdir(place) else place for role, place in places.items()}
    tokenizer = _check(given)
    record = {
        **asdict(settings), "real": True, "model": given["base"], "chat": given.get("chat"),
        "data": os.path.abspath(data), "out": None,
    }  # fmt: skip
    return completed(settings.out, record, lambda screen: _run(settings, given, material, tokenizer, screen))


def _check(given: dict[str, str]) -> Tokenizer:
    """The tokenizer of a tour with these models. Whatever they cannot do is found here, from headers."""
    base = given["base"]
    config = read_config(base)
    if config.head != "lm" or not config.causal:
        raise ConfigError(f"tour: {base} is no model that continues text; give --model such a one")
    if config.context < CONTEXT:
        raise ConfigError(f"tour: {base} reads {config.context} tokens; a tour needs a model that reads {CONTEXT}")
    speaker = given.get("chat", base)
    tokenizer = Tokenizer.open(speaker)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"tour: {speaker} has no chat template, in which chats are written; give --chat, the chat version of "
            "--model, or another --model"
        )
    for place in given.values():
        tokenizer.check_rows(read_config(place).vocab)
    if "chat" in given:
        plan_graft(base, given["chat"], base)
    return tokenizer


def _run(
    settings: RealTour, given: dict[str, str], material: Material, tokenizer: Tokenizer, screen: Screen
) -> dict[str, Any]:
    """The findings of the story."""
    out, size = settings.out, RealSize.of(settings.tokens, chat_is_given="chat" in given)
    screen.note("how fast this machine trains the model")
    model = load(given["base"], torch.float32).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    hold_tables(model, [])
    computer = settled_machine(out)
    if computer is None:
        computer = Machine(choose_threads(torch.device("cpu")), settle_precision(settings.precision))
        settle_machine(out, computer)
    clock = Clock(_left(out, size), training_speed(model, computer.threads, computer.precision), screen)
    del model
    made = len(size.tokens) + 2  # and a graft, and one that the sweep tries
    clock.note(
        f"{settings.tokens:,} tokens to learn by a model of {parameters:,} parameters, and what takes as long as "
        f"{sum(size.work.values()) - sum(size.tokens.values()):,.0f} more to measure: about "
        f"{spelled(clock.seconds_left)} minutes on this machine as it is now ({computer.summary}), and up to "
        f"{4 * parameters * made / 1e9:.1f} GB in {out}"
    )
    if not multiplies_bfloat16():
        clock.note("this processor has no bfloat16 instructions; with them it would take about a third")
    words = {role: open_vocabulary(open_checkpoint(place)) for role, place in given.items()}
    base_words, chat_words = words["base"], words.get("chat", words["base"])
    names = template_tokens(chat_words, base_words) if chat_words else []
    with threads(computer.threads):
        story = RealStory(
            out, settings.seed, size, computer, material, tokenizer, clock,
            given={role: Path(place) for role, place in given.items()},
            template_tokens=[chat_words.ids[name] for name in names] if chat_words else [],
        )  # fmt: skip
        return story.tell() | {"model": given["base"], "chat": given.get("chat"), "trained_tokens": settings.tokens}


def _left(out: Path, size: RealSize) -> dict[str, float]:
    """What of a tour is still to be done, as work for the clock."""
    done = {run: (out / run).is_dir() for run in size.tokens}
    done["text for adapted"] = (out / "data" / "adapted.jsonl").exists()
    return {part: amount for part, amount in size.work.items() if not done.get(part)}
