"""Numbers of settings: whatever is given, in whichever way, either means something or is refused in one line."""

import math
import time
from pathlib import Path

import pytest

from lapis.cli.main import main
from lapis.config import build, check_number, parse_yaml
from lapis.errors import ConfigError
from lapis.evaluation.options import EvalOptions
from lapis.families.config import ModelConfig
from lapis.generation.options import Sampling
from lapis.model.lora import LoraConfig
from lapis.planning.options import PlanOptions
from lapis.training.config import TrainConfig
from lapis.training.rewards.settings import make_judge
from lapis.weights.graft.scale import read_scale
from lapis.weights.merge.methods import METHODS
from lapis.weights.merge.recipes.expression import parse_expression
from lapis.weights.merge.recipes.recipe import parse_recipe
from lapis.weights.options import MergeOptions

ODD = [math.nan, math.inf, -math.inf, 1e-320, -1e-310, 1e308, 10**35, -(10**35), 10**39]


@pytest.mark.parametrize("value", ODD)
def test_a_number_that_no_setting_can_be(value: float) -> None:
    with pytest.raises(ConfigError, match="lr is") as caught:
        check_number(value, "train: lr")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 160
    for good in (0, 0.0, -1, 1e-30, 1e30, 2**63 - 1, 1e-9, 3e-4):
        check_number(good, "train: lr")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "nan", "inf", "1e999", "1e-320", "'nan'", "9" * 36])
def test_train_settings_from_yaml(text: str) -> None:
    for name in ("lr", "seed", "clip", "minutes", "decay"):
        with pytest.raises(ConfigError, match=name):
            build(TrainConfig, {"steps": 1, **parse_yaml(f"{name}: {text}", "train.yaml")}, "train.yaml")


@pytest.mark.parametrize("value", ODD)
def test_options_from_python(value: float) -> None:
    for make in (
        lambda: Sampling(temperature=value), lambda: Sampling(seed=value), lambda: TrainConfig(steps=1, lr=value),
        lambda: TrainConfig(steps=1, seed=value), lambda: LoraConfig(alpha=value),
        lambda: PlanOptions(goal="style", budget=value), lambda: EvalOptions(limit=value),
        lambda: MergeOptions(seed=value), lambda: read_scale(value),
        lambda: read_scale({"scales": [], "default": value}),
        lambda: ModelConfig(dim=8, layers=1, heads=1, kv_heads=1, ffn_dim=8, vocab=8, context=8, norm_eps=value),
        lambda: make_judge([{"name": "ends", "weight": value}], None, 1.0),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            make()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


RECIPE = {"merge_method": "ties", "base_model": "base", "models": [{"model": "base"}, {"model": "one"}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [("density", -1), ("density", 1.5), ("density", "nan"), ("density", [0.5, -0.1]), ("weight", 1e300),
     ("weight", "inf"), ("lambda", 1e-320), ("weight", 10**35), ("density", [{"filter": "mlp", "value": -1}])],
)  # fmt: skip
def test_parameters_of_a_merge(name: str, value: object) -> None:
    """A density of -1 gave the base back, with status 0."""
    with pytest.raises(ConfigError, match=name) as caught:
        parse_recipe({**RECIPE, "parameters": {"weight": 1, "density": 0.5, name: value}})
    assert "\n" not in str(caught.value)


def test_every_method_says_what_its_shares_can_be() -> None:
    bounded = {"density", "gamma", "epsilon", "select_topk"}
    for method in METHODS.values():
        for name, parameter in method.parameters.items():
            if name in bounded and parameter.span != (0, 1):
                assert method.name.startswith("ram") and name == "epsilon", (method.name, name)


@pytest.mark.parametrize(
    "change",
    [{"slices": [{"sources": [{"model": "one", "layer_range": [0, 10**9]}]}]},
     {"slices": [{"sources": [{"model": "one", "layer_range": [0, 9000]}]}] * 3},
     {"models": RECIPE["models"], "tokenizer": {"source": "base", "pad_to_multiple_of": 10**9}},
     {"models": RECIPE["models"], "seed": 10**22}],
)  # fmt: skip
def test_counts_of_a_recipe_are_bounded_before_anything_is_built(change: dict[str, object]) -> None:
    begin = time.process_time()
    with pytest.raises(ConfigError):
        parse_recipe({"merge_method": "passthrough", **change})
    assert time.process_time() - begin < 5  # it took minutes and 7.6 GB


@pytest.mark.parametrize("text", ["1e40*A", "(A)/1e-40", "1e20*1e20*A", "(A+B)*1e-320", "A*" + "9" * 400])
def test_factors_of_a_formula(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_expression(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("size", "says"),
    [({"dim": 10**6}, "whose weights take"), ({"layers": 10**9}, "layers is"), ({"vocab": 2**40}, "whose weights take"),
     ({"dim": 10**20}, "dim is")],
)  # fmt: skip
def test_a_new_model_that_no_machine_holds(tmp_path: Path, capsys, size: dict[str, int], says: str) -> None:
    new = {"dim": 64, "layers": 2, "heads": 4, "ffn_dim": 64, **size}
    text = "a text that somebody wrote\n" * 50
    (tmp_path / "text.txt").write_text(text)
    from lapis.text.tokenizer.tokenizer import train_tokenizer

    (tmp_path / "words").mkdir()
    train_tokenizer([text], 300).save(tmp_path / "words")
    settings = [f"new.{name}={value}" for name, value in new.items()]
    (tmp_path / "train.yaml").write_text("objective: causal\ncontext: 16\nsteps: 1\n")
    places = [f"data={tmp_path}/text.txt", f"tokenizer={tmp_path}/words", f"out={tmp_path}/out"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "train.yaml"), *settings, *places])
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and says in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "arguments",
    [["generate", "none", "x", "--temperature", "nan"], ["generate", "none", "x", "--seed", "1" + "0" * 22],
     ["generate", "none", "x", "--temperature", "1e-320"],
     ["tokenizer", "train", "x", "--vocab", "9" * 25, "--out", "y"],
     ["data", "pack", "x", "--tokenizer", "t", "--length", "9" * 25, "--out", "y"],
     ["merge", "A+B", "--out", "y", "--seed", "9" * 25],
     ["plan", "--base", "b", "--chat", "c", "--goal", "style", "--budget", "nan", "--out", "y"]],
)  # fmt: skip
def test_numbers_on_the_command_line(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    err = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and err.count("\n") == 1 and "none: there is no" not in err
    assert any(word in err for word in ("finite", "63 bits", "1e-30")), err
