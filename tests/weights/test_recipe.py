"""Recipes: mergekit's YAML as it is, and every way to get it wrong told in one line."""

from pathlib import Path

import pytest
import yaml

from lapis.errors import ConfigError
from lapis.weights.merge.recipes.parameters import Resolver
from lapis.weights.merge.recipes.recipe import parse_recipe, recipe_scopes
from lapis.weights.merge.recipes.stages import open_recipe

TIES = """
merge_method: ties
base_model: base
models:
  - model: one
    parameters:
      weight: [0, 1]
      density:
        - {filter: self_attn, value: [0.2, 0.4, 0.8]}
        - {filter: mlp, value: 0.5}
        - {value: 1e-1}
  - {model: two, parameters: {weight: 1}}
parameters: {normalize: true, int8_mask: true, density: 0.9}
dtype: bfloat16
"""


def parsed(text, **changes):
    return parse_recipe({**yaml.safe_load(text), **changes})


def resolver(recipe):
    return Resolver(recipe.method.name, list(recipe_scopes(recipe)))


def value(recipe, name, tensor, t, model=0, within=0, known=None):
    entry = recipe.slices[within].inputs[model]
    scopes = [entry.parameters, recipe.slices[within].parameters, recipe.module, recipe.parameters]
    return (known or resolver(recipe)).value(recipe.method.parameters[name], tensor, t, scopes, entry.model)


def test_a_recipe_of_models():
    recipe = parsed(TIES)
    assert recipe.method.name == "ties" and recipe.base == "base" and recipe.dtype == "bfloat16"
    assert [entry.model for entry in recipe.slices[0].inputs] == ["one", "two", "base"]
    assert recipe.notes == ("base_model base is not among the models; added",)
    assert recipe.models == ["base", "one", "two"] and not recipe.stacks


def test_filters_gradients_and_precedence():
    recipe = parsed(TIES)
    for t, expected in ((0, 0.2), (0.25, 0.3), (0.5, 0.4), (0.75, 0.6), (1, 0.8)):
        assert value(recipe, "density", "layers.3.self_attn.q_proj.weight", t) == pytest.approx(expected)
    assert value(recipe, "density", "layers.3.mlp.up_proj.weight", 1) == 0.5
    assert value(recipe, "density", "norm.weight", None) == 0.1  # 1e-1 is text to YAML
    assert value(recipe, "density", "norm.weight", None, model=1) == 0.9  # from the top
    assert value(recipe, "normalize", "norm.weight", 1) is True
    assert value(recipe, "lambda", "norm.weight", 1) == 1.0


def test_a_gradient_outside_the_layers_is_told():
    recipe = parsed(TIES)
    known = resolver(recipe)
    assert value(recipe, "weight", "lm_head.weight", None, known=known) == 0
    assert known.notes() == ["lm_head.weight: outside the layers, take the first value of a gradient: weight = 0.0"]


def test_a_filter_that_matches_nothing_is_told_with_the_nearest():
    recipe = parsed(TIES.replace("self_attn", "self_atn"))
    known = resolver(recipe)
    names = {"layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight"}
    (problem,) = known.problems(names)
    assert problem == 'parameters of one: density: the filter "self_atn" matches no tensor; did you mean "self_attn"?'


def test_slices_and_modules():
    stack = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [2, 6], parameters: {scale: 0.5}}]
