"""From a public model to one that speaks the user's language: `lapis adapt`.

    measure/    what the language costs, and whether to extend; the text, with a part held out
    tokenizer/  the tokenizer with more tokens             (not where none are added)
    start/      the model with rows for them               (not where none are added)
    embedded/   the new rows trained alone                 (not where none are added)
    adapted/    everything trained, on the language with some replay
    grafted/    adapted + scale x (chat - base)            (where a chat model is given)
    card/       two languages side by side, from base to end

Each step is an ordinary output of an ordinary command. A step that is there is not done again, unless what it read has
changed; a run that is stopped goes on with the same command.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lapis.checkpoint.commit import commit, commit_file
from lapis.config import build, dump_yaml, load_yaml
from lapis.errors import ConfigError, DataError, OutputError
from lapis.language.card.card import make_card, write_card
from lapis.language.card.scores import HeldOutText
from lapis.language.extend import Init, add_rows, open_source
from lapis.language.fertility import Report, fertility
from lapis.language.steps import Steps
from lapis.language.texts import first_bytes, read_texts
from lapis.model.check import read_config
from lapis.report.pages.fertility import fertility_page
from lapis.text.corpus import corpus
from lapis.text.corpus.files import files
from lapis.text.tokenizer.extend import ExtendableTokenizer
from lapis.text.tokenizer.folder import write_json
from lapis.training.rewards.language import SAMPLES, SCRIPTS, language
from lapis.training.run import read_settings
from lapis.training.run import run as train
from lapis.weights.graft.graft import graft
from lapis.weights.graft.layout import plan_graft

Bar = Callable[[str], AbstractContextManager[Report]]
PLAN = "plan.yaml"
SAME = 0.1  # share of the replay documents that may stand in the target's text, too
CHATS = 32  # that models are measured on
MOSTLY = 0.8  # share of documents in the language; below that it is told


@dataclass(frozen=True)
class AdaptPlan:
    """What to adapt to what. Every field is a key of plan.yaml.

    Args:
        base: The model to start from.
        text: Files, folders and globs of the language.
        out: The folder of the steps.
        replay: Text of what the model is not to lose.
        chat: The chat version of base, whose ability to chat is grafted on.
        chats: Chats of the language, to measure replies on.
        replay_chats: Chats of what the model knew.
        vocab: New tokens; "auto" takes the recommendation of the first step, 0 adds none.
        init: How new rows begin (`lapis tokenizer extend --init`).
        language: A code such as "ms", for the model card.
        minutes: Of training, both steps together.
        embedded: The share of the minutes in which new rows are trained alone.
        replay_share: The share of replay in what is read while everything is trained.
        lr: Peak learning rate while everything is trained.
        rows_lr: Peak learning rate of new rows, while they are trained alone.
        context: Tokens of a row.
        batch: Rows of a step.
        train: More settings of both trainings (`lapis train`), such as {steps: 500, minutes: null}.
        scale: Of the graft.
        cost: By which share bits per byte of the replay text may rise; more is told at the end.
        scored: Bytes of held-out text of each language that models are measured on.
        seed: Of everything.
    """

    base: str
    text: tuple[str, ...]
    out: str
    replay: tuple[str, ...] = ()
    chat: str | None = None
    chats: tuple[str, ...] = ()
    replay_chats: tuple[str, ...] = ()
    vocab: Literal["auto"] | int = "auto"
    init: Init | None = None
    language: str = ""
    minutes: float = 45.0
    embedded: float = 0.2
    replay_share: float = 0.1
    lr: float = 1e-4
    rows_lr: float = 1e-3
    context: int = 512
    batch: int = 16
    train: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    cost: float = 0.03
    scored: int = 40_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("adapt: text is missing; give files of the language")
        for name in ("embedded", "replay_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"adapt: {name} is {getattr(self, name)}; it is a share, from 0 to below 1")
        if isinstance(self.vocab, int) and self.vocab < 0:
            raise ConfigError(f"adapt: vocab is {self.vocab}; give auto, 0 for no new tokens, or their number")
        if self.minutes <= 0:
            raise ConfigError(f"adapt: minutes is {self.minutes:g}; it must be above 0")


def read_plan(settings: Mapping[str, Any], where: str = "adapt") -> AdaptPlan:
    """A plan from the mapping of a file.

    Args:
        settings: Its keys; lists may be given as one text.
        where: Named in errors.

    Raises:
        ConfigError: For an unknown key, or a value of another type.
    """
    lists = ("text", "replay", "chats", "replay_chats")
    listed = {key: [value] if key in lists and isinstance(value, str) else value for key, value in settings.items()}
    return build(AdaptPlan, listed, where)


def adapt(
    plan: AdaptPlan | Mapping[str, Any] | str | os.PathLike[str],
    *,
    dry_run: bool = False,
    bar: Bar = lambda label: nullcontext(lambda done, total, label="": None),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Adapts a model to a language, or goes on with it.

    Args:
        plan: What to adapt to what: a plan, its fields, or a YAML file with them.
        dry_run: Check everything, write plan.yaml, and do nothing.
        bar: Shows progress of what is not a training.
        note: Called with a line for each step.

    Returns:
        `steps` (name -> directory), and when it is done `scores`, `gap_closed`, `cost`, `won` and `card`.

    Raises:
        ConfigError: For a plan that cannot be.
        DataError: For text that is missing, or replay text that is the target's.
        CheckpointError: For a model that cannot be adapted, or a chat model of another base.
        OutputError: For a folder that is not an adaptation's, or a step that was changed by hand.
    """
    if not isinstance(plan, AdaptPlan):
        plan = read_plan(plan, "adapt") if isinstance(plan, Mapping) else read_plan(load_yaml(Path(plan)), str(plan))
    out = Path(os.path.abspath(plan.out))
    _check(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(plan).items()}
    with commit_file(out / PLAN, overwrite=True) as path:
        path.write_text(dump_yaml(settings), encoding="utf-8")
    if dry_run:
        names = ["measure", *(["tokenizer", "start", "embedded"] if plan.vocab else []), "adapted"]
        names += ["grafted"] * (plan.chat is not None) + ["card"]
        return {"plan": str(out / PLAN), "steps": {name: str(out / name) for name in names}, "dry_run": True}
    return _Adaptation(plan, Steps(out), bar, note).run()


