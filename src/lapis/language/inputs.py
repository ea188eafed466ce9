"""What an adaptation reads, looked at before anything is computed: a plan in, a refusal or a remark out."""

import glob
import os
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lapis.checkpoint.commit import check_output
from lapis.errors import CheckpointError, ConfigError, DataError, OutputError
from lapis.language.card.folder import MEASURED, read_chats, read_questions
from lapis.language.card.naming import KNOWN, LOOKED_AT, MOSTLY, language_shares, main_language, share_in_language
from lapis.language.extend import open_source
from lapis.language.plan import PLAN, AdaptPlan, whole_path
from lapis.language.replay import SELF
from lapis.language.texts import FEW, from_each, pieces, read_texts, same_as_target
from lapis.model.check import plan_load, read_config
from lapis.parsing import quoted
from lapis.text.corpus.files import HUB, files
from lapis.text.tokenizer.extend import ExtendableTokenizer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.rewards.language import TWINS
from lapis.weights.graft.layout import plan_graft
from lapis.weights.graft.scale import read_scale
from lapis.wording import format_count

NONE = 0.02  # share of documents in the language; below that the text is another one's
READ = 20_000_000  # bytes of a text that are looked at
SHOWN = 0.01  # share of a language that is told
NAMED = 3  # languages whose shares are told


def with_whole_paths(plan: AdaptPlan) -> AdaptPlan:
    """The plan with whole paths, so that it is the same plan wherever it is read, however a path was spelled."""

    def whole_text(place: str) -> str:
        if place == SELF or place.startswith(HUB):
            return place
        return os.path.abspath(place) if glob.has_magic(place) else whole_path(place)

    changed: dict[str, Any] = {"base": whole_path(plan.base), "out": os.path.abspath(plan.out)}
    for name in ("text", "replay", *MEASURED):
        changed[name] = tuple(map(whole_text, getattr(plan, name)))
    for name in ("chat", "scale"):
        if isinstance(value := getattr(plan, name), str) and value != "plan":
            changed[name] = whole_path(value)
    return replace(plan, **changed)


def check_inputs(plan: AdaptPlan, out: Path) -> list[str]:
    """Refuses whatever can be known to be wrong before anything is computed, and tells what a user should know.

    Args:
        plan: What to adapt to what.
        out: Its folder, absolute.

    Returns:
        Lines for the user.

    Raises:
        LapisError: Of the kind that fits.
    """
    unfinished = f".{PLAN}.lapis-"  # a plan that was being written when its adaptation was killed
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{out}: is a file; give another --out")
    holds = [path.name for path in out.iterdir() if not path.name.startswith(unfinished)] if out.exists() else []
    if not out.exists():
        check_output(out)
    if holds and not (out / PLAN).is_file():
        raise OutputError(f"{out}: exists already and is no adaptation; give another --out")
    source, checkpoint = open_source(plan.source)
    if checkpoint is None:
        raise ConfigError(f"adapt: {plan.onto} is {plan.source}, which holds a tokenizer and no weights; give a model")
    if plan.scale != "plan":
        read_scale(plan.scale)
    if plan.vocab not in ("auto", 0):
        ExtendableTokenizer.open(source)
    for paths in plan.texts.values():
        _refuse_own_steps(paths, out)
        for file in files(list(paths)):
            next(iter(_documents([str(file)])), None)  # a file that is empty or holds no text is refused
    if Tokenizer.open(source).eos_id is None:
        raise ConfigError(
            f"adapt: {source}: names no eos_token, which stands between documents; name one in tokenizer_config.json"
        )
    notes = [*_unused(plan), *plan_load(checkpoint).notes, *(_named(plan) if plan.language else _unnamed(plan))]
    for name in ("replay_chats", "replay_choices"):
        if getattr(plan, name) and not plan.replay:
            raise ConfigError(
                f"adapt: {name} is measured beside replay text, and there is none; give replay, or leave it out"
            )
    for chats, choices in ((plan.chats, plan.choices), (plan.replay_chats, plan.replay_choices)):
        read_chats(chats)
        read_questions(choices)
    if "replay" in plan.texts:
        if why := same_as_target(_documents(plan.text), _documents(plan.replay)):
            raise DataError(f"adapt: {why}")
    if plan.grafts and os.path.realpath(str(plan.chat)) == os.path.realpath(plan.base):
        raise ConfigError(
            f"adapt: chat is {plan.chat}, which is the base itself, so that chat - base is nothing; leave chat out, or "
            "give the base that it was tuned from"
        )
    if plan.chat is not None:
        try:
            plan_graft(plan.base, plan.chat, plan.base)
        except CheckpointError as error:  # --allow-unrelated is no option here
            why, another, _ = str(error).partition("; is it another release?")
            remedy = "; give the chat version of base" if another else ""
            raise CheckpointError(f"adapt: {why.removeprefix('graft: ')}{remedy}") from None
    for paths in plan.texts.values():
        read_texts(paths, READ)  # of too little nothing can be held out
    return notes