"""
    recipe = parsed(stack)
    assert recipe.stacks and recipe.slices[1].inputs[0].layers == (2, 6)
    assert value(recipe, "scale", "layers.2.x", 0, within=1) == 0.5
    wrapped = {"merge_method": "passthrough", "modules": {"default": {"slices": yaml.safe_load(stack)["slices"]}}}
    assert parse_recipe(wrapped).slices == recipe.slices


def test_tokenizers_in_both_spellings():
    assert parsed(TIES, tokenizer_source="union").tokens.source == "union"
    settings = {
        "source": "one",
        "pad_to_multiple_of": 64,
        "tokens": {"<a>": {"source": "two", "force": True}, "<b>": {"source": {"kind": "zero"}},
                   "<c>": {"source": {"kind": "model_token", "model": "one", "token": "x"}}},
    }  # fmt: skip
    tokens = parsed(TIES, tokenizer=settings).tokens
    assert (tokens.source, tokens.pad_to_multiple_of) == ("one", 64)
    assert tokens.tokens["<a>"].force and tokens.tokens["<b>"].kind == "zero" and tokens.tokens["<c>"].token == "x"


WRONG = {
    'unknown key "merge_metod"; did you mean "merge_method"?': {"merge_metod": "ties"},
    'merge_method is "tise"; did you mean "ties"?': {"merge_method": "tise"},
    "ties needs a base_model": {"base_model": None},
    'models[0]: unknown key "weight"': {"models": [{"model": "one", "weight": 1}]},
    'unknown parameter "densty"; did you mean "density"?': {"parameters": {"densty": 0.5}},
    "density is 'high'; expected a number": {"parameters": {"density": "high"}},
    "normalize is 'yes please'; expected true or false": {"parameters": {"normalize": "yes please"}},
    "numerics is 'papers'; expected mergekit or paper": {"parameters": {"numerics": "papers"}},
    "density is empty": {"parameters": {"density": []}},
    "has no value": {"parameters": {"density": [{"filter": "mlp"}]}},
    'dtype is "bfloat17"; did you mean "bfloat16"?': {"dtype": "bfloat17"},
    "exactly one of models, slices and modules; there are 0": {"models": None},
    "one stands twice among the inputs": {"models": [{"model": "one"}, {"model": "one"}]},
    "slerp takes 1 model besides the base, and is given 2": {"merge_method": "slerp"},
    "give tokenizer_source or tokenizer, not both": {"tokenizer_source": "base", "tokenizer": {"source": "base"}},
    "expected the folder or the name of a model": {"models": [{"parameters": {"weight": 1}}]},
    "source is ''; expected the folder or the name": {
        "tokenizer": {"source": "union", "tokens": {"a": {"source": ""}}}
    },
    "layer_range is None": {"models": None, "slices": [{"sources": [{"model": "one"}]}]},
    "seed is -1": {"seed": -1},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_told_in_one_line(message):
    with pytest.raises(ConfigError) as error:
        parsed(TIES, **WRONG[message])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_long_is_told_in_short():
    with pytest.raises(ConfigError) as error:
        parsed(TIES, dtype=["float32"] * 1000)
    assert len(str(error.value)) < 300


def test_slices_must_agree_in_length():
    slices = [{"sources": [{"model": "base", "layer_range": [0, 4]}, {"model": "b", "layer_range": [0, 5]}]}]
    with pytest.raises(ConfigError, match="same number of layers; they give"):
        parsed(TIES, models=None, slices=slices)


def test_a_parameter_of_another_method_is_noted():
    recipe = parsed(TIES, merge_method="task_arithmetic")
    assert "density does nothing in task_arithmetic" in recipe.notes


def test_a_missing_weight_names_model_and_tensor():
    recipe = parsed(TIES)
    with pytest.raises(ConfigError, match=r"ties: weight is not set for base \(norm.weight\)"):
        value(recipe, "weight", "norm.weight", None, model=2)


def test_a_file_names_itself(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TIES.replace("base_model", "bse_model"))
    with pytest.raises(ConfigError, match=r"recipe.yaml: unknown key \"bse_model\""):
        open_recipe(path)


@pytest.mark.parametrize(
    ("word", "value"), [("off", False), ("on", True), ("no", False), ("yes", True), ("true", True)]
)
def test_switches_of_a_recipe_are_words_too(word: str, value: bool, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    lines = (
        "merge_method: linear",
        "models: [{model: a, parameters: {weight: 1e0}}]",
        f"parameters: {{normalize: {word}}}",
        f"tokenizer: {{tokens: {{<a>: {{force: {word}}}}}}}",
    )
    path.write_text("\n".join(lines))
    recipe = open_recipe(path)
    assert recipe.tokens is not None and recipe.tokens.tokens["<a>"].force is value
    path.write_text(path.read_text().replace(f"force: {word}", "force: maybe"))
    with pytest.raises(ConfigError, match="force is 'maybe'; expected true or false"):
        open_recipe(path)