class _Adaptation:
    """An adaptation on its way. models: What there is to measure, in its order."""

    def __init__(self, plan: AdaptPlan, steps: Steps, bar: Bar, note: Callable[[str], None]) -> None:
        self.plan, self.steps, self.bar, self.note = plan, steps, bar, note
        self.models: dict[str, str | Path] = {"base": plan.base}
        self.inputs = {"base": _stamps([plan.base]), "chat": _stamps([plan.chat] if plan.chat else [])}

    def run(self) -> dict[str, Any]:
        plan, steps = self.plan, self.steps
        texts = {name: _stamps(files(list(getattr(plan, name)))) for name in ("text", "replay") if getattr(plan, name)}
        steps.run("measure", {**texts, "base": self.inputs["base"], "scored": plan.scored}, [], self._measure)
        added = self._added()
        last = ["measure"]
        if added:
            self.note(f"tokenizer: {added:,} new tokens")
            steps.run("tokenizer", {"add": added}, ["measure"], self._tokenizer)
            steps.run("start", {"init": plan.init, "seed": plan.seed}, ["tokenizer"], self._start)
            self.models["start"] = steps.done["start"]
            last = ["start"]
            if plan.embedded:
                self._train("embedded", steps.done["start"], plan.embedded, plan.rows_lr, self._rows(), last)
                last = ["embedded"]
        share = 1 - plan.embedded if added else 1.0
        self._train("adapted", list(self.models.values())[-1], share, plan.lr, {}, last)
        last = ["adapted"]
        if plan.chat is not None:
            self.note(f"grafted: adapted + {plan.scale:g} x (chat - base)")
            steps.run("grafted", {"scale": plan.scale, **self.inputs}, last, self._graft)
            self.models["grafted"] = steps.done["grafted"]
            last = ["grafted"]
        chats = {name: _stamps(files(list(paths))) for name, paths in self._chats().items() if paths}
        how = {"chats": chats, "scored": plan.scored, "language": plan.language}
        card = steps.run("card", how, ["measure", *last], self._card)
        written = load_yaml(card / "card.json")
        if written["cost"] is not None and written["cost"] > plan.cost:
            self.note(
                f"the replay text costs {written['cost']:.1%} more bits per byte than before, above {plan.cost:.1%}: "
                "take more replay, a lower lr, or a smaller scale"
            )
        return {
            "steps": {name: str(folder) for name, folder in steps.done.items()},
            **{key: written[key] for key in ("scores", "gap_closed", "won", "cost")},
            "card": str(card / "index.html"),
        }

    def _measure(self, folder: Path, overwrite: bool) -> None:
        plan = self.plan
        self.note("measure: what this language costs, and whether to extend")
        if plan.language in {*SCRIPTS, *SAMPLES}:
            share = share_in_language(plan.language, _documents(plan.text))
            if share < MOSTLY:
                self.note(f"text: {share:.0%} of the documents look like {plan.language}; the rest is another language")
        with self.bar("reading text") as report, commit(folder, kind="adapt", overwrite=overwrite) as staging:
            measured = fertility(plan.base, plan.text, replay=plan.replay, run=False, progress=report)
            write_json(staging.path / "fertility.json", measured.to_json())
            (staging.path / "index.html").write_text(fertility_page(measured.to_json()).render(), encoding="utf-8")
            for name in ("text", "replay"):
                if paths := getattr(plan, name):
                    learn, held = read_texts(paths)
                    _write_texts(staging.path / f"{name}.jsonl", learn)
                    _write_texts(staging.path / f"{name}.held.jsonl", first_bytes(held, plan.scored))
        self.note(measured.recommendation["reason"])

    def _added(self) -> int:
        if self.plan.vocab != "auto":
            return int(self.plan.vocab)
        return int(load_yaml(self.steps.done["measure"] / "fertility.json")["recommendation"]["add"])

    def _tokenizer(self, folder: Path, overwrite: bool) -> None:
        add = self._added()
        base = ExtendableTokenizer.open(open_source(self.plan.base)[0])
        with self.bar("learning merges") as report:
            counts = base.count_words(document.text for document in corpus.documents(self._text("text")))
            gained = base.learn(counts, add, progress=lambda done, total: report(done, total, "learning merges"))
        if not gained.enough:
            raise DataError(
                f"adapt: vocab is {add:,}, and the text carries {len(gained.tokens):,} new tokens; give vocab: "
                f"{len(gained.tokens)}, or more text"
            )
        with commit(folder, kind="adapt", overwrite=overwrite) as staging:
            base.copy_files(staging.path)
            base.write(staging.path, gained)

    def _start(self, folder: Path, overwrite: bool) -> None:
        source, checkpoint = open_source(self.plan.base)
        assert checkpoint is not None
        base = ExtendableTokenizer.open(source)
        gained = base.read_extension(self.steps.done["tokenizer"])
        with self.bar("making rows") as report:
            add_rows(
                checkpoint, base, gained, folder, init=self.plan.init, files=[self._text("text")], seed=self.plan.seed,
                overwrite=overwrite, progress=report,
            )  # fmt: skip

    def _rows(self) -> dict[str, Any]:
        """Settings that train the rows of new tokens and nothing else."""
        base = ExtendableTokenizer.open(open_source(self.plan.base)[0])
        gained = base.read_extension(self.steps.done["tokenizer"])
        return {"freeze": ["all"], "tokens": list(range(gained.first, gained.first + len(gained.tokens)))}

    def _train(
        self, name: str, model: str | Path, share: float, lr: float, more: Mapping[str, Any], after: Sequence[str]
    ) -> None:
        plan = self.plan
        text, replay = str(self._text("text")), str(self._text("replay"))
        mixed = bool(plan.replay) and plan.replay_share > 0 and not more
        settings: dict[str, Any] = {
            "objective": "causal", "model": str(model), "minutes": plan.minutes * share, "lr": lr, "batch": plan.batch,
            "context": min(plan.context, read_config(str(model)).context), "seed": plan.seed, **more, **plan.train,
            "data": {text: 1 - plan.replay_share, replay: plan.replay_share} if mixed else [text],
        }  # fmt: skip

        def make(folder: Path, overwrite: bool) -> None:
            self.note(f"{name}: training " + ("new rows alone" if more else "everything"))
            train(read_settings({**settings, "out": str(folder)}, f"adapt: {name}"), overwrite=overwrite)

        described = {key: value for key, value in settings.items() if key not in ("data", "model")}
        self.models[name] = self.steps.run(name, {**described, "mixed": mixed, **self.inputs}, after, make)

    def _graft(self, folder: Path, overwrite: bool) -> None:
        plan = self.plan
        assert plan.chat is not None
        with self.bar("grafting") as report:
            graft(
                plan.base, plan.chat, self.steps.done["adapted"], folder, plan.scale, overwrite=overwrite,
                progress=lambda done, total: report(done, total, "grafting"),
            )  # fmt: skip

    def _chats(self) -> dict[str, tuple[str, ...]]:
        return {"target": self.plan.chats, "replay": self.plan.replay_chats}

    def _card(self, folder: Path, overwrite: bool) -> None:
        self.note("card: measuring every step in each language")
        languages = {}
        for name, part in (("target", "text"), ("replay", "replay")):
            if not getattr(self.plan, part):
                continue
            held = self.steps.done["measure"] / f"{part}.held.jsonl"
            chats = self._chats()[name]
            languages[name] = HeldOutText(
                [document.text for document in corpus.documents(held)],
                list(islice(corpus.chats(list(chats)), CHATS)) if chats else (),
            )
        with self.bar("measuring") as report, commit(folder, kind="adapt", overwrite=overwrite) as staging:
            write_card(staging.path, make_card(self.models, languages, how=self._how(), progress=report))

    def _how(self) -> dict[str, Any]:
        plan = self.plan
        fields = dataclasses.asdict(plan)
        settings = {
            key: ", ".join(value) if isinstance(value, tuple) else value
            for key, value in fields.items()
            if value not in (None, (), "", {})
        }
        digests = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.steps.done["measure"].glob("*.jsonl"))
        }
        return {**settings, "added": self._added(), "data": digests}

    def _text(self, part: str) -> Path:
        return self.steps.done["measure"] / f"{part}.jsonl"


