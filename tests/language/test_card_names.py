"""What the models of a card are called, where folders have the names of steps or of the yardstick; and its page."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lapis.errors import ConfigError
from lapis.language.card.card import make_card
from lapis.language.card.folder import gather
from lapis.language.card.scores import HeldOutText

from .conftest import MALAY, make, write


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An adaptation, `ms`, whose steps are its base, and folders of models that are called as steps are."""
    (tmp_path / "models").mkdir()
    base = make(tmp_path / "models" / "base", 0)
    for name in ("ms/measure", "ms/tokenizer"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ms/adapted", "ms/calibrated", "ms/start", "mine/merged", "mine/start", "mine/tuned", "yard/stick"):
        shutil.copytree(base, tmp_path / name)
    plan = {"base": str(base), "text": ["t"], "out": str(tmp_path / "ms"), "vocab": 40, "embedded": 0}
    (tmp_path / "ms" / "plan.yaml").write_text(yaml.safe_dump(plan))
    write(tmp_path / "ms.jsonl", MALAY[:4])
    return tmp_path


def names(place: Path, *folders: str, tuned: str = "") -> list[str]:
    given = {"text": [place / "ms.jsonl"]}
    listed = [place / folder for folder in folders]
    return list(gather(listed, given, 1000, place / tuned if tuned else None).models)


def test_a_folder_that_is_called_as_a_step_has_another_name(place: Path) -> None:
    steps = ["base", "start", "adapted", "calibrated"]
    assert names(place, "ms", "mine/start", "mine/merged") == [*steps, "mine/start", "merged"]
    assert names(place, "mine/start", "ms") == ["mine/start", *steps]  # whichever is named first
    assert names(place, "models/base", "ms", "ms/start") == steps  # these are the adaptation's own
    assert names(place, "mine/start", "mine/merged") == ["start", "merged"]
    shutil.copytree(place / "mine", place / "other" / "mine")
    with pytest.raises(ConfigError, match="two of these models are called mine/start; give each folder a name of its"):
        names(place, "ms", "mine/start", "other/mine/start")


def test_a_folder_called_as_the_yardstick_has_another_name(place: Path) -> None:
    assert names(place, "models/base", "mine/tuned") == ["base", "tuned"]
    assert names(place, "models/base", "mine/tuned", tuned="yard/stick") == ["base", "mine/tuned"]
    with pytest.raises(ConfigError, match="mine/tuned is among the models and is --tuned; name it once, since --tuned"):
        names(place, "models/base", "mine/tuned", tuned="mine/tuned")
    models = {"base": place / "models" / "base", "tuned": place / "mine" / "tuned"}
    with pytest.raises(ConfigError, match="a model is called tuned, as the yardstick is; give it another name"):
        make_card(models, {"target": HeldOutText(MALAY[:4])}, tuned=place / "yard" / "stick")


def test_the_way_begins_at_the_adaptations_own_model(place: Path) -> None:
    for folders, start in ((["mine/merged", "ms"], "calibrated"), (["models/base", "mine/merged"], "merged")):
        listed = [place / folder for folder in folders]
        assert gather(listed, {"text": [place / "ms.jsonl"]}, 1000).gap_from == start


def test_a_model_folder_is_measured_from_inside_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "models" / "base")
    assert list(gather([Path()], {"text": [place / "ms.jsonl"]}, 1000).models) == ["base"]


def test_notes_of_an_adaptation_are_not_those_of_a_model(place: Path) -> None:
    shutil.rmtree(place / "ms" / "calibrated")
    told = ["is not finished: it has no calibrated yet"]
    text = {"text": [place / "ms.jsonl"]}
    assert gather([place / "ms"], text, 1000).notes == {"ms": told}
    (place / "ms").rename(place / "adapted")
    assert gather([place / "adapted"], text, 1000).notes == {"the adaptation adapted": told}


@pytest.mark.browser
def test_a_card_reads_well_on_a_narrow_screen(
    place: Path, run: Callable[..., tuple[int, str, str]], check_narrow: Callable[..., None]
) -> None:
    command = ["card", place / "models" / "base", place / "mine" / "merged", "--text", place / "ms.jsonl"]
    status, _, error = run(*command, "--out", place / "card")
    assert status == 0, error
    page = (place / "card" / "index.html").read_text(encoding="utf-8")
    assert page.count("--tuned") == 1
    check_narrow(page, (1280, *range(400, 360, -4)))
