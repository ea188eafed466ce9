"""What config.json says and no family can do is refused in one line that names the field; never ignored."""

from typing import Any

import pytest

from lapis.errors import CheckpointError
from lapis.families import family_of
from tests.model.conftest import SHAPES

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "feed_forward_activation")
ROPES = ("longrope", "spiral", "mrope", 3)


def refusal(name: str, **changes: Any) -> str:
    family = family_of(SHAPES[name])
    with pytest.raises(CheckpointError) as error:
        family.read_config({**family.write_config(SHAPES[name]), **changes})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SHAPES)
def test_an_activation_that_is_not_known(name: str) -> None:
    fields = family_of(SHAPES[name]).write_config(SHAPES[name])
    named = [field for field in ACTIVATIONS if fields.get(field)]
    assert named and all(f"{named[0]} is" in refusal(name, **dict.fromkeys(named, value)).replace(
        "hidden_act is", f"{named[0]} is") for value in ("mish", 3))  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.positions == "rotary"])
def test_rotary_positions_that_are_not_known(name: str, kind: Any) -> None:
    fields = family_of(SHAPES[name]).write_config(SHAPES[name])
    spelled = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    wanted = fields.get("rope_parameters") or {}
    both = {name: spelled for name, each in wanted.items() if isinstance(each, dict)}
    text = refusal(name, rope_parameters=both or spelled, rope_scaling=None)
    assert "rope" in text and repr(kind) in text


@pytest.mark.parametrize("name", SHAPES)
def test_layers_of_another_number_or_kind(name: str) -> None:
    """Of every family, whether its layers differ or not; what says nothing new is read."""
    family, layers = family_of(SHAPES[name]), SHAPES[name].layers
    for types in (["full_attention"] * (layers + 1), ["full_attention"] * (layers - 1) + ["chunked"], "full", [None]):
        assert "layer_types is" in refusal(name, layer_types=types)
    written = family.write_config(SHAPES[name])
    types = written.get("layer_types") or ["full_attention"] * layers
    assert family.read_config({**written, "layer_types": types}) == family.read_config(written)


GEMMA4 = {
    "use_bidirectional_attention": ("all", "use_bidirectional_attention is"),
    "vocab_size_per_layer_input": (7, "fewer than vocab_size"),
    "num_kv_shared_layers": (4, "num_kv_shared_layers is 4"),
    "per_layer_config": ({"1": {"head_dim": 12}}, "per_layer_config is"),
    "enable_moe_block": (True, "use_double_wide_mlp"),
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"], "no keys of its own"),
    "rope_parameters": (
        {"full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}, "sliding_attention": {}},
        "partial_rotary_factor",
    ),
}


@pytest.mark.parametrize("field", GEMMA4)
def test_what_no_gemma_4_has(field: str) -> None:
    value, text = GEMMA4[field]
    more = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8} if field == "enable_moe_block" else {}
    more |= {"per_layer_config": None, "num_kv_shared_layers": 1} if field == "layer_types" else {}
    assert text in refusal("gemma4", **{field: value}, **more)
