"""Parameters of every preset, counted from its config.json alone, beside a model of transformers on the meta device.

Of a few blocks: blocks of one kind are alike (tests/model/test_size.py), and whole models take minutes to lay out.
"""

from typing import Any

import pytest
import torch
import transformers

from lapis.families import PRESETS, find
from lapis.families.config import ModelConfig
from lapis.model.size import measure

BLOCKS = 8  # a whole period of every pattern of layers


def shortened(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model of the same shape with few blocks."""
    key = next(key for key in ("num_hidden_layers", "n_layer", "n_layers") if key in fields)
    layers = fields[key]
    cut = {name: value[:BLOCKS] if isinstance(value, list) and len(value) == layers else value
           for name, value in fields.items() if value is not None or name != "head_dim"}  # fmt: skip
    borrowing = {"num_kv_shared_layers": 2} if cut.get("num_kv_shared_layers") else {}  # the last ones
    return {**cut, **borrowing, key: min(layers, BLOCKS)}


def class_of(shape: ModelConfig) -> Any:
    if shape.head == "none":
        return transformers.AutoModel
    if shape.image is not None:
        return transformers.AutoModelForImageClassification
    heads = {"lm": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM}
    return heads.get(shape.head, transformers.AutoModelForSequenceClassification)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_as_many_as_in_transformers(name: str) -> None:
    fields = shortened(dict(PRESETS[name]))
    family = find(fields)
    assert family is not None
    shape = family.read_config(fields)
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    with torch.device("meta"):
        model = class_of(shape).from_config(config)
    held = ("act_fn", "layer_scalar")  # of xIELU and Gemma 4, which folders hold
    buffers = [buffer for name, buffer in model.named_buffers() if any(part in name for part in held)]
    assert measure(shape).total == sum(tensor.numel() for tensor in [*model.parameters(), *buffers])
