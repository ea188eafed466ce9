"""What a folder of `lapis adapt` has for a card: the folder in; models, held-out material and how it was made out."""

import hashlib
import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.files import read_json
from lapis.checkpoint.hub.models import public_names
from lapis.config import load_yaml
from lapis.errors import ConfigError, DataError
from lapis.evaluation.chats import prompt_of
from lapis.evaluation.choices import Choice, read_choices
from lapis.language.card.scores import HeldOutText
from lapis.language.plan import PLAN, AdaptPlan, read_plan
from lapis.language.texts import first_bytes, same_as_target, spread
from lapis.text.corpus import corpus
from lapis.text.corpus.files import files
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.delta.beside import card_license
from lapis.weights.graft.layout import plan_graft
from lapis.wording import HUB_ID

# steps that hold texts: the second where a model drew its replay itself, the last where scales are learned on a part
TEXTS = ("measure", "replay", "planned")
PARTS = {"target": "text", "replay": "replay"}  # language -> what its files in measure/ are called
MEASURED = ("chats", "replay_chats", "choices", "replay_choices")  # keys of a plan whose files a card reads
UNGRAFTED = ("adapted", "merged", "calibrated")  # steps whose model is adapted, in their order, before chat is added
TUNED = "tuned"  # what the yardstick of the gap is called
CHATS = 32  # that models are measured on
QUESTIONS = 500
Paths = Sequence[str | Path]


def is_adaptation(folder: Path) -> bool:
    """Whether a folder is one of `lapis adapt` whose text was measured."""
    return (folder / PLAN).is_file() and (folder / "measure").is_dir()


def models_of(folder: Path) -> dict[str, str | Path]:
    """The models of an adaptation in their order: the base, the chat model, and its plan's steps that hold a model."""
    plan = _plan_of(folder)
    steps = [folder / name for name in steps_of(folder, plan)]
    return {**parents_of(vars(plan)), **{step.name: step for step in steps if any(step.glob("*.safetensors"))}}


def _plan_of(folder: Path) -> AdaptPlan:
    return read_plan(load_yaml(folder / PLAN), str(folder / PLAN))


def steps_of(folder: Path, plan: AdaptPlan) -> list[str]:
    """The steps that a plan has; the folder may hold others, of an earlier plan.

    Args:
        folder: Of the adaptation, whose text was measured.
        plan: Its settings.
    """
    names = replace(plan, vocab=added_tokens(folder, plan)).step_names
    if "worded" in names and (folder / "worded").is_dir():
        assert plan.chat is not None
        if not plan_graft(plan.base, plan.chat, plan.base).new_tokens:
            names.remove("worded")
    return names


def added_tokens(folder: Path, plan: AdaptPlan) -> int:
    """How many new tokens an adaptation has: so many as its plan says, or as measuring the text has recommended."""
    if plan.vocab != "auto":
        return plan.vocab
    return int(read_json(folder / "measure" / "fertility.json")["recommendation"]["add"])


def parents_of(plan: Mapping[str, Any]) -> dict[str, str | Path]:
    """What an adaptation starts from: the base, and the chat model where there is one."""
    return {name: str(plan[name]) for name in ("base", "chat") if plan.get(name)}


def held_out_of(folder: Path, plan: AdaptPlan, given: Mapping[str, Any] | None = None) -> dict[str, HeldOutText]:
    """The held-out material of an adaptation, by language.

    Args:
        folder: Of the adaptation.
        plan: Its settings.
        given: Keys in place of the plan's: chats, choices, language, ...
    """
    held, settings = {}, {**vars(plan), **(given or {})}
    for name, part in PARTS.items():
        places = (step / f"{part}.held.jsonl" for step in reversed(_texts_of(folder, plan)))
        file = next((place for place in places if place.is_file()), None)
        if file is not None:
            held[name] = _held_out(name, [document.text for document in corpus.documents(file)], settings)
    return held


def _texts_of(folder: Path, plan: AdaptPlan) -> list[Path]:
    """The steps of a plan that hold texts."""
    return [folder / name for name in TEXTS if name in plan.step_names]


def _held_out(name: str, texts: list[str], plan: Mapping[str, Any]) -> HeldOutText:
    """What a language is measured on: texts, and the chats and questions that a plan names for it."""
    before, code = ("", str(plan.get("language") or "")) if name == "target" else ("replay_", "")
    chats = read_chats(plan.get(f"{before}chats") or ())
    return HeldOutText(texts, chats, *read_questions(plan.get(f"{before}choices") or ()), code)


