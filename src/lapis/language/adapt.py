"""From a public model to one that speaks the user's language: `lapis adapt`.

    measure/    what the language costs, and whether to extend; the text, with a part held out
    replay/     text that the model draws itself           (where replay is "self")
    tokenizer/  the tokenizer with more tokens             (not where none are added)
    start/      the model with rows for them               (not where none are added)
    embedded/   the new rows trained alone                 (not where none are added)
    adapted/    everything trained but old rows, on the language with some replay
    merged/     that, mixed with what it was trained from  (where merge_back is given)
    calibrated/ that, new tokens as likely as they are     (where new rows began so)
    restored/   that, with chat's rows for its template    (where the chat model itself is trained)
    worded/     that, with rows for chat's own tokens      (where scale is "plan", and chat has any)
    planned/    a scale for each component                 (where scale is "plan")
    grafted/    the last model + scale x (chat - base)     (where a chat model is given)
    card/       two languages side by side, from base to end

Each step is an ordinary output of an ordinary command. A step that is there is not done again, unless what it read has
changed; a run that is stopped goes on with the same command.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.commit import commit, commit_file
from lapis.checkpoint.files import read_json
from lapis.config import dump_yaml, load_yaml
from lapis.language.card.card import make_card, write_card
from lapis.language.card.folder import PARTS, added_tokens, held_out_of, how_made, measured_files, parents_of
from lapis.language.extend import SAMPLE, add_rows, open_source, require_enough
from lapis.language.fertility import Report, fertility
from lapis.language.inputs import check_inputs, check_trainings, stamps, with_whole_paths
from lapis.language.machine import with_earlier_measures, with_measures
from lapis.language.plan import PLAN, AdaptPlan, read_plan
from lapis.language.replay import bits_per_byte, draw_replies, draw_texts
from lapis.language.rows.calibrate import calibrate_again
from lapis.language.steps import Steps
from lapis.language.texts import after_bytes, first_bytes, first_sentence, read_texts, write_lines, write_texts
from lapis.model.check import read_config
from lapis.planning.plan import plan as plan_pieces
from lapis.report.pages.fertility import fertility_page
from lapis.text.corpus import corpus
from lapis.text.corpus.files import files
from lapis.text.tokenizer.extend import ExtendableTokenizer, changed_share
from lapis.text.tokenizer.folder import write_json
from lapis.training.run import read_settings
from lapis.training.run import run as train
from lapis.weights.graft.graft import graft
from lapis.weights.graft.layout import plan_graft
from lapis.weights.merge.merge import merge
from lapis.wording import format_count

Bar = Callable[[str], AbstractContextManager[Report]]
PROMPTS = 64  # to which chat replies where scales are learned
BITS = "replay/bits_per_byte"


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
        `out`, `steps` (name -> directory), and with a card `scores`, `gap_closed`, `cost`, `won` and `card`.

    Raises:
        ConfigError: For a plan that cannot be.
        DataError: For text that is missing, or replay text that is the target's.
        CheckpointError: For a model that cannot be adapted, or a chat model of another base.
        OutputError: For a folder that is not an adaptation's, or a step that was changed by hand.
    """
    if not isinstance(plan, AdaptPlan):
        plan = read_plan(plan, "adapt") if isinstance(plan, Mapping) else read_plan(load_yaml(Path(plan)), str(plan))
    plan = with_whole_paths(plan)
    out = Path(plan.out)
    for remark in check_inputs(plan, out):
        note(remark)
    plan = with_earlier_measures(plan, out, note)
    check_trainings(plan)
    if not dry_run:
        with bar("measuring how fast this machine trains"):
            plan = with_measures(plan)
    out.mkdir(parents=True, exist_ok=True)
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(plan).items()}
    with commit_file(out / PLAN, overwrite=True) as path:
        path.write_text(dump_yaml(settings), encoding="utf-8")
    if dry_run:
        return {"plan": str(out / PLAN), "steps": {name: str(out / name) for name in plan.step_names}, "dry_run": True}
    shares = (plan.embedded, 1 - plan.embedded) if plan.vocab and plan.embedded else (1.0,)
    note(f"training: {plan.tokens_of(*shares):,} tokens, {plan.time_of(*shares)}")
    return _Adaptation(plan, Steps(out), bar, note).run()


