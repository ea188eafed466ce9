"""What a changed setting has begin anew, what it leaves as it is, and what nothing is learned from and measured on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lapis.errors import DataError, TrainingError
from lapis.language import adapt as flow
from lapis.language.adapt import adapt
from lapis.language.card.folder import held_out_of, how_made
from lapis.language.plan import read_plan
from lapis.language.replay import Drawn
from lapis.language.steps import Steps
from lapis.language.texts import is_held_out
from lapis.language.training.held_out import divide_drawn, halves
from lapis.text.rows.mixture import Mixture
from lapis.text.rows.rows import Rows
from lapis.training.optim.optimizers import Optimizers
from lapis.weights.graft.graft import graft

from .conftest import MALAY, TINY

Plan = Callable[..., dict[str, Any]]


class StopError(Exception):
    pass


def stopped(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, at: int = 3) -> None:
    """An adaptation that ends before step `at` of its first training, as by a kill."""
    step = Optimizers.step

    def stop(self: Optimizers, scale: float, number: int = 0) -> None:
        if number == at:
            raise StopError
        step(self, scale, number)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(Optimizers, "step", stop)
        adapt(settings)
    assert (Path(settings["out"]) / ".embedded.lapis" / ".journal" / f"step-{at}").is_dir()


def weights(folder: Path, step: str) -> bytes:
    return (folder / step / "model.safetensors").read_bytes()


def test_a_stopped_training_begins_anew_with_other_settings(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"chat": None, "card": False, "train": {**TINY, "save_every": 1}, "tokens_per_second": 1e3}
    for number, changes in enumerate(({"rows_lr": 2e-3}, {"vocab": 30}, {})):
        cut, whole = tmp_path / f"cut-{number}", tmp_path / f"whole-{number}"
        remarks: list[str] = []
        stopped(plan(**how, out=str(cut)), monkeypatch)
        adapt(plan(**{**how, **changes}, out=str(cut)), note=remarks.append)
        adapt(plan(**{**how, **changes}, out=str(whole)))
        assert all(weights(cut, step) == weights(whole, step) for step in ("embedded", "adapted")), changes
        told = "embedded: begins anew, since what it reads or a setting has changed since it was stopped" in remarks
        assert told == bool(changes)  # the same settings go on


def test_a_damaged_checkpoint_is_refused_with_a_remedy(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that this command has, in place of an option of `lapis train`."""
    settings = plan(chat=None, card=False, train={**TINY, "save_every": 1}, tokens_per_second=1e3)
    stopped(settings, monkeypatch)
    staging = tmp_path / "out" / ".embedded.lapis"
    for checkpoint in (staging / ".journal").glob("step-*"):
        (checkpoint / "rng.safetensors").unlink()
    with pytest.raises(TrainingError, match=rf"or remove {staging} to start anew$"):
        adapt(settings)
    shutil.rmtree(staging)
    adapt(settings)


def test_a_step_cut_while_removing_another_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two settings comes next: what is left of a training's folder is never gone on with."""
    begun: list[bool] = []

    def make(folder: Path, overwrite: bool) -> None:
        root = folder.with_name(f".{folder.name}.lapis")
        begun.append(root.is_dir())
        (root / ".journal").mkdir(parents=True, exist_ok=True)
        (root / "owner.json").write_text('{"kind": "training"}')
        raise StopError

    def cut(out: Path) -> None:
        raise StopError

    def run(setting: int) -> None:
        with pytest.raises(StopError):
            Steps(tmp_path).run("one", {"a": setting}, [], make)

    run(1)
    run(1)
    assert begun == [False, True]  # the same settings go on
    for after in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("lapis.language.steps.give_up", cut)
            run(2)
        run(after)
    assert begun == [False, True, False, False]


def test_a_stopped_graft_begins_anew_with_another_scale(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any, progress: Callable[[float, float], None], **more: Any) -> Any:
        def cut(done: float, total: float) -> None:
            if done >= total / 2:
                raise StopError

        return graft(*given, progress=cut, **more)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(flow, "graft", stop)
        adapt(plan(card=False))
    assert (tmp_path / "out" / ".grafted.lapis" / "owner.json").is_file()
    adapt(plan(card=False, scale=0.5))
    assert json.loads((tmp_path / "out" / "grafted" / "lapis-merge.json").read_text())["recipe"]["scale"] == 0.5