def read_chats(paths: Paths) -> list[corpus.ChatRecord]:
    """The chats that models are measured on, of all files by turns, in the order of their names. Raises DataError where
    one of them has no reply of the assistant's."""
    opened = [corpus.chats(file) for file in sorted(files(list(paths)))] if paths else []
    turns = chain.from_iterable(zip_longest(*opened))
    chats = list(islice((chat for chat in turns if chat is not None), CHATS))
    for chat in chats:
        try:
            prompt_of(chat.messages)
        except DataError:
            raise DataError(
                f"{chat.where}: the chat has no reply of the assistant after a prompt; leave it out"
            ) from None
    return chats


def read_questions(paths: Paths) -> tuple[list[Choice], list[Path]]:
    """Questions of multiple choice: those of files of records, and the task files of lm-evaluation-harness.

    Args:
        paths: Files; what ends in .yaml or .yml is a task file.

    Raises:
        MissingExtra: For a task file where lm-eval is not installed.
    """
    tasks = [Path(path) for path in paths if Path(path).suffix in (".yaml", ".yml")]
    for task in tasks:
        from lapis.evaluation.harness import task_name

        task_name(task)
    questions = [one for path in paths if Path(path) not in tasks for one in read_choices(path)[:QUESTIONS]]
    return questions, tasks


def measured_files(plan: Mapping[str, Any]) -> dict[str, list[Path]]:
    """The files besides the text that models are measured on, by their key: chats, and questions.

    Args:
        plan: With the keys of MEASURED, where they are given.
    """
    given = {key: list(plan[key]) for key in MEASURED if plan.get(key)}
    return {key: files(paths) if "chats" in key else list(map(Path, paths)) for key, paths in given.items()}