def _check(plan: AdaptPlan, out: Path) -> None:
    """Whatever can be known to be wrong before anything is computed."""
    if out.exists() and any(out.iterdir()) and not (out / PLAN).is_file():
        raise OutputError(f"{out}: exists already and is no adaptation; give another --out")
    source, checkpoint = open_source(plan.base)
    if checkpoint is None:
        raise ConfigError(f"adapt: base is {plan.base}, which holds a tokenizer and no weights; give a model")
    if plan.vocab not in ("auto", 0):
        ExtendableTokenizer.open(source)
    for name in ("text", "replay", "chats", "replay_chats"):
        if paths := getattr(plan, name):
            files(list(paths))
    if plan.replay:
        target = {_digest(text) for text in _documents(plan.text)}
        replayed = [_digest(text) for text in _documents(plan.replay)]
        share = sum(digest in target for digest in replayed) / max(1, len(replayed))
        if share > SAME:
            raise DataError(
                f"adapt: {share:.0%} of the replay documents stand in the target's text, too; replay is text of what "
                "the model knew before, so give other files"
            )
    if plan.chat is not None:
        plan_graft(plan.base, plan.chat, plan.base)


def share_in_language(code: str, texts: Iterable[str]) -> float:
    """The share of texts that look like a language more than like any other that is known.

    Args:
        code: Of the language, such as "ms".
        texts: Documents; the first 200 are looked at, and of each its beginning.
    """
    rivals = [name for name in (*SCRIPTS, *SAMPLES) if code == name or {code, name} != {"ms", "id"}]  # too near to tell
    sure = language(code, list(dict.fromkeys(rivals)))
    marks = [sure("", text[:1000], {}) >= 0.5 for text in islice(texts, 200)]
    return sum(marks) / max(1, len(marks))


def _documents(paths: Iterable[str]) -> Iterable[str]:
    return first_bytes((document.text for document in corpus.documents(list(paths))), 20_000_000)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode(errors="replace")).digest()


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    import json

    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _stamps(places: Iterable[str | Path]) -> list[list[Any]]:
    """Name, size and time of change of every file of some files and folders; of a model of the hub its name."""
    stamps: list[list[Any]] = []
    for place in map(Path, places):
        listed = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
        for path in listed:
            known = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
            stamps.append([str(path), *known])
    return stamps
