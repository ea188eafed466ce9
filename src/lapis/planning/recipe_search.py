"""A merge recipe and held-out chats and texts in, the scales that do best on them out, beside two controls.

    knobs = knobs_of(recipe)                 the numbers of weight, lambda, t and scale that the recipe sets
    compass(...), at_random(...), grid(...)  three ways to try as many settings of them
    MergeSearch                              what was found, to show and to write

A setting is tried by merging in memory (each tensor is computed as the model reads it) and reading half of the held-out
material; the best of each way is read on the other half, which nobody looked at. Leaves out merging (weights/merge/).
"""

import copy
import hashlib
import itertools
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint.commit import commit_file
from lapis.config import dump_yaml, load_yaml_documents
from lapis.errors import ConfigError, DataError
from lapis.model.reading.load import load_readable
from lapis.planning.held_out import Figures, HeldOut, PlanJournal, Runner, make_held_out
from lapis.planning.inputs import Files
from lapis.planning.options import PlanOptions, SearchOptions
from lapis.text.corpus import corpus
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.engine.job import input_files
from lapis.weights.merge.plan import as_checkpoint, plan_merge
from lapis.weights.merge.recipes.stages import parse_stages
from lapis.wording import format_count

SEARCHED = ("weight", "lambda", "t", "scale")
_FIRST_STEP, _LAST_STEP = 0.25, 0.01  # of a knob's range
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it lie evenly between 0 and 1, and on no place of a grid

Values = tuple[float, ...]
Document = dict[str, Any]


@dataclass(frozen=True)
class Knob:
    """A number of a recipe. path: where it stands in the documents. low, high: between which it is searched."""

    name: str
    path: tuple[str | int, ...]
    value: float
    low: float
    high: float


