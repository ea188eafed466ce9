"""What is refused or told before anything is computed: settings of trainings, too little text, files in the way."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lapis.errors import CheckpointError, ConfigError, DataError, OutputError
from lapis.language.adapt import adapt
from lapis.language.card.folder import gather
from lapis.language.extend import extend

from .conftest import ENGLISH, MALAY, make, write

Plan = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train": {"wormup": 3}}, 'adapt: train: unknown key "wormup"; did you mean "warmup"?'),
        ({"train": {"warmup": "long"}}, "adapt: train: warmup is 'long'; expected a whole number"),
        ({"train": {"optimizer": "sgdx"}}, "adapt: train: optimizer is 'sgdx'; did you mean \"sgd\"?"),
        ({"context": 1}, "adapt: context is 1; give 2 tokens or more"),
        (
            {"replay": ["self", "en"]},
            "adapt: replay is self, en; give self alone, which has the model draw it, or files",
        ),
    ],
)
def test_settings_are_looked_at_before_the_first_step(plan: Plan, changes: dict[str, Any], why: str) -> None:
    settings = plan(**changes)
    with pytest.raises(ConfigError) as refusal:
        adapt(settings, dry_run=True)
    assert str(refusal.value).startswith(why)
    assert not Path(settings["out"]).exists()


def test_too_little_text_is_refused_before_the_first_step(plan: Plan, tmp_path: Path) -> None:
    one, blank = write(tmp_path / "one.jsonl", MALAY[:1] * 3), write(tmp_path / "blank.jsonl", [" "] * 3)
    for changes, count in (({"text": [str(one)]}, "1 text"), ({"text": [str(blank)]}, "0 texts")):
        with pytest.raises(DataError, match=f"holds {count}; give at least 2 that differ, to learn from one and hold"):
            adapt(plan(**changes, replay=[], language=""), dry_run=True)
    with pytest.raises(DataError, match=r"one\.jsonl: holds 1 text; give at least 2"):
        adapt(plan(replay=[str(one)], text=[str(write(tmp_path / "others.jsonl", MALAY[5:]))]), dry_run=True)
    assert not (tmp_path / "out").exists()


def test_a_longer_context_than_the_models_is_told(plan: Plan) -> None:
    notes: list[str] = []
    adapt(plan(context=1000), dry_run=True, note=notes.append)
    assert notes == ["context: 1,000 tokens are more than the model reads; rows of 64 are taken"]


def test_a_file_in_the_place_of_a_step(plan: Plan, tmp_path: Path) -> None:
    settings = plan(vocab=0, chat=None, card=False, tokens=128)
    adapt(settings, dry_run=True)
    (tmp_path / "out" / "measure").write_text("x")
    with pytest.raises(OutputError, match="out/measure: is a file in the place of a step; remove it to have the step"):
        adapt(settings)
    assert (tmp_path / "out" / "measure").read_text() == "x"


def test_languages_with_hardly_a_share_are_others(plan: Plan, tmp_path: Path) -> None:
    korean = [f"나는 오늘 학교에서 친구들과 함께 밥을 {n} 번 먹었습니다." for n in range(99)]
    texts = write(tmp_path / "many.jsonl", [*MALAY[:100], *korean, "Столиця України — Київ, він стоїть."])
    notes: list[str] = []
    adapt(plan(text=[str(texts)], replay=[], language="", chats=[]), dry_run=True, note=notes.append)
    (told,) = [note for note in notes if note.startswith("text: looks like")]
    assert "(0%)" not in told and told.startswith("text: looks like id or ms (50%), ko (50%); all of it")


def test_replay_that_is_the_text_is_told_by_extend(tmp_path: Path) -> None:
    base, text = make(tmp_path / "base", 0), write(tmp_path / "ms.jsonl", MALAY)
    result = extend(base, [text], tmp_path / "out", add=5, replay=[text])
    assert any(note.startswith("100% of the replay documents stand in the target's text") for note in result.notes)
    why = "add is 5, and the text carries 0 new tokens that occur 5 times or more and that the replay text lacks; give"
    with pytest.raises(DataError, match=why):
        extend(base, [text], tmp_path / "none", add=5, replay=[text], only_target=True)


def test_what_a_card_cannot_measure_is_refused_first(tmp_path: Path) -> None:
    base, text = make(tmp_path / "base", 0), write(tmp_path / "ms.jsonl", MALAY)
    (tmp_path / "none").mkdir()
    given = {"text": [text]}
    for models, tuned in (([base, tmp_path / "none"], None), ([base], tmp_path / "none")):
        with pytest.raises(CheckpointError, match=r"none: config\.json is missing; give the folder of a model"):
            gather(models, given, 1000, tuned)
    shutil.copytree(base, tmp_path / "wordless")
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"wordless: there is no tokenizer\.json"):
        gather([base, tmp_path / "wordless"], given, 1000)
    with pytest.raises(
        DataError, match="card: 100% of the replay documents stand in the target's text, too; replay is"
    ):
        gather([base], {**given, "replay": [text]}, 1000)
    replay = write(tmp_path / "en.jsonl", ENGLISH[:50])
    assert list(gather([base], {**given, "replay": [replay]}, 1000).held) == ["target", "replay"]
    with pytest.raises(ConfigError, match="card: --base-model is my model; give its name on the hub, owner/name"):
        gather([base], {**given, "base_models": ["owner/name", "my model"]}, 1000)
