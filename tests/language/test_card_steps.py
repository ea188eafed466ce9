"""The steps of an adaptation that a card measures: those of the plan in its folder, and no others."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapis.language.adapt import adapt
from lapis.language.card.folder import gather, models_of
from lapis.language.plan import AdaptPlan

from .conftest import STEP


def test_a_card_looks_at_the_steps_of_its_plan(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """What an earlier plan left in the folder is no part of it."""
    out = tmp_path / "out"
    adapt(plan(tokens=2 * STEP, replay=["self"], card=False))
    steps = adapt(plan(tokens=2 * STEP, replay=[], chat=None, vocab=0, chats=[]))["steps"]
    assert list(steps) == ["measure", "adapted", "card"]
    assert all((out / name).is_dir() for name in ("replay", "start", "embedded", "calibrated", "grafted"))
    own = json.loads((out / "card" / "card.json").read_text())
    gathered = gather([out], {}, 1500)
    assert list(gathered.models) == list(own["steps"]) == ["base", "adapted"]
    assert list(gathered.held) == list(own["languages"]) == ["target"]
    assert gathered.how == own["how"] and gathered.how["settings"]["new tokens"] == 0
    assert sorted(gathered.how["data"]) == ["text.held.jsonl", "text.jsonl", "text.spare.jsonl"]


def test_what_a_plan_leaves_open_its_folder_says(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Whether tokens are added, and whether the chat template has tokens that the base lacks."""
    settings, out = plan(vocab="auto", scale="plan"), tmp_path / "out"
    adapt(settings, dry_run=True)
    for name in ("start", "embedded", "adapted", "merged", "calibrated", "worded", "grafted", "mine"):
        shutil.copytree(settings["base"], out / name)
    (out / "measure").mkdir()

    def models(add: int) -> list[str]:
        (out / "measure" / "fertility.json").write_text(json.dumps({"recommendation": {"add": add}}))
        return list(models_of(out))

    assert models(0) == ["base", "chat", "adapted", "grafted"]
    assert models(40) == ["base", "chat", "start", "embedded", "adapted", "calibrated", "grafted"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = Path(settings["base"]) / name
        file.write_text(file.read_text().replace("<|im_", "<|spare_"))
    assert models(0) == ["base", "chat", "adapted", "worded", "grafted"]


def test_every_step_of_a_plan_is_told() -> None:
    whole = {"chat": "c", "replay": ("self",), "merge_back": 0.1, "scale": "plan"}
    names = AdaptPlan("b", ("t",), "o", **whole).step_names
    assert names[-5:] == ["calibrated", "worded", "planned", "grafted", "card"]
    names.insert(-4, "restored")
    told = sys.modules[adapt.__module__].__doc__ or ""
    rows = (Path(__file__).parents[2] / "docs" / "language.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("/")[0].strip() for line in told.splitlines() if "/ " in line[:16]] == names
    assert [row.split("`")[1] for row in rows if row.startswith("| `") and "/`" in row[:16]] == [f"{n}/" for n in names]
