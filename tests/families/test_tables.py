"""The tables: every parameter has one line, every line one part, and what names mean where no table knows them."""

import re

import pytest

from lapis.errors import CheckpointError
from lapis.families import FAMILIES, PRESETS, Family, Part, fallback_part, find, parameter_shapes, part_of
from lapis.families.base import EXPERT


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_name_on_disk_falls_under_exactly_one_rule(family: Family) -> None:
    for rule in (rule.of_expert(7) for rule in family.rules):
        layer = 11 if "{layer}" in rule.disk else None
        for bare in (False, True):
            name = family.disk_name(rule, layer, bare=bare)
            assert family.match(name) == (rule, layer)
            assert sum(bool(pattern.fullmatch(name)) for pattern, _ in family._patterns) == 1
            assert family.part(name) == Part(layer, rule.component, "bias" if name.endswith("bias") else "weight")
            assert not family.is_ignored(name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_name_here_is_its_component(family: Family) -> None:
    for rule in family.rules:
        stacks = EXPERT in rule.names[0] and EXPERT not in rule.disk
        if len(rule.names) == 1 and not stacks:
            part = part_of(rule.names[0].replace("{layer}", "3"))
            assert part.component == rule.component and part.layer == (3 if "{layer}" in rule.disk else None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_parameter_has_a_place_on_disk(name: str) -> None:
    family = find(PRESETS[name])
    assert family is not None
    shape = family.read_config(PRESETS[name])
    for parameter in parameter_shapes(shape):
        rule, layer = family.rule_for(parameter)
        assert family.match(family.disk_name(rule, layer)) == (rule, layer)


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_is_read_back_as_it_was_written(name: str) -> None:
    family = find(PRESETS[name])
    assert family is not None
    shape = family.read_config(PRESETS[name])
    notes: list[str] = []
    assert family.read_config(family.write_config(shape), notes) == shape
    assert notes == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Part(3, "attn.q", "weight")),
        ("layers.3.self_attn.q_proj.bias", Part(3, "attn.q", "bias")),
        ("lm_head.weight", Part(None, "head", "weight")),
        ("transformer.h.7.attn.c_attn.weight", Part(7, "attn.qkv", "weight")),
        ("h.7.ln_1.bias", Part(7, "norm.attn", "bias")),
        ("wpe.weight", Part(None, "embed.position", "weight")),
        ("bert.encoder.layer.2.attention.output.LayerNorm.gamma", Part(2, "norm.attn", "weight")),
        ("encoder.layer.2.attention.output.LayerNorm.beta", Part(2, "norm.attn", "bias")),
        ("vit.embeddings.cls_token", Part(None, "embed.cls", "weight")),
    ],
)
def test_parts_of_names_that_hubs_hold(name: str, part: Part) -> None:
    assert part in [family.part(name) for family in FAMILIES]


def test_names_that_only_look_right_are_not_listed() -> None:
    llama = find({"model_type": "llama"})
    assert llama is not None and find({"model_type": "nobody's"}) is None and find({}) is None
    for name in (
        "model.model.norm.weight", "model.layers.01.mlp.up_proj.weight", "model.layers.-1.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight.x", "xmodel.norm.weight", "model.layers.0.mlp.upXproj.weight",
    ):  # fmt: skip
        assert llama.match(name) is None


def test_an_unknown_family_is_read_from_its_names() -> None:
    assert fallback_part("model.layers.12.mixer.in_proj.weight") == Part(12, "mixer.in_proj", "weight")
    assert fallback_part("backbone.embed_tokens.weight") == Part(None, "embed", "weight")
    assert fallback_part("lm_head.bias") == Part(None, "head", "bias")
    assert fallback_part("odd") == Part(None, "odd", "weight")


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "vit-base-patch16-224", "qwen3-0.6b", "gemma-3-1b"])
def test_fields_that_change_numbers_are_refused_not_dropped(name: str) -> None:
    family = find(PRESETS[name])
    assert family is not None
    odd = {
        "gpt2": ("scale_attn_by_inverse_layer_idx", True), "bert": ("position_embedding_type", "relative_key"),
        "vit": ("image_size", [224, 160]), "llama": ("partial_rotary_factor", 0.5),
        "gemma3": ("final_logit_softcapping", 30.0),
    }[family.name]  # fmt: skip
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: {odd[0]} is")):
        family.read_config({**PRESETS[name], odd[0]: odd[1]})