def test_settings_without_effect_repeat_no_training(plan: Plan, tmp_path: Path) -> None:
    def made() -> list[int]:
        return [(tmp_path / "out" / step / "training.json").stat().st_mtime_ns for step in ("embedded", "adapted")]

    how = {"chat": None, "card": False}
    adapt(plan(**how))
    before = made()
    for quiet in ({"save_every": 2}, {"log_every": 3}, {"certify": "off"}, {"keep": 1}, {"device": "cpu"}):
        adapt(plan(**how, train={**TINY, **quiet}))
        assert made() == before, quiet
    adapt(plan(**how, train={**TINY, "save_dtype": "bfloat16"}))  # of which the result's file depends
    assert all(now != then for now, then in zip(made(), before, strict=True))


def test_the_second_training_begins_with_other_rows(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[set[int]] = []
    for kind in (Rows, Mixture):
        take = kind.indices

        def spied(self: Any, cursor: Any, size: int, take: Any = take) -> Any:
            numbers, after = take(self, cursor, size)
            text = len(self.sources[0]) if isinstance(self, Mixture) else len(self)
            rows.append({int(number) for number in numbers if number < text})
            return numbers, after

        monkeypatch.setattr(kind, "indices", spied)
    adapt(plan(chat=None, card=False, train={**TINY, "eval_every": 0, "certify": "off"}))
    first, second = rows[:6], rows[-6:]
    assert all(first) and all(second) and not first[0] & second[0]
    common = len(set().union(*first) & set().union(*second)) / len(set().union(*second))
    assert common < 0.5  # by chance, not all


def texts_of(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_scales_are_not_learned_on_what_is_measured(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read = tmp_path / "out", list[list[str]]()

    class Learned:
        base = ""

        def save(self, path: Path) -> None:
            path.write_text("scales: {}")

    def learn(*given: Any, text: Path, **more: Any) -> Learned:
        read.append(texts_of(text))
        return Learned()

    def stop(*given: Any, **more: Any) -> None:
        raise StopError

    for name, other in (("plan_pieces", learn), ("draw_replies", lambda *given: []), ("graft", stop)):
        monkeypatch.setattr(flow, name, other)
    for scored, is_scarce in ((100_000, True), (200, False)):
        settings = plan(scale="plan", vocab=0, card=False, scored=scored)
        with pytest.raises(StopError):
            adapt(settings)
        held, measured = texts_of(out / "measure" / "text.held.jsonl"), held_out_of(out, read_plan(settings))
        texts = measured["target"].texts
        assert read[-1] and texts and not {*read[-1]} & {*texts}
        assert is_scarce is (sorted([*read[-1], *texts]) == sorted(held)) is (texts != held)
        names = {"chats.jsonl", "text.held.jsonl"} | ({"text.spare.jsonl"} if is_scarce else set())
        assert names <= how_made(out, read_plan(settings))["data"].keys()
    assert len(held_out_of(out, read_plan(plan(vocab=0)))["target"].texts) == len(held)  # scales of no plan


def test_held_out_text_is_divided_for_scales() -> None:
    assert halves(["a", "b", "c"]) == (["a", "c"], ["b"])
    assert halves(["one two"]) == (["one"], [" two"])
    with pytest.raises(DataError, match="the held-out text is one word; give more text, or a number as scale"):
        halves(["a"])


def test_drawn_text_is_learned_from_or_held_out() -> None:
    texts = [*MALAY[:40], *MALAY[:40], f" {MALAY[0]}"]
    learn, held = divide_drawn([Drawn(f"<s>{text}", text, 3) for text in texts], "base")
    assert len(learn) + len(held) == 40 and held and all(is_held_out(each.plain) for each in held)
    assert not {each.plain for each in learn} & {each.plain for each in held}
    for few in (MALAY[:2], [text for text in MALAY if is_held_out(text)][:2]):
        assert [len(part) for part in divide_drawn([Drawn(text, text, 3) for text in few], "base")] == [1, 1]
    with pytest.raises(DataError, match="base draws one text again and again; give text as replay"):
        divide_drawn([Drawn("a", "a", 1), Drawn("a ", "a ", 1)], "base")


def test_a_model_that_draws_one_text_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = plan(chat=None, chats=[], replay=["self"], card=False)
    monkeypatch.setattr(flow, "draw_texts", lambda *given: [Drawn("The dog.", "The dog.", 3)] * 9)
    with pytest.raises(DataError, match="draws one text again and again"):
        adapt(settings)
    remarks: list[str] = []
    monkeypatch.setattr(flow, "draw_texts", lambda *given: [Drawn(text, text, 3) for text in MALAY[:9] * 2])
    adapt(settings, note=remarks.append)
    assert "replay: left out 9 texts that the model had drawn before" in remarks
