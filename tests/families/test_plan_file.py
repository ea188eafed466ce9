"""plan.yaml is read back as it was written, and refused where it is no plan or for another model."""

from dataclasses import replace
from pathlib import Path

import pytest

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.families.plan_file import SHAPE, PlanFile, shape_problem

CONFIG = ModelConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, vocab=50, context=64)
PLAN = PlanFile(
    model={name: getattr(CONFIG, name) for name in SHAPE},
    tune=({"layer": 1, "component": "mlp"}, {"layer": 0, "component": "attn"}),
    tokens=("<|im_start|>",),
    control=({"layer": 0, "component": "mlp"},),
    goal="style",
    budget=0.5,
    made_from={"base": "b", "chat": "c", "signal": "causal", "seed": 3},
    embeddings="add",
    scales=({"layers": [1], "components": ["mlp"], "scale": 0.7},),
    scores=({"layer": 0, "style": 0.25},),
)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.to_yaml(), encoding="utf-8")
    again = PlanFile.read(path)
    assert replace(again, source=PLAN.source) == PLAN and again.to_yaml() == PLAN.to_yaml()
    assert again.patterns == ("layers.1.mlp", "layers.0.attn")
    again.check_shape(CONFIG)
    with pytest.raises(ConfigError, match="made for another model"):
        again.check_shape(replace(CONFIG, layers=3))
    again.check_shape(replace(CONFIG, vocab=60))  # tokens may have been added


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("lapis-plan/1", "other", "is no plan"),
        ("model:", "shape:", "model is missing"),
        ("tune:", "tuned:", "tune must list"),
        ("layer: 1", "layer: '1'", r"tune\[0\]: expected"),
        ("tokens: [<|im_start|>]", "tokens: <|im_start|>", "tokens must be a list"),
    ],
)
def test_what_is_no_plan_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    text = PLAN.to_yaml()
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        PlanFile.read(path)


def test_fields_that_one_side_lacks_are_no_difference() -> None:
    assert shape_problem({"dim": 8}, {"layers": 2}) == ""
    assert (
        shape_problem({"dim": 8, "layers": 2}, {"dim": 4, "layers": 3}) == "dim 8 there, 4 here; layers 2 there, 3 here"
    )