class _Adaptation:
    """An adaptation on its way. models: What there is to measure, in its order."""

    def __init__(self, plan: AdaptPlan, steps: Steps, bar: Bar, note: Callable[[str], None]) -> None:
        self.plan, self.steps, self.bar, self.note = plan, steps, bar, note
        self.models: dict[str, str | Path] = {plan.onto: plan.source}
        self.inputs = {"base": stamps([plan.base]), "chat": stamps([plan.chat] if plan.chat else [])}

    @property
    def last_model(self) -> str | Path:
        """The newest model."""
        return list(self.models.values())[-1]

    def run(self) -> dict[str, Any]:
        plan, steps = self.plan, self.steps
        texts = {name: stamps(files(list(paths))) for name, paths in plan.texts.items()}
        how = {"base": self.inputs[plan.onto], "scored": plan.scored, "context": plan.context}
        steps.run("measure", {**texts, **how}, [], self._measure)
        last = ["measure"]
        if plan.draws_replay:
            steps.run("replay", {"tokens": plan.drawn_tokens, "seed": plan.seed, **how}, last, self._draw_replay)
            last = ["replay"]
        added = added_tokens(steps.out, plan)
        if added:
            self.note(f"tokenizer: {format_count(added, 'new token')}")
            steps.run("tokenizer", {"add": added}, last, self._tokenizer)
            steps.run("start", {"init": plan.init, "seed": plan.seed}, ["tokenizer"], self._start)
            self.models["start"] = steps.done["start"]
            last = ["start"]
            if plan.embedded:
                alone = {"lr": plan.rows_lr, "freeze": ["all"], "tokens": self._new_rows, "share_rows": True}
                self._train("embedded", steps.done["start"], plan.embedded, alone, last)
                last = ["embedded"]
        share = 1 - plan.embedded if added else 1.0
        rates = self._rates_of_rows() if added and not plan.old_rows else {}
        self._train("adapted", self.last_model, share, {"lr": plan.lr, "ema": plan.ema, **rates}, last)
        last = ["adapted"]
        if share := plan.merged_back:
            self.note(f"merged: {1 - share:g} x adapted + {share:g} x what it was trained from")
            steps.run("merged", {"merge_back": share}, last, self._merge_back)
            self.models["merged"] = steps.done["merged"]
            last = ["merged"]
        if added and plan.calibrates:
            last = self._calibrate_again(last)
        if plan.onto == "chat":
            self.note(f"restored: {last[0]}, with chat's own rows for its template's tokens")
            last = [self._add_chat("restored", {}, last)]
        if plan.grafts:
            if plan.scale == "plan":
                last = self._plan_scales(last)
            self.note(f"grafted: {plan.scale} x (chat - base) is added")
            scale = str(plan.scale)
            last = [self._add_chat("grafted", {"scale": scale, "file": stamps([scale])}, last)]
        if ended := read_json(steps.done["adapted"] / "training.json").get("ended"):
            self.note(f"adapted: {ended}")
        card = self._card(last) if plan.card else {}
        return {"out": str(steps.out), "steps": {name: str(folder) for name, folder in steps.done.items()}, **card}

    def _measure(self, folder: Path, overwrite: bool) -> None:
        plan = self.plan
        self.note("measure: what this language costs, and whether to extend")
        with self.bar("reading text") as report, commit(folder, kind="adapt", overwrite=overwrite) as staging:
            measured = fertility(
                plan.source, plan.text, replay=plan.texts.get("replay", ()), run=False, progress=report
            )
            write_json(staging.path / "fertility.json", measured.to_json())
            (staging.path / "index.html").write_text(fertility_page(measured.to_json()).render(), encoding="utf-8")
            for name, paths in plan.texts.items():
                learn, held = read_texts(paths)
                write_texts(staging.path / f"{name}.jsonl", learn)
                write_texts(staging.path / f"{name}.held.jsonl", first_bytes(held, plan.scored))
                write_texts(staging.path / f"{name}.spare.jsonl", after_bytes(held, plan.scored))
            if "replay" in plan.texts:
                self._measure_base(staging.path)
        for remark in (*(f"measure: {note}" for note in measured.notes), measured.recommendation["reason"]):
            self.note(remark)

    def _measure_base(self, folder: Path) -> None:
        """Bits per byte of the held-out replay text in a folder, before anything is trained."""
        held = {"replay": folder / "replay.held.jsonl"}
        with self.bar("measuring the base") as report:
            bits = bits_per_byte(self.plan.source, held, self._context(self.plan.source), report)
        write_json(folder / "base.json", {name: round(value, 6) for name, value in bits.items()})

    def _draw_replay(self, folder: Path, overwrite: bool) -> None:
        plan = self.plan
        self.note("replay: drawing text from the model itself")
        with self.bar("drawing text") as report, commit(folder, kind="adapt", overwrite=overwrite) as staging:
            drawn = draw_texts(plan.source, plan.drawn_tokens, plan.seed, report)
            few = max(1, len(drawn) // 10)
            held = first_bytes((each.plain for each in drawn[:few]), plan.scored)
            write_texts(staging.path / "replay.held.jsonl", held)
            write_texts(staging.path / "replay.jsonl", (each.text for each in drawn[few:] or drawn))
            self._measure_base(staging.path)

    def _tokenizer(self, folder: Path, overwrite: bool) -> None:
        add = added_tokens(self.steps.out, self.plan)
        base = ExtendableTokenizer.open(open_source(self.plan.source)[0])
        with self.bar("learning merges") as report:
            counts = base.count_words(document.text for document in corpus.documents(self._text("text")))
            gained = base.learn(counts, add, progress=lambda done, total: report(done, total, "learning merges"))
        require_enough(gained, f"adapt: vocab is {add:,}", "vocab: ", "or more text")
        if self.plan.replay:
            replay = first_bytes((document.text for document in corpus.documents(self._text("replay"))), SAMPLE)
            share = changed_share(base.backend, base.extended(gained), replay)
            self.note(f"tokenizer: {share:.2%} of the replay text's characters are in other tokens than before")
        with commit(folder, kind="adapt", overwrite=overwrite) as staging:
            base.copy_files(staging.path)
            base.write(staging.path, gained)

    def _start(self, folder: Path, overwrite: bool) -> None:
        source, checkpoint = open_source(self.plan.source)
        assert checkpoint is not None
        base = ExtendableTokenizer.open(source)
        gained = base.read_extension(self.steps.done["tokenizer"])
        with self.bar("making rows") as report:
            made = add_rows(
                checkpoint, base, gained, folder, init=self.plan.init, files=[self._text("text")],
                replay=[self._text("replay")] if self.plan.replay else [], seed=self.plan.seed, overwrite=overwrite,
                progress=report,
            )  # fmt: skip
        for remark in made.notes:
            self.note(f"start: {remark}")

    def _rates_of_rows(self) -> dict[str, Any]:
        """Settings that train new rows at their own rate, and leave old ones as they are."""
        tables = ["embed"] if read_config(str(self.last_model)).tied else ["embed", "head"]
        rates = dict.fromkeys(tables, self.plan.rows_lr)
        return {"freeze": tables, "tokens": self._new_rows, "share_rows": True, "rates": rates}

    @cached_property
    def _new_rows(self) -> list[int]:
        """The ids of new tokens."""
        base = ExtendableTokenizer.open(open_source(self.plan.source)[0])
        gained = base.read_extension(self.steps.done["tokenizer"])
        return list(range(gained.first, gained.first + len(gained.tokens)))

    def _train(self, name: str, model: str | Path, share: float, how: Mapping[str, Any], after: Sequence[str]) -> None:
        """Trains `model` on a share of the tokens: new rows alone ("embedded"), or everything that `how` leaves."""
        plan, alone = self.plan, name == "embedded"
        text, replay = str(self._text("text")), str(self._text("replay"))
        mixed = bool(plan.replay) and plan.replay_share > 0 and not alone
        context = self._context(model)
        steps = plan.steps(share, context)
        sources = [{"path": text, "weight": 1 - plan.replay_share}, {"path": replay, "weight": plan.replay_share}]
        sources[1] |= {"special": "trusted"} if plan.draws_replay else {}
        settings: dict[str, Any] = {
            "objective": "causal", "model": str(model), "steps": steps, "batch": plan.batch, "context": context,
            "seed": plan.seed, "eval_every": plan.eval_every(steps), **how, **plan.train,
            "data": sources if mixed else [text], "valid": {name: str(path) for name, path in self._held().items()},
        }  # fmt: skip
        if plan.replay and settings["eval_every"] and not alone:
            settings["limits"] = {BITS: round(self._base_bits() * (1 + plan.cost), 6)}

        def make(folder: Path, overwrite: bool) -> None:
            what = "new rows alone" if alone else "everything"
            self.note(f"{name}: training {what}, {format_count(settings['steps'], 'step')}, {plan.time_of(share)}")
            train(read_settings({**settings, "out": str(folder)}, f"adapt: {name}"), overwrite=overwrite)

        described = {key: value for key, value in settings.items() if key not in ("data", "model", "valid")}
        described |= {"mixed": plan.replay_share if mixed else 0}
        self.models[name] = self.steps.run(name, {**described, **self.inputs}, after, make)

    def _merge_back(self, folder: Path, overwrite: bool) -> None:
        *_, before, trained = self.models.values()
        share = self.plan.merged_back
        weights = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((trained, 1 - share), (before, share))]
        with self.bar("merging") as report:
            merge(
                {"merge_method": "linear", "models": weights}, folder, overwrite=overwrite,
                progress=lambda done, total: report(done, total, "merging"),
            )  # fmt: skip

    def _calibrate_again(self, after: Sequence[str]) -> list[str]:
        """The step that makes new tokens as likely again as they are, once everything is trained."""
        trained, parts = self.last_model, ("text", "replay") if self.plan.replay else ("text",)
        base = ExtendableTokenizer.open(open_source(self.plan.source)[0])

        def make(folder: Path, overwrite: bool) -> None:
            self.note("calibrated: each new token as likely again as it is frequent")
            texts = {part: [document.text for document in corpus.documents(self._text(part))] for part in parts}
            with self.bar("reading text") as report:
                moved = calibrate_again(
                    open_checkpoint(trained), base, base.read_extension(self.steps.done["tokenizer"]), texts["text"],
                    folder, replay=texts.get("replay", ()), seed=self.plan.seed, overwrite=overwrite, progress=report,
                )  # fmt: skip
            if not moved:
                self.note("calibrated: rows stay as they were trained; moved, they made text less likely")

        self.models["calibrated"] = self.steps.run("calibrated", {"seed": self.plan.seed}, after, make)
        return ["calibrated"]

    def _add_chat(self, name: str, how: Mapping[str, Any], after: Sequence[str]) -> str:
        """A step that grafts chat onto the newest model: its difference, or only the rows of its template."""
        plan, onto = self.plan, self.last_model
        assert plan.chat is not None
        base, chat, scale = plan.base, plan.chat, plan.scale
        if name != "grafted":
            scale = 0.0
        elif "planned" in self.steps.done:
            scale = str(self.steps.done["planned"] / PLAN)
        if name == "restored":
            base = chat

        def make(folder: Path, overwrite: bool) -> None:
            with self.bar("grafting") as report:
                graft(
                    base, chat, onto, folder, scale, overwrite=overwrite,
                    progress=lambda done, total: report(done, total, "grafting"),
                )  # fmt: skip

        self.models[name] = self.steps.run(name, {**how, **self.inputs}, after, make)
        return name

    def _plan_scales(self, after: Sequence[str]) -> list[str]:
        """The step that learns a scale for each component, on replies of chat to text of the language."""
        plan, last = self.plan, list(after)
        assert plan.chat is not None
        if plan_graft(plan.base, plan.chat, self.last_model).new_tokens:  # a plan needs rows for them
            last = [self._add_chat("worded", {}, last)]
        chat, onto = plan.chat, self.last_model

        def make(folder: Path, overwrite: bool) -> None:
            self.note("planned: learning a scale for each component")
            with self.bar("planning") as report, commit(folder, kind="adapt", overwrite=overwrite) as staging:
                texts = [document.text for document in islice(corpus.documents(self._text("text")), PROMPTS)]
                chats = staging.path / "chats.jsonl"
                write_lines(chats, draw_replies(chat, [first_sentence(text) for text in texts]))
                spare = self._text("text").with_suffix(".spare.jsonl")  # on which no model is measured
                held = spare if spare.stat().st_size else self._held()["target"]
                base, lent = plan.base, staging.path / "base"
                if plan_graft(base, chat, base).new_tokens:  # chats are measured on base, too
                    graft(base, chat, base, lent, 0.0)
                    base = str(lent)
                learned = plan_pieces(
                    base, chat, chats=chats, text=held, onto=onto, cost=plan.cost or 1e-3,
                    pieces="components", seed=plan.seed, progress=lambda what, done, total: report(done, total, what),
                )  # fmt: skip
                shutil.rmtree(lent, ignore_errors=True)
                learned.base = str(plan.base)
                learned.save(staging.path / PLAN)

        self.steps.run("planned", {"cost": plan.cost, "seed": plan.seed, **self.inputs}, last, make)
        return ["planned"]

    def _card(self, last: list[str]) -> dict[str, Any]:
        """Measures every model; says what was won and what it cost."""
        plan, out = self.plan, self.steps.out
        settings = vars(plan)
        models = {**parents_of(settings), **self.models}

        def make(folder: Path, overwrite: bool) -> None:
            self.note("card: measuring every step in each language")
            with self.bar("measuring") as report, commit(folder, kind="adapt", overwrite=overwrite) as staging:
                how, held = how_made(out, plan), held_out_of(out, plan)
                write_card(staging.path, make_card(models, held, how=how, progress=report))

        fields = {name: settings[name] for name in ("scored", "language", "license")}
        after = {"files": stamps(chain.from_iterable(measured_files(settings).values())), **fields}
        card = self.steps.run("card", after, ["measure", *last], make)
        written = read_json(card / "card.json")
        if written["cost"] is not None and written["cost"] > plan.cost:
            self.note(
                f"the replay text costs {written['cost']:.1%} more bits per byte than before, above {plan.cost:.1%}: "
                "take more replay, merge_back: 0.1, a lower lr, or a smaller scale"
            )
        scores = {key: written[key] for key in ("scores", "gap_closed", "won", "cost")}
        return {**scores, "card": str(card / "index.html")}

    def _text(self, part: str) -> Path:
        """Text to learn from."""
        drawn = part == "replay" and self.plan.draws_replay
        return self.steps.done["replay" if drawn else "measure"] / f"{part}.jsonl"

    def _held(self) -> dict[str, Path]:
        """Held-out text of each language."""
        parts = {name: part for name, part in PARTS.items() if part == "text" or self.plan.replay}
        return {name: self._text(part).with_suffix(".held.jsonl") for name, part in parts.items()}

    def _base_bits(self) -> float:
        """Bits per byte of the replay text before anything was trained."""
        return float(read_json(self._text("replay").with_name("base.json"))[BITS])

    def _context(self, model: str | Path) -> int:
        return min(self.plan.context, read_config(str(model)).context)
