"""Recipes in stages: whatever is computed on the way, the bytes are those of merging one folder after the other."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapis.config import dump_yaml
from lapis.errors import CheckpointError, ConfigError
from lapis.weights.merge import merge as merging
from lapis.weights.merge.merge import merge
from lapis.weights.merge.plan import plan_merge
from lapis.weights.merge.recipes.stages import each_stage, open_recipe, parse_stages

from .conftest import CHATML, near, weights, words, write_model

TIES = {"weight": 0.6, "density": 0.5}


@pytest.fixture
def family(tmp_path):
    """A base and four fine-tunes: name -> folder."""
    base = weights(1, tied=False)
    names = ("base", "one", "two", "three", "four")
    return {n: write_model(tmp_path / n, near(base, i) if i else base, vocab=words()) for i, n in enumerate(names)}


def ties(family, name=None, **more):
    """TIES of one and two."""
    models = [{"model": str(family[n])} for n in ("one", "two")]
    recipe = {"merge_method": "ties", "base_model": str(family["base"]), "models": models, "parameters": TIES} | more
    return {"name": name, **recipe} if name else recipe


def line(name, model, other, **more):
    """The mean of two models, in which none is the base."""
    entries = [
        {"model": str(model), "parameters": {"weight": 0.25}},
        {"model": str(other), "parameters": {"weight": 1}},
    ]
    return {"merge_method": "linear", "models": entries, **({"name": name} if name else {}), **more}


def slerp(family, base, t=0.3):
    return {"merge_method": "slerp", "base_model": base, "models": [{"model": str(family["four"])}],
            "parameters": {"t": t}}  # fmt: skip


def documents(family):
    return [ties(family, "warm"), line("second", "warm", family["three"]), slerp(family, "second")]


def recipe_file(path: Path, each) -> Path:
    path.write_text("---\n".join(dump_yaml(document) for document in each))
    return path


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def one_after_the_other(family, tmp_path) -> Path:
    merge(ties(family), tmp_path / "warm")
    merge(line(None, tmp_path / "warm", family["three"]), tmp_path / "second")
    merge(slerp(family, str(tmp_path / "second")), tmp_path / "third")
    return tmp_path / "third"


@pytest.mark.parametrize("stage_memory", [2.0, 0.0])
def test_stages_equal_one_merge_after_another(family, tmp_path, stage_memory):
    expected = load_file(one_after_the_other(family, tmp_path) / "model.safetensors")
    recipe = recipe_file(tmp_path / "recipe.yaml", documents(family))
    result = merge(recipe, tmp_path / "out", stage_memory=stage_memory)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert any("is written first" in note for note in result.notes) == (stage_memory == 0)
    assert not list(tmp_path.glob(".*"))


def test_the_budget_changes_no_byte_of_the_folder(family, tmp_path):
    recipe = recipe_file(tmp_path / "recipe.yaml", documents(family))
    merge(recipe, tmp_path / "streamed" / "out")
    merge(recipe, tmp_path / "written" / "out", stage_memory=0)
    assert all_bytes(tmp_path / "streamed" / "out") == all_bytes(tmp_path / "written" / "out")
    account = json.loads((tmp_path / "streamed" / "out" / "lapis-merge.json").read_text())
    assert set(account["inputs"]) == {str(family[n]) for n in family}
    assert set(account["recipe"]["stages"]) == {"warm", "second"}


def test_a_recipe_in_the_place_of_a_model(family, tmp_path):
    expected = load_file(one_after_the_other(family, tmp_path) / "model.safetensors")
    nested = slerp(family, line(None, "x", family["three"]))
    nested["base_model"]["models"][0]["model"] = ties(family)
    merge(nested, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tile", [50, 1 << 18])
def test_methods_that_sweep_are_equal_in_stages(family, tmp_path, monkeypatch, tile):
    monkeypatch.setattr("lapis.weights.engine.tiles.TILE", tile)
    for method, more in (("dare_ties", {}), ("della", {"epsilon": 0.1}), ("model_stock", {}), ("sce", {})):
        first = ties(family, merge_method=method) | {"parameters": TIES | more}
        merge(first, tmp_path / method / "first", seed=3)
        merge(slerp(family, str(tmp_path / method / "first")), tmp_path / method / "second")
        merge([first | {"name": "a"}, slerp(family, "a")][1] | {"base_model": first}, tmp_path / method / "out", seed=3)
        one, other = (load_file(tmp_path / method / n / "model.safetensors") for n in ("second", "out"))
        assert all(torch.equal(one[name], other[name]) for name in one), method


def test_a_tensor_of_a_stage_is_read_again_later(family, monkeypatch):
    """A thread may be behind while others are tensors ahead, when what its tensor's passes gave is forgotten."""
    monkeypatch.setattr("lapis.weights.engine.tiles.TILE", 50)
    first = ties(family, merge_method="della") | {"parameters": TIES | {"epsilon": 0.1}}
    plan = plan_merge(slerp(family, first), seed=3)
    (stage,) = (plan.inputs[name] for name in plan.stages)
    names = [name for name, info in stage.index.items() if len(info.shape) == 2]
    assert len(names) > 4
    once, again = ([stage.read(name) for name in names] for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_a_vocabulary_that_a_stage_makes_goes_on(family, tmp_path):
    """The stage's own tokens, rows and template are what the next one sees."""
    base = weights(1, vocab=41, tied=False)
    extra = write_model(tmp_path / "extra", near(base, 9), vocab=words((*CHATML, "<|more|>")))
    first = line("warm", family["one"], extra, tokenizer_source="union", chat_template="chatml")
    merge(first, tmp_path / "first")
    last = line(None, "warm", extra, tokenizer_source="union")
    merge(
        last | {"models": [{**last["models"][0], "model": str(tmp_path / "first")}, last["models"][1]]}, tmp_path / "a"
    )
    merge(recipe_file(tmp_path / "recipe.yaml", [first, last]), tmp_path / "b")
    one, other = all_bytes(tmp_path / "a"), all_bytes(tmp_path / "b")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert one[name] == other[name], name


def test_only_the_output_takes_the_dtype_that_is_given(family, tmp_path):
    recipe = recipe_file(tmp_path / "recipe.yaml", documents(family))
    merge(recipe, tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    plan = plan_merge(open_recipe(recipe), dtype="float32")
    assert plan.inputs["second"].info("model.norm.weight").dtype == "BF16"


def test_the_output_is_what_nobody_uses(family):
    named = [
        document | {"name": name} for document, name in zip(documents(family), ("warm", "second", "last"), strict=True)
    ]
    for order in (named, named[::-1]):
        recipe = parse_stages([dict(document) for document in order])
        assert recipe.method.name == "slerp"
        assert [name for name, _ in each_stage(recipe)] == ["warm", "second"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d[0].update(base_model="second"),
            "warm is made from second, second is made from warm; a stage cannot",
        ),
        (lambda d: d[0].update(base_model="warm"), "warm is made from warm; a stage cannot be made from itself"),
        (lambda d: d[1].update(name="warm"), "two documents are named warm"),
        (lambda d: d[1].pop("name"), "2 documents have no name"),
        (lambda d: d[2].update(base_model="three"), "nothing uses second"),
        (lambda d: d[0].update(name=7), "name is 7"),
        (lambda d: d[0].update(name="../x"), "expected a word"),
    ],
)
def test_stages_that_cannot_be(family, tmp_path, change, message):
    each = documents(family)
    change(each)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        merge(recipe_file(tmp_path / "recipe.yaml", each), tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_a_recipe_that_is_its_own_model(family, tmp_path):
    with pytest.raises(ConfigError, match="x is made from x; a stage cannot be made from itself"):
        merge(line("x", "x", family["one"]), tmp_path / "out")


def test_a_fault_in_a_stage_names_the_stage(family, tmp_path):
    each = documents(family)
    each[0]["models"][0]["model"] = "nowhere"
    with pytest.raises(CheckpointError, match="warm: merge: nowhere: there is no such folder"):
        merge(recipe_file(tmp_path / "recipe.yaml", each), tmp_path / "out")


def test_a_dry_run_counts_what_is_written_on_the_way(family, tmp_path):
    recipe = recipe_file(tmp_path / "recipe.yaml", documents(family))
    streamed = merge(recipe, tmp_path / "out", dry_run=True)
    written = merge(recipe, tmp_path / "out", dry_run=True, stage_memory=0)
    assert written.needs["disk_bytes"] > 2.9 * streamed.needs["disk_bytes"]
    assert written.needs["memory_bytes"] < streamed.needs["memory_bytes"]
    assert sum("is written first" in note for note in written.notes) == 2
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from lapis.weights.engine import job
from lapis.weights.merge.merge import merge
real, calls = job.stream, []
def stream(*arguments, **named):
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
job.stream = stream
merge(sys.argv[1], sys.argv[2], stage_memory=0)
"""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_killed_merge_goes_on_with_the_stages_it_wrote(family, tmp_path, at):
    recipe = recipe_file(tmp_path / "recipe.yaml", documents(family))
    merge(recipe, tmp_path / "expected" / "out", stage_memory=0)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(recipe), str(out), str(at)], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL and not out.exists()
    stages = {path.name: path.stat().st_ino for path in (tmp_path / ".out.stages").iterdir() if path.name[0] != "."}
    assert len(stages) == at - 1
    seen = []
    merge(recipe, out, stage_memory=0, progress=lambda done, total: seen.append(total))
    assert all_bytes(out) == all_bytes(tmp_path / "expected" / "out")
    assert not (tmp_path / ".out.stages").exists()


def test_a_process_that_comes_late_needs_no_stages(family, tmp_path, monkeypatch):
    """Whether all was done before it came, or while it had written a stage."""
    recipe, out = recipe_file(tmp_path / "recipe.yaml", documents(family)), tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    real, stages = merging._write_stage, []

    def write_stage(*arguments):
        stages.append(real(*arguments))
        if len(stages) == 1:  # the other process is faster
            merge(recipe, out, stage_memory=0)
            assert out.exists() and not stages[0].exists()
        return stages[0] if len(stages) == 1 else stages[-1]

    monkeypatch.setattr(merging, "_write_stage", write_stage)
    first = merge(recipe, out, stage_memory=0)
    before, written = all_bytes(out), len(stages)
    assert merge(recipe, out, stage_memory=0).sha256 == first.sha256
    assert len(stages) == written and all_bytes(out) == before and not list(tmp_path.glob(".*"))


STOPPED = """
import os, sys
from lapis.cli.main import main
from lapis.weights.engine import job
real, number = job.stream, int(sys.argv.pop(1))
def stream(*arguments, **named):
    os.kill(os.getpid(), number)
    return real(*arguments, **named)
job.stream = stream if number else real
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("number", "status"), [(0, 1), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_stays_of_stages_however_a_command_ends(family, tmp_path, number, status):
    """Refused because of the last stage, or stopped: the folder that stages have beside them is removed."""
    each, beside = documents(family), tmp_path / "beside"
    beside.mkdir()
    if status == 1:
        each[-1]["models"][0]["model"] = str(tmp_path / "none")
    command = [sys.executable, "-c", STOPPED, str(number), "merge", str(recipe_file(tmp_path / "recipe.yaml", each))]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], env={**os.environ, "TMPDIR": str(beside)}, capture_output=True
    )
    assert done.returncode == status, done.stderr
    assert list(beside.iterdir()) == []


def test_nothing_stays_of_stages_whose_plan_is_dropped(family, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "beside"))
    (tmp_path / "beside").mkdir()
    plan = plan_merge(recipe_file(tmp_path / "recipe.yaml", documents(family)))
    assert len(list((tmp_path / "beside").iterdir())) == 1
    del plan
    assert list((tmp_path / "beside").iterdir()) == []