@dataclass
class MergeSearch:
    """What was found.

    Attributes:
        recipe: The file.
        knobs: What was searched: name, value (the recipe's own), low, high.
        tried: Every setting that was measured: by (start, search, random, grid), values, figures and score.
        best: Way -> the best of what it tried.
        confirmed: Way -> the figures of its best on the half that nobody searched on.
        evaluations: How many settings were merged and measured, the confirmations included.
        documents: The recipe with the values that `search` found, as YAML gives them.
    """

    recipe: str
    knobs: list[dict[str, Any]]
    tried: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    confirmed: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluations: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    documents: list[Document] = field(default_factory=list)

    def finding(self) -> str:
        """What the search won, beside the controls, and in how many settings each, in a sentence."""
        start = self.confirmed["start"]["score"]
        won = {way: _percent(start - figures["score"]) for way, figures in self.confirmed.items()}
        tries = Counter(row["by"] for row in self.tried)
        others = " and ".join(f"{way} {won[way]} in {tries[way]:,}" for way in ("random", "grid") if way in won)
        return (
            f"on chats and texts that were not searched on, the search made the recipe {won['search']} in "
            f"{format_count(tries['search'], 'evaluation')} ({others})"
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `lapis plan --merge --json` prints."""
        return {**vars(self), "finding": self.finding()}

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the recipe with the values that were found, for `lapis merge`."""
        with commit_file(path, overwrite=overwrite) as temporary:
            temporary.write_text("---\n".join(dump_yaml(document) for document in self.documents), encoding="utf-8")


def search_recipe(
    recipe: str | os.PathLike[str],
    chats: Files,
    text: Files | None = None,
    *,
    evaluations: int = SearchOptions.evaluations,
    limit: int = PlanOptions.limit,
    context: int = PlanOptions.context,
    seed: int = PlanOptions.seed,
    allow_unrelated: bool = PlanOptions.allow_unrelated,
    progress: Callable[[str, float, float], None] | None = None,
    journal: Path | None = None,
) -> MergeSearch:
    """The scales of a recipe that make held-out chats and texts likeliest.

    Args:
        recipe: A YAML file; its documents' plain numbers of weight, lambda, t and scale are searched.
        chats: Files of chats.
        text: Files of plain text.
        evaluations: Settings that each of the three ways tries; the search may end before, with its smallest step.
            This and the options after it are those of `lapis.planning.options.SearchOptions`.
        progress: Called with what is done, the evaluations so far and how many there may be.
        journal: A file that keeps what was measured, so that the same call goes on where it was killed.

    Raises:
        ConfigError: For a recipe without such a number, or what a recipe cannot be.
        CheckpointError: For models that cannot be merged or run.
        DataError: For files that hold nothing to measure with.
    """
    started = time.perf_counter()
    options = SearchOptions(
        evaluations=evaluations, limit=limit, context=context, seed=seed, allow_unrelated=allow_unrelated
    )
    documents = load_yaml_documents(Path(recipe))
    knobs = knobs_of(documents, os.fspath(recipe))
    plan = plan_merge(parse_stages(documents, os.fspath(recipe)), allow_unrelated=allow_unrelated)
    result = MergeSearch(os.fspath(recipe), [asdict(knob) for knob in knobs], notes=list(plan.notes))
    with as_checkpoint(plan) as merged:
        tokenizer = Tokenizer.open(merged)
    halves = _read_halves(tokenizer, chats, text, context, limit)
    result.tokens = halves["search"].tokens
    about = [documents, asdict(options), input_files(plan.models),
             [[list(map(int, s.ids)) for s in (*half.chats, *half.text)] for half in halves.values()]]  # fmt: skip
    key = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()
    ways = {"search": compass, "random": at_random(random.Random(f"merge search {seed}")), "grid": grid}
    most = len(ways) * evaluations + len(ways) + 3
    with PlanJournal(journal, key) as before:
        trial = _Trial(documents, knobs, halves, before, allow_unrelated)

        def measure(way: str, values: Values, half: str = "search") -> Figures:
            figures = trial.measure(values, half)
            result.evaluations = trial.evaluations
            if progress:
                progress(f"merging and measuring ({way})", trial.evaluations, most)
            return figures

        start = tuple(knob.value for knob in knobs)
        first = measure("start", start)
        result.tried.append(_row("start", start, first, first))
        for way, propose in ways.items():
            settings = propose(knobs, evaluations)
            values = next(settings, None)
            while values is not None:
                figures = measure(way, values)
                result.tried.append(_row(way, values, figures, first))
                try:
                    values = settings.send(result.tried[-1]["score"])
                except StopIteration:
                    values = None
        for way in ("start", *ways):
            rows = [row for row in result.tried if row["by"] == way or (way == "search" and row["by"] == "start")]
            result.best[way] = min(rows, key=lambda row: float(row["score"]))
        unseen = measure("start", start, "confirm")
        for way, row in result.best.items():
            result.confirmed[way] = _row(way, row["values"], measure(way, tuple(row["values"]), "confirm"), unseen)
    result.documents = with_values(documents, knobs, result.best["search"]["values"])
    result.seconds = time.perf_counter() - started
    return result


def knobs_of(documents: Sequence[Document], where: str) -> list[Knob]:
    """The plain numbers of a recipe that are searched; one that stands for several models is one knob.

    Raises ConfigError where there is none.
    """
    knobs: list[Knob] = []

    def visit(value: Any, path: tuple[str | int, ...], within: bool, owner: str) -> None:
        if isinstance(value, Mapping):
            owner = str(value.get("model", owner)) if isinstance(value.get("model", ""), str) else owner
            for key, item in value.items():
                number = isinstance(item, (int, float)) and not isinstance(item, bool)
                if within and key in SEARCHED and number:
                    of = f" of {os.path.basename(owner)}" if owner else ""
                    knobs.append(_knob(f"{key}{of}", key, (*path, key), float(item)))
                elif not within or isinstance(item, Mapping):
                    visit(item, (*path, key), within or key == "parameters", owner)
        elif isinstance(value, list) and not within:
            for place, item in enumerate(value):
                visit(item, (*path, place), within, owner)

    for number, document in enumerate(documents):
        visit(document, (number,), False, str(document.get("name") or "") if len(documents) > 1 else "")
    if not knobs:
        raise ConfigError(
            f"{where}: sets no {', '.join(SEARCHED[:-1])} or {SEARCHED[-1]} as a plain number; give those that "
            f"are to be searched a value to begin with"
        )
    return knobs


def _knob(name: str, key: str, path: tuple[str | int, ...], value: float) -> Knob:
    """Searched from 0 to half as much again, at least to 1; t between 0 and 1."""
    if key == "t":
        return Knob(name, path, value, 0.0, 1.0)
    return Knob(name, path, value, min(0.0, 1.5 * value), max(1.0, 1.5 * value) if value >= 0 else 0.0)


def with_values(documents: Sequence[Document], knobs: Sequence[Knob], values: Sequence[float]) -> list[Document]:
    """The documents with other numbers in the knobs' places."""
    changed = copy.deepcopy(list(documents))
    for knob, value in zip(knobs, values, strict=True):
        place: Any = changed
        for step in knob.path[:-1]:
            place = place[step]
        place[knob.path[-1]] = round(value, 6)
    return changed


Settings = Iterator[Values]


def compass(knobs: Sequence[Knob], count: int) -> Any:
    """One knob after another, a step up and a step down from the best so far; a round without a gain halves the step.

    Compass search (Hooke and Jeeves 1961). It begins at the recipe's own values, which are measured already.
    """
    best, least = tuple(knob.value for knob in knobs), 0.0  # scores are relative to the recipe's own
    step, seen = _FIRST_STEP, {best}
    while count > 0 and step >= _LAST_STEP:
        better = False
        for number, sign in itertools.product(range(len(knobs)), (1, -1)):
            knob = knobs[number]
            moved = min(knob.high, max(knob.low, best[number] + sign * step * (knob.high - knob.low)))
            values = (*best[:number], moved, *best[number + 1 :])
            if values in seen or count == 0:
                continue
            seen.add(values)
            count -= 1
            score = yield values
            if score < least:
                best, least, better = values, score, True
        step = step if better else step / 2


def at_random(draw: random.Random) -> Callable[[Sequence[Knob], int], Any]:
    """Settings drawn evenly from the whole range."""

    def settings(knobs: Sequence[Knob], count: int) -> Any:
        for _ in range(count):
            yield tuple(draw.uniform(knob.low, knob.high) for knob in knobs)

    return settings


def grid(knobs: Sequence[Knob], count: int) -> Any:
    """As many even places in each range as there are evaluations for, in the first ranges one more where that fits;
    what is left lies on the diagonal. Where there are not even two, all knobs by one factor."""
    places = [int(count ** (1 / len(knobs)) + 1e-9)] * len(knobs)
    if places[0] < 2:
        for i in range(count):
            yield tuple(min(k.high, max(k.low, k.value * 1.5 * (i + 1) / count)) for k in knobs)
        return
    for i, own in enumerate(places):
        if math.prod(places) // own * (own + 1) <= count:
            places[i] += 1
    shares = itertools.product(*([i / (own - 1) for i in range(own)] for own in places))
    left = ([(i + 1) * _GOLDEN % 1] * len(knobs) for i in range(count - math.prod(places)))
    for each in (*shares, *left):
        yield tuple(k.low + (k.high - k.low) * share for k, share in zip(knobs, each, strict=True))


class _Trial:
    """Merges settings in memory and measures them; what the journal holds is not measured again."""

    def __init__(
        self, documents: list[Document], knobs: list[Knob], halves: Mapping[str, HeldOut], journal: PlanJournal,
        allow_unrelated: bool,
    ) -> None:  # fmt: skip
        self.documents, self.knobs, self.halves, self.journal = documents, knobs, halves, journal
        self.allow_unrelated = allow_unrelated
        self.evaluations = 0
        self._runners: dict[str, Runner] = {}
        self._merged: tuple[Values, Any] | None = None

    def measure(self, values: Values, half: str) -> Figures:
        key = f"{half} {json.dumps(values)}"
        self.evaluations += 1
        if (line := self.journal.lines.get(key)) is not None:
            figures: Figures = line["figures"]
            return figures
        model = self._model(values)
        runner = self._runners.setdefault(half, Runner(model, self.halves[half]))
        runner.model = model
        runner.start()
        figures = runner.score()
        self.journal.add(key, figures, 1.0)
        return figures

    def _model(self, values: Values) -> Any:
        if self._merged is None or self._merged[0] != values:
            self._merged = None  # two models are not in memory at once
            recipe = parse_stages(with_values(self.documents, self.knobs, values))
            with as_checkpoint(plan_merge(recipe, allow_unrelated=True, dtype="float32")) as merged:
                self._merged = values, load_readable(merged, torch.float32).requires_grad_(False)
        return self._merged[1]


def _row(way: str, values: Sequence[float], figures: Mapping[str, float], start: Mapping[str, float]) -> dict[str, Any]:
    """A line of the table. score: the mean logarithm of what response NLL and bits per byte are of the start's."""
    kinds = [kind for kind in ("response_nll", "bits_per_byte") if kind in start]
    score = sum(math.log(max(figures[kind], 1e-9) / max(start[kind], 1e-9)) for kind in kinds) / len(kinds)
    sound = score if math.isfinite(score) else 1e9
    return {"by": way, "values": list(values), **{kind: figures[kind] for kind in kinds}, "score": sound}


def _read_halves(
    tokenizer: Tokenizer, chats: Files, text: Files | None, context: int, limit: int
) -> dict[str, HeldOut]:
    """Every second chat and document for the search, the others to confirm; a single document is cut in two."""
    talks = list(itertools.islice(corpus.chats(chats), 8 * limit))
    texts = [document.text for document in itertools.islice(corpus.documents(text), 8 * limit)] if text else []
    if len(texts) == 1:
        texts = [texts[0][: len(texts[0]) // 2], texts[0][len(texts[0]) // 2 :]]
    if len(talks) < 2:
        raise DataError(
            f"plan: {format_count(len(talks), 'chat')}; one to search on and one to confirm with are the least"
        )
    return {
        half: make_held_out(tokenizer, talks[i::2], texts[i::2], context=context, limit=limit)
        for i, half in enumerate(("search", "confirm"))
    }


def _percent(won: float) -> str:
    return f"{abs(1 - math.exp(-won)):.1%} {'better' if won >= 0 else 'worse'}"