def _refuse_own_steps(paths: Iterable[str], out: Path) -> None:
    """Raises OutputError where the folder of the steps is among what is read as text: a later run would read its own
    held-out text."""
    for path in paths:
        within = out.is_relative_to(os.path.abspath(path)) and os.path.isdir(path)
        if within or any(Path(os.path.abspath(file)).is_relative_to(out) for file in files([path])):
            raise OutputError(f"{out}: adapt: out lies in {path}, which is read as text; give another --out")


def _unused(plan: AdaptPlan) -> list[str]:
    """Lines about settings that somebody gave, and that change nothing beside others."""
    given = {one.name for one in fields(plan) if getattr(plan, one.name) != one.default}
    notes = []
    if plan.minutes is not None and "tokens" in given:
        notes.append(
            f"tokens: {plan.tokens:,} is not used, since minutes is {plan.minutes:g}; minutes=null goes by tokens"
        )
    of_rows = ["init", "embedded", "rows_lr", "old_rows", "calibrate_again"]
    of_replay = ["replay_share", "cost"] if plan.scale != "plan" else ["replay_share"]
    for is_used, names, why in (
        (plan.replay, of_replay, "there is no replay text"), (plan.vocab, of_rows, "no tokens are added")
    ):  # fmt: skip
        if not is_used and (idle := [name for name in names if name in given]):
            notes.append(f"{', '.join(idle)}: not used, since {why}")
    if plan.replay and "cost" in given and plan.train.get("eval_every") == 0:
        notes.append("cost: ends no training, since train: eval_every is 0; it is held against the card alone")
    most = read_config(plan.source).context
    if "context" in given and plan.context > most:
        notes.append(f"context: {plan.context:,} tokens are more than the model reads; rows of {most:,} are taken")
    size = plan.batch * min(plan.context, most)
    if plan.trained_tokens < size and (plan.minutes is None or plan.tokens_per_second is not None):
        notes.append(
            f"training: {format_count(plan.trained_tokens, 'token')} in all, and a step reads {size:,}; each training "
            "takes one step all the same, so give more tokens, or a smaller batch or context"
        )
    return notes


def _named(plan: AdaptPlan) -> list[str]:
    """What is told of texts where the plan names the language. Raises DataError where none of the text is in it."""
    code, notes = plan.language, list[str]()
    if code not in KNOWN:
        notes.append(f"language: whether the text is {quoted(code)} was not looked at; known are {', '.join(KNOWN)}")
    else:
        share = share_in_language(code, _some(_documents(plan.text)))
        if share < NONE:
            raise DataError(
                f"adapt: {share:.0%} of the documents of the text look like {code}; give text of it, or another "
                "--language"
            )
        if share < MOSTLY:
            notes.append(f"text: {share:.0%} of the documents look like {code}; the rest is another language")
    if "replay" in plan.texts and main_language(_some(_documents(plan.replay))) in (code, TWINS.get(code, code)):
        notes.append("replay: looks to be in the language of the text; give text of what the model knew before")
    return notes


def _unnamed(plan: AdaptPlan) -> list[str]:
    """What is told where nobody said what the language is: the shares of a text that no language has most of, or most
    of which is in the language of the replay text."""
    shares = language_shares(_some(_parts(plan.text))) or {"": 1.0}
    known = language_shares(_some(_parts(plan.texts.get("replay", ())))) or {"": 1.0}
    (most, share), (other, most_of_it) = (next(iter(each.items())) for each in (shares, known))
    same = most == other != "" and most_of_it >= MOSTLY
    if share >= MOSTLY and not same:
        return []
    shown = [(name, part) for name, part in shares.items() if part >= SHOWN][:NAMED]
    looks = [f"{name or 'no language that is built in'} ({part:.0%})" for name, part in shown]
    if (rest := 1 - sum(part for _, part in shown)) >= SHOWN:
        looks.append(f"others ({rest:.0%})")
    listed = f"text: looks like {', '.join(looks)}"
    if same:
        return [
            f"{listed}, and the replay text like {most}; give text of the language to learn, and replay text of what "
            "the model knew before"
        ]
    return [
        f"{listed}; all of it is learned, so leave out other languages (one that is not built in looks like several)"
    ]


def _some(documents: Iterable[str]) -> list[str]:
    """Documents from all of a text."""
    texts = list(documents)
    few = min(len(texts), LOOKED_AT)
    return [texts[i * len(texts) // few] for i in range(few)]


def _documents(paths: Iterable[str]) -> Iterable[str]:
    return from_each(list(paths), READ)


def _parts(paths: Iterable[str]) -> list[str]:
    """Documents, cut where there are few of them, as they are cut to hold some out."""
    texts = [text for text in _documents(paths) if text.strip()]
    return texts if len(texts) >= FEW else [piece for text in texts for piece in pieces(text)]


def stamps(places: Iterable[str | Path]) -> list[list[Any]]:
    """Name, size and time of change of every file of some files and folders; of a model of the hub its name."""
    stamps: list[list[Any]] = []
    for place in map(Path, places):
        listed = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
        for path in listed:
            known = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
            stamps.append([str(path), *known])
    return stamps