def how_made(folder: Path, plan: AdaptPlan, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How an adaptation was made, and on which files it was measured: what a card says of it.

    Args:
        folder: Of the adaptation.
        plan: Its settings.
        given: Files that are read in place of the plan's: text, replay, chats, choices, ...
    """
    settings = vars(plan)
    parents = parents_of(settings)
    places = ("base", "chat", "out", "text", "replay", "chats", "replay_chats", "choices", "replay_choices", "language")
    shown = {key: value for key, value in settings.items() if key not in places and value not in (None, "", {}, [], ())}
    added = added_tokens(folder, plan)
    texts = [path for step in _texts_of(folder, plan) for path in sorted(step.glob("*.jsonl"))]
    measured = {**{key: settings[key] for key in MEASURED}, **(given or {})}
    return {
        "title": Path(os.path.abspath(folder)).name,
        "language": plan.language,
        "license": plan.license or licence_of(plan.base),
        "base_models": public_names(map(str, parents.values())),
        "settings": {**{role: Path(source).name for role, source in parents.items()}, "new tokens": added, **shown},
        "data": {**{path.name: _sha256(path) for path in texts}, **_digests(measured)},
        "models": {role: digests_of(source) for role, source in parents.items()},
    }


def digests_of(source: str | Path) -> dict[str, str]:
    """sha256 of a model folder's weights; of a model of the hub nothing, since its name says which it is."""
    folder = Path(source)
    return {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}


def licence_of(source: str | Path) -> str:
    """The licence that a model's README.md states; "" where it states none."""
    return card_license(open_checkpoint(source, adapters=True)) or ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class CardInputs:
    """What a card is made of. models: Name -> folder. held: Language -> material. how: As README.md tells it.
    notes: Of folders, what a reader should know. gap_from: Where the gap that was closed begins (`gap_start`)."""

    models: dict[str, str | Path]
    held: dict[str, HeldOutText]
    how: dict[str, Any]
    notes: dict[str, list[str]] = field(default_factory=dict)
    gap_from: str | None = None


def gap_start(models: Mapping[str, str | Path]) -> str | None:
    """What the first model that was adapted without chat is called, so that ways to a chat model begin alike.

    Args:
        models: Name -> folder.

    Returns:
        The last step before the graft of the first adaptation of a base, or a model that is called as such a step is;
        "" where there are adaptations of a chat model alone, whose models could chat from the start; None without any.
    """
    starts: dict[Path, str] = {}
    of_chat = False
    for name, place in models.items():
        folder = Path(os.path.abspath(place))
        if is_adaptation(folder.parent) and _plan_of(folder.parent).onto == "chat":
            of_chat = True
        elif (step := name.rpartition("/")[2]) in UNGRAFTED and step == folder.name:
            other = starts.get(folder.parent, name)
            if UNGRAFTED.index(step) >= UNGRAFTED.index(other.rpartition("/")[2]):
                starts[folder.parent] = name
    first = sorted(starts, key=lambda around: not is_adaptation(around))
    return starts[first[0]] if first else "" if of_chat else None


def unfinished(folder: Path) -> list[str]:
    """The steps before the card that the folder of an adaptation does not hold yet."""
    return [name for name in steps_of(folder, _plan_of(folder)) if name != "card" and not (folder / name).is_dir()]


def gather(folders: Sequence[Path], given: Mapping[str, Any], scored: int, tuned: Path | None = None) -> CardInputs:
    """Models and held-out material of what a user named.

    A model has its step's name in an adaptation, and else that of its folder; where two would have one name, or a
    folder that of a step or of the yardstick, the name of the folder around it stands before it.

    Args:
        folders: Of an adaptation, of models, or both.
        given: Keys of a plan in place of those of the adaptation's own: text, replay, chats, choices, language, ...
        scored: Bytes of each given text that are scored.
        tuned: The yardstick, which is none of the models.

    Raises:
        ConfigError: Where there is no text, or no byte of it is to be scored, or two models have one name even with
            that of the folder they lie in, or one is the yardstick.
    """
    if scored < 1:
        raise ConfigError(f"card: --scored is {scored}; give 1 or more")
    adaptations = {folder: models_of(folder) for folder in folders if is_adaptation(folder)}
    steps = {os.path.abspath(place): name for own in adaptations.values() for name, place in own.items()}
    reserved = {*steps.values(), *([TUNED] if tuned is not None else [])}
    models: dict[str, str | Path] = {}
    held: dict[str, HeldOutText] = {}
    how: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    notes: dict[str, list[str]] = {}
    for folder in folders:
        own, beside = adaptations.get(folder), folder.resolve()
        if own is None:
            if tuned is not None and beside == tuned.resolve():
                raise ConfigError(
                    f"card: {folder} is among the models and is --tuned; name it once, since --tuned shows it, too"
                )
            step = steps.get(os.path.abspath(folder))
            _add(models, step or beside.name, folder, beside.parent.name, () if step else reserved)
            continue
        for name, place in own.items():
            _add(models, name, place, beside.name)
        if missing := unfinished(folder):
            named = beside.name if beside.name not in models else f"the adaptation {beside.name}"
            notes[named] = [f"is not finished: it has no {', '.join(missing)} yet"]
        if not held:
            plan = _plan_of(folder)
            settings, held, how = vars(plan), held_out_of(folder, plan, given), how_made(folder, plan, given)
    if not models:
        raise ConfigError("card: no model is named; give a folder of lapis adapt, or model folders")
    for place in (*models.values(), *([tuned] if tuned is not None else [])):
        Tokenizer.open(open_checkpoint(place, adapters=True))  # what is no model is told before any is measured
    if not held and not given.get("text"):
        raise ConfigError("card: --text is missing; give held-out text of the language, or a folder of lapis adapt")
    for name, part in PARTS.items():
        if paths := given.get(part):
            texts = spread(document.text for document in corpus.documents(list(paths)))
            held[name] = _held_out(name, list(first_bytes(texts, scored)), {**settings, **given})
    if any(given.get(part) for part in PARTS.values()) and len(held) > 1:
        if why := same_as_target(*(held[name].texts for name in PARTS)):
            raise DataError(f"card: {why}")
    if wrong := [name for name in given.get("base_models") or () if not HUB_ID.fullmatch(name)]:
        raise ConfigError(f"card: --base-model is {wrong[0]}; give its name on the hub, owner/name")
    for key, option in (("replay_chats", "--replay-chats"), ("replay_choices", "--replay-choices")):
        if given.get(key) and "replay" not in held:
            raise ConfigError(
                f"card: {option} is measured beside replay text, and there is none; give --replay, or leave it out"
            )
    if not how:
        name, first = next(iter(models.items()))
        how = {"license": licence_of(first), "data": _digests(given), "models": {name: digests_of(first)}}
    stated = {key: given[key] for key in ("language", "license", "base_models") if given.get(key)}
    return CardInputs(models, held, {**how, **stated}, notes, gap_start(models))


def _add(
    models: dict[str, str | Path], name: str, place: str | Path, beside: str, reserved: Container[str] = ()
) -> None:
    """Adds a model to others, unless it is there already."""
    if os.path.abspath(place) in map(os.path.abspath, models.values()):  # two adaptations of one base
        return
    name = f"{beside}/{name}" if name in models or name in reserved else name
    if name in models:
        raise ConfigError(f"card: two of these models are called {name}; give each folder a name of its own")
    models[name] = place


def _digests(given: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the files that a user named, by what they are for and their names; a name that recurs is numbered."""
    texts = {part: files(list(given[part])) for part in PARTS.values() if given.get(part)}
    digests: dict[str, str] = {}
    met: Counter[str] = Counter()
    for part, paths in {**texts, **measured_files(given)}.items():
        for name, path in ((f"{part}: {path.name}", path) for path in paths):
            met[name] += 1
            digests[name if met[name] == 1 else f"{name} ({met[name]})"] = _sha256(path)
    return digests
