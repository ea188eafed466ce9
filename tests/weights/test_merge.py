"""Merges as folders: results, resumption, and every fault that must be refused before or during the work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError, ConfigError, OutputError
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge
from lapis.weights.merge.methods import METHODS
from lapis.weights.merge.plan import plan_merge

from .conftest import DIM, TEMPLATE, near, weights, words, write_model
from .whole_tensors import merge_tensors


@pytest.fixture
def family(tmp_path):
    """A base and three fine-tunes: name -> folder."""
    base = weights(1, tied=False)
    return {
        name: write_model(tmp_path / name, base if i == 0 else near(base, i), vocab=words())
        for i, name in enumerate(("base", "one", "two", "three"))
    }


def recipe_of(folders, method, names=("one", "two"), base="base", **parameters):
    recipe = {"merge_method": method, "models": [{"model": str(folders[name])} for name in names]}
    if base:
        recipe["base_model"] = str(folders[base])
    return recipe | {"parameters": parameters}


def tensors_of(folder):
    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


PARAMETERS = {"weight": 0.6, "density": 0.5, "t": 0.4, "epsilon": 0.1, "select_topk": 0.4}


@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if not method.statistics))
def test_a_streamed_merge_equals_the_merge_of_whole_tensors(method, family, tmp_path):
    kind = METHODS[method]
    names = ("one", "two", "three")[: kind.most or 2]
    parameters = {name: value for name, value in PARAMETERS.items() if name in kind.parameters}
    merge(
        recipe_of(family, method, names, None if kind.base == "ignored" else "base", **parameters),
        tmp_path / "out",
        seed=5,
    )
    merged, base, models = (
        tensors_of(tmp_path / "out"), tensors_of(family["base"]), [tensors_of(family[name]) for name in names]
    )  # fmt: skip
    assert merged.keys() == base.keys()
    for name in merged:
        expected = merge_tensors(
            method, [model[name] for model in models], None if kind.base == "ignored" else base[name],
            parameters=parameters, name=name, seed=5, layer="layers" in name,
        )  # fmt: skip
        assert torch.equal(merged[name], expected.bfloat16()), name


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "slerp", "sce", "arcee_fusion"])
def test_the_size_of_tiles_changes_nothing(method, family, tmp_path, monkeypatch):
    kind = METHODS[method]
    parameters = {name: value for name, value in PARAMETERS.items() if name in kind.parameters}
    recipe = recipe_of(family, method, ("one", "two")[: kind.most or 2], **parameters)
    merge(recipe, tmp_path / "whole")
    monkeypatch.setattr("lapis.weights.engine.tiles.TILE", 50)
    merge(recipe, tmp_path / "tiled")
    whole, tiled = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "tiled")
    assert all(torch.equal(whole[name], tiled[name]) for name in whole)


def test_the_seed_decides_the_masks(family, tmp_path):
    recipe = recipe_of(family, "dare_linear", weight=1.0, density=0.5)
    results = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge({**recipe, "seed": seed}, tmp_path / out)
        results.append(tensors_of(tmp_path / out)["lm_head.weight"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert merge({**recipe, "seed": 2}, tmp_path / "d", seed=1).notes[-1].startswith("masks were drawn from seed 1")


def test_a_line_of_arithmetic_equals_a_graft(trio, tmp_path):
    folders = trio(tied=False)
    merge(f"{folders['onto']} + 0.8*({folders['chat']} - {folders['base']})", tmp_path / "line")
    graft(folders["base"], folders["chat"], folders["onto"], tmp_path / "graft", scale=0.8, norms="add")
    line, grafted = tensors_of(tmp_path / "line"), tensors_of(tmp_path / "graft")
    for name in line:
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(line[name], grafted[name]), name


def test_the_account_lists_every_tensor_of_every_input(family, tmp_path):
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(family["one"]), "layer_range": [0, 1]}]},
                   {"sources": [{"model": str(family["two"]), "layer_range": [0, 2]}]}],
    }  # fmt: skip
    result = merge(recipe, tmp_path / "out")
    account = json.loads((tmp_path / "out" / "lapis-merge.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert result.tensors == account["counts"] == {"merged": 0, "copied": 30, "skipped": 12}
    layers, outside = 9, 3
    assert result.tensors["skipped"] == 2 * (2 * layers + outside) - 30
    assert {entry["role"] for entry in account["skipped"]} == {str(family["one"]), str(family["two"])}
    opened = open_checkpoint(tmp_path / "out")
    assert len(opened.names) == 30 and opened.part("model.layers.2.mlp.up_proj.weight").layer == 2
    one, two, out = (tensors_of(folder) for folder in (family["one"], family["two"], tmp_path / "out"))
    assert torch.equal(out["model.layers.0.mlp.up_proj.weight"], one["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(out["model.layers.2.mlp.up_proj.weight"], two["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(out["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], two["lm_head.weight"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and "tags: [lapis, merge]" in card and "| one | `one` |" in card
    assert "{'sources': [{'model': 'two', 'layer_range': [0, 2]}]}]` |" in card


@pytest.mark.parametrize("above", ["", "a folder/"])
def test_the_card_of_a_formula_names_no_folder(trio, tmp_path, monkeypatch, above):
    (tmp_path / "with" / above).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = {role: f"with/{above}{role}" for role in ("base", "chat", "onto")}
    for role, folder in trio(tied=False).items():
        folder.rename(tmp_path / names[role])
    formula = "{onto} + 0.8*({chat} - {base})"
    quoted = {role: f"'{name}'" if " " in name else name for role, name in names.items()}
    for number, places in enumerate((quoted, {role: repr(str(tmp_path / name)) for role, name in names.items()})):
        merge(formula.format(**places), tmp_path / f"out{number}")
        card = (tmp_path / f"out{number}" / "README.md").read_text()
        assert "with" not in card.partition("---\n\n")[2] and str(tmp_path) not in card
        assert all(f"`{role}`" in card for role in names)


def test_an_unknown_architecture_with_experts_merges_by_name(tmp_path):
    def draw(seed):
        random = torch.Generator().manual_seed(seed)
        names = {f"net.blocks.{i}.experts.{j}.w": (6, 4) for i in range(2) for j in range(3)}
        names |= {"net.tok.table": (9, 4), "net.blocks.0.router.bias": (3,), "net.blocks.1.router.bias": (3,)}
        return {name: torch.randn(shape, generator=random).half() for name, shape in names.items()}

    for i, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        save_file(draw(i), tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "strange", "num_hidden_layers": 2}))
    merge(f"0.5*({tmp_path}/a + {tmp_path}/b)", tmp_path / "out")
    a, b, out = (tensors_of(tmp_path / name) for name in ("a", "b", "out"))
    assert all(torch.equal(out[name], ((a[name].float() + b[name].float()) / 2).half()) for name in a)


def test_what_a_gradient_gives_the_head_is_told(family):
    plan = plan_merge(recipe_of(family, "slerp", ("one",), t=[0.1, 0.9]))
    (told,) = [note for note in plan.notes if "first value of a gradient" in note]
    assert "lm_head.weight" in told and "t = 0.1" in told


def test_dry_run_writes_nothing(family, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    result = merge(recipe_of(family, "ties", weight=1.0, density=0.5), tmp_path / "out", dry_run=True)
    assert result.dry_run and result.tensors["merged"] == 21 and result.needs["disk_bytes"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_dtype_is_that_of_the_recipe_or_the_widest(family, tmp_path):
    wide = {name: tensor.float() for name, tensor in tensors_of(family["two"]).items()}
    folder = write_model(tmp_path / "wide", wide, vocab=words())
    merge({**recipe_of(family, "linear", ("one",), None, weight=1.0), "models": [
        {"model": str(family["one"])}, {"model": str(folder)}]}, tmp_path / "promoted")  # fmt: skip
    assert {t.dtype for t in tensors_of(tmp_path / "promoted").values()} == {torch.float32}
    merge({**recipe_of(family, "linear", base=None, weight=1.0), "dtype": "float16"}, tmp_path / "half")
    assert {t.dtype for t in tensors_of(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


# vocabularies


def test_a_union_keeps_padding_and_places_every_token(tmp_path):
    base = weights(1)
    one = write_model(tmp_path / "one", base, vocab=words(("<a>", "<b>")))  # 34 tokens in 40 rows
    two = write_model(tmp_path / "two", near(base, 2), vocab=words(("<c>", "<b>", "<a>", "<d>")))
    recipe = recipe_of({"one": one, "two": two}, "linear", base=None, weight=0.5, normalize=False)
    result = merge({**recipe, "tokenizer_source": "union", "base_model": str(one)}, tmp_path / "out")
    a, b, out = (tensors_of(folder)["model.embed_tokens.weight"].float() for folder in (one, two, tmp_path / "out"))
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    assert ids == {"<a>": 32, "<b>": 33, "<c>": 34, "<d>": 35} and out.shape == (40, DIM)
    expected = {31: (a[31], b[31]), 32: (a[32], b[34]), 33: (a[33], b[33]), 34: (b[32], b[32]), 35: (b[35], b[35])}
    expected |= {39: (a[39], a[39])}  # a padding row stays the base's
    for row, (x, y) in expected.items():
        torch.testing.assert_close(out[row], ((x + y) / 2).bfloat16().float())
    assert any("2 tokens were added" in note for note in result.notes)


def test_tokens_from_where_the_recipe_says(tmp_path):
    base = weights(1, vocab=34)
    one = write_model(tmp_path / "one", base, vocab=words(("<a>", "<b>")))
    two = write_model(tmp_path / "two", near(base, 2), vocab=words(("<b>", "<a>")))
    recipe = recipe_of({"one": one, "two": two}, "linear", base=None, weight=0.5)
    tokens = {
        "<a>": {"source": str(two), "force": True},
        "<new>": {"source": {"kind": "model_token", "model": str(one), "token": "w7"}},
        "<zero>": {"source": {"kind": "zero"}},
    }
    settings = {"source": "base", "tokens": tokens, "pad_to_multiple_of": 8}
    merge({**recipe, "base_model": str(one), "tokenizer": settings}, tmp_path / "out")
    b, a, out = (tensors_of(folder)["model.embed_tokens.weight"].float() for folder in (two, one, tmp_path / "out"))
    assert out.shape == (40, DIM)
    assert torch.equal(out[32], b[33]) and torch.equal(out[34], a[7]) and not out[35].any()
    torch.testing.assert_close(out[39], torch.stack([out[i] for i in range(36)]).mean(0), rtol=0.02, atol=2e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 40


def test_a_chat_template_is_chosen(family, tmp_path):
    chat = write_model(tmp_path / "chat", near(weights(1, tied=False), 9), vocab=words(), template=TEMPLATE)
    recipe = recipe_of(family | {"chat": chat}, "linear", ("one", "chat"), weight=0.5)
    recipe["models"].append({"model": str(family["base"]), "parameters": {"weight": 0.5}})
    merge({**recipe, "chat_template": "auto"}, tmp_path / "auto")
    assert json.loads((tmp_path / "auto" / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    merge({**recipe, "chat_template": "chatml"}, tmp_path / "chatml")
    assert "<|im_start|>" in json.loads((tmp_path / "chatml" / "tokenizer_config.json").read_text())["chat_template"]
    with pytest.raises(CheckpointError, match="give auto, chatml, or the text"):
        merge({**recipe, "chat_template": "alpaco"}, tmp_path / "none")


def test_fault_39_tokenizers_that_differ_need_a_policy(tmp_path):
    base = weights(1, vocab=34)
    one = write_model(tmp_path / "one", base, vocab=words(("<a>", "<b>")))
    two = write_model(tmp_path / "two", near(base, 2), vocab=words(("<b>", "<a>")))
    recipe = recipe_of({"one": one, "two": two}, "linear", base=None, weight=0.5)
    with pytest.raises(CheckpointError, match="permuted rows; set tokenizer_source: base or union"):
        merge(recipe, tmp_path / "out")


# faults


def spoiled(family, name, **changes):
    """A copy of a model with some tensors replaced; None removes one."""
    tensors = tensors_of(family[name])
    for key, value in changes.items():
        full = key.replace("__", ".")
        tensors.pop(full) if value is None else tensors.__setitem__(full, value)
    folder = family["base"].parent / f"{name}-spoiled"
    return write_model(folder, tensors, vocab=words())


def refused(family, folder, tmp_path, *says, error=CheckpointError, **parameters):
    recipe = recipe_of(family | {"bad": folder}, "task_arithmetic", ("one", "bad"), weight=1.0)
    with pytest.raises(error) as caught:
        merge({**recipe, **parameters}, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in says), message
    assert not (tmp_path / "out").exists()


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32])
def test_fault_16_17_numbers_without_a_scale(dtype, family, tmp_path):
    bad = spoiled(family, "two", **{UP: torch.zeros(24, DIM).to(dtype)})
    refused(family, bad, tmp_path, UP, "numbers without a known scale", str(bad))


def test_fault_16_fp8_with_scales_is_read_as_what_it_stands_for(family, tmp_path):
    values = torch.randn(24, DIM).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.01]])
    bad = spoiled(family, "two", **{UP: values, f"{UP}_scale_inv": scale})
    result = merge(recipe_of(family | {"bad": bad}, "linear", ("one", "bad"), None, weight=0.5), tmp_path / "out")
    one, out = tensors_of(family["one"]), tensors_of(tmp_path / "out")
    assert torch.equal(out[UP], ((one[UP].float() + values.float() * scale) / 2).bfloat16())
    assert result.tensors == {"merged": 21, "copied": 0, "skipped": 1}


def test_fault_37_38_tokens_beyond_the_rows(family, tmp_path):
    folder = write_model(tmp_path / "bad", tensors_of(family["two"]), vocab=words(count=39), config={"vocab_size": 41})
    refused(family, folder, tmp_path, "vocab_size 41", "the embedding has 40 rows", "has id 41")


def test_fault_18_dtypes_differ_and_it_is_told(family, tmp_path):
    bad = spoiled(family, "two", **{UP: tensors_of(family["two"])[UP].float()})
    recipe = recipe_of(family | {"bad": bad}, "task_arithmetic", ("one", "bad"), weight=1.0)
    assert any("dtypes differ" in note for note in plan_merge(recipe).notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp"])
def test_fault_19_nan_and_inf(value, method, family, tmp_path):
    tensor = tensors_of(family["one"])[UP].clone()
    tensor[3, 5] = value
    bad = spoiled(family, "one", **{UP: tensor})
    parameters = {name: PARAMETERS[name] for name in ("weight", "t", "density") if name in METHODS[method].parameters}
    recipe = recipe_of(family | {"bad": bad}, method, ("bad",), **parameters)
    with pytest.raises(CheckpointError, match=rf"{UP}.*1 NaN or Inf"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge(recipe, tmp_path / "out", allow_nonfinite=True).nonfinite >= 1


def test_fault_23_a_tensor_is_absent_from_one_model(family, tmp_path):
    refused(family, spoiled(family, "two", **{UP: None}), tmp_path, f"{UP} is not in", "nearest there is")
    extra = spoiled(family, "three", **{"model.layers.1.mlp.up_proj.bias": torch.zeros(24)})
    refused(family, extra, tmp_path, "model.layers.1.mlp.up_proj.bias", "is not in", "nearest there is")


def test_fault_24_all_shapes_that_differ_are_listed(family, tmp_path):
    wide = {
        name: torch.zeros(DIM, 25) if "down" in name else torch.zeros(25, DIM) if "mlp" in name else tensor
        for name, tensor in tensors_of(family["two"]).items()
    }
    bad = write_model(tmp_path / "wide", wide, vocab=words(), config={"intermediate_size": 25})
    down = "model.layers.0.mlp.down_proj.weight"
    refused(family, bad, tmp_path, "6 problems", f"{UP} is 24x16 in", "25x16 in", f"{down} is 16x24 in")


def test_a_model_with_fewer_layers_is_told(family, tmp_path):
    short = {name: tensor for name, tensor in tensors_of(family["two"]).items() if "layers.1" not in name}
    folder = write_model(tmp_path / "short", short, vocab=words(), config={"num_hidden_layers": 1})
    refused(family, folder, tmp_path, "the number of layers differs", "1 in", "pick layers with slices")


def test_all_problems_are_told_at_once(family, tmp_path):
    recipe = recipe_of(family, "ties", weight=[{"filter": "self_atn", "value": 1}, {"value": 1}], density=0.5)
    recipe["chat_template"] = "nothing"
    with pytest.raises(CheckpointError, match=r"2 problems.*chat_template.*|2 problems.*self_atn.*") as caught:
        merge(recipe, tmp_path / "out")
    assert "did you mean" in str(caught.value) and "chat_template" in str(caught.value)


def test_a_missing_weight_is_told_before_work(family, tmp_path):
    with pytest.raises((CheckpointError, ConfigError), match="task_arithmetic: weight is not set for"):
        merge(recipe_of(family, "task_arithmetic"), tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_buffers_of_whole_numbers_are_copied_where_they_agree(family, tmp_path):
    name, ids = "model.position_ids", torch.arange(7)
    folders = {key: spoiled(family, key, **{name: ids}) for key in ("base", "one")}
    merge(recipe_of(folders, "task_arithmetic", ("one",), weight=1.0), tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[name], ids)
    folders["two"] = spoiled(family, "two", **{name: ids + 1})
    with pytest.raises(CheckpointError, match=rf"{name} holds torch.int64 that differ"):
        merge(recipe_of(folders, "task_arithmetic", ("one", "two"), weight=1.0), tmp_path / "out2")


def test_fault_76_77_78_outputs_that_must_not_be(family, tmp_path):
    recipe = recipe_of(family, "task_arithmetic", weight=1.0)
    with pytest.raises(OutputError, match="is the input"):
        merge(recipe, family["one"], overwrite=True)
    merge(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        merge(recipe, tmp_path / "out")
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"old")
    merge({**recipe, "parameters": {"weight": 0.5}}, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.safetensors").exists()


KILLED = """
import os, signal, sys
from lapis.weights.engine import stream, writer
stream.RECORD, writer.BLOCK = 2000, 4096
whole = writer.Writer.write
def write(self, data):
    whole(self, data)
    write.left -= 1
    if write.left == 0:
        self._wait()  # the blocks before this one are in the file
        os.kill(os.getpid(), signal.SIGKILL)
write.left = int(sys.argv[3])
writer.Writer.write = write
from lapis.weights.merge.merge import merge
merge(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
def test_fault_73_a_killed_merge_goes_on_to_the_same_bytes(method, family, tmp_path):
    parameters = {name: PARAMETERS[name] for name in ("weight", "density") if name in METHODS[method].parameters}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(family, method, **parameters)))
    merge(path, tmp_path / "whole")
    for moment in (3, 20):
        run = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "out"), str(moment)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        assert subprocess.run(run, env=environment, check=False).returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert merge(path, tmp_path / "out").bytes_resumed > 0
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
