"""The tensors that a config.json asks for: those that a folder of this shape has, no more and no fewer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapis.families import FAMILIES, PRESETS, find, required
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from tests.model.conftest import SHAPES


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("changes", [{}, {"layers": 1}, {"tied": False}, {"head": "none"}], ids=str)
def test_required_tensors_are_those_of_a_saved_folder(kind: str, changes: dict[str, object], tmp_path: Path) -> None:
    shape: ModelConfig = SHAPES[kind]
    if "layers" in changes and shape.uneven is not None:  # one layer lends to none
        even = dataclasses.replace(shape.uneven, borrowing=0, double=False)
        shape = dataclasses.replace(shape, uneven=even, window=None)
    if "layers" in changes and shape.experts is not None and shape.experts.dense_layers:
        shape = dataclasses.replace(shape, experts=dataclasses.replace(shape.experts, dense_layers=()))
    shape = dataclasses.replace(shape, **changes)  # type: ignore[arg-type]
    chosen = shape.window_layers if shape.uneven is not None else None
    shape = dataclasses.replace(shape, window_layers=chosen, pooler=shape.pooler and shape.head != "none")
    if shape.head == "none":
        shape = dataclasses.replace(shape, classes=0)
    with torch.no_grad():
        save(Transformer(shape), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    family = find(config)
    assert family is not None
    twins = {family.disk_name(rule, None) for rule in family.rules if rule.twin}
    saved = {family.canonical(name): tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()
             if name not in twins}  # fmt: skip
    assert required(config) == saved


def test_nothing_is_required_where_the_family_is_not_known() -> None:
    assert required({"model_type": "nobody's"}) == {}


def test_every_family_names_its_own_presets() -> None:
    assert sum(len(family.presets) for family in FAMILIES) == len(PRESETS)
    for family in FAMILIES:
        assert all(fields["model_type"] in family.model_types for fields in family.presets.values())
        assert set(family.defaults) <= set(family.model_types)
