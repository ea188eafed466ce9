"""What must be refused, or said, before models are combined: missing tensors, configs, strangers, unread tokens."""

import json
from typing import Any

import pytest
import torch

from lapis.errors import CheckpointError
from lapis.weights.checks import kinship
from lapis.weights.diff.diff import diff
from lapis.weights.diff.lineage import lineage
from lapis.weights.graft.graft import graft
from lapis.weights.matching import open_models
from lapis.weights.merge.merge import merge

LACKING = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight")


def without(folders, folder, name, shards):
    """The model of a folder without one tensor, its index and files consistent."""
    tensors = {n: t for n, t in folders.read(folder).items() if n != name}
    return folders.write(folder.parent / f"less-{folder.name}", tensors, vocab=folders.words(), shards=shards)


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize(("role", "shards"), [("base", 1), ("chat", 2), ("onto", 1), ("onto", 3)])
def test_a_tensor_that_the_config_asks_for_is_missing(trio, folders, tmp_path, role, shards, name):
    models = trio()
    models[role] = without(folders, models[role], name, shards)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        graft(**models, out=tmp_path / "out", scale="0=0,default=1")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        merge(f"{models['onto']} + 0.5*({models['chat']} - {models['base']})", tmp_path / "out")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        lineage(models["base"], [models["chat"], models["onto"]])
    if role != "onto":
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            diff(models["base"], models["chat"])
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_all_three_models_lack(trio, folders, tmp_path):
    models = {role: without(folders, folder, LACKING[0], 1) for role, folder in trio().items()}
    with pytest.raises(
        CheckpointError, match=r"3 problems.*base: .*up_proj.weight is missing.*config.json asks for it"
    ):
        graft(**models, out=tmp_path / "out")


def with_rope(folders, tmp_path, name, tensors, theta, spelling):
    """A folder that says its rope theta as transformers 4 or 5 does."""
    rope = {"rope_theta": theta, "rope_scaling": None}
    if spelling == 5:
        rope = {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    return folders.write(tmp_path / name, tensors, vocab=folders.words(), config=rope)


@pytest.mark.parametrize(("one", "two"), [(4, 4), (4, 5), (5, 4), (5, 5)])
@pytest.mark.parametrize("same", [True, False])
def test_rope_is_compared_as_it_is_meant(folders, tmp_path, one, two, same):
    base = folders.weights(1)
    a = with_rope(folders, tmp_path, "a", base, 10_000.0, one)
    b = with_rope(folders, tmp_path, "b", folders.near(base, 2), 10_000.0 if same else 1_000_000.0, two)
    results: list[Any] = [
        graft(a, b, a, tmp_path / "g", dry_run=True),
        merge(f"{a} + 0.5*({b} - {a})", tmp_path / "m", dry_run=True),
        diff(a, b),
    ]
    for result in results:
        lines = [note for note in result.notes if "rope" in note]
        assert len(lines) == (0 if same else 1), lines
        assert same or ("10,000" in lines[0] and "1,000,000" in lines[0])


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, "norm_eps is 1e-05 in"),
        ({}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_factor is not there in"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_scaling": {"rope_type": "linear", "factor": 4}}, ""),
        ({"model_type": "odd", "rope_theta": 5e5}, {"model_type": "odd", "rope_parameters": {"rope_theta": 5e5}}, ""),
        ({"model_type": "odd", "rope_theta": 5e5}, {"model_type": "odd", "rope_parameters": {"rope_theta": 1e4}},
         "rope_theta is 500,000 in"),
        ({"model_type": "odd", "logit_softcap": 30}, {"model_type": "odd", "logit_softcap": 50}, "logit_softcap is 30"),
    ],
)  # fmt: skip
def test_fields_that_change_the_arithmetic_are_named(folders, tmp_path, one, two, message):
    base = folders.weights(1)
    a = folders.write(tmp_path / "a", base, vocab=folders.words(), config=one)
    b = folders.write(tmp_path / "b", folders.near(base, 2), vocab=folders.words(), config=two)
    for result in (graft(a, b, a, tmp_path / "g", dry_run=True), diff(a, b)):
        lines = [note for note in result.notes if (" in " in note and "is kept" in note) or "something else" in note]
        assert any(message in line for line in lines) if message else not lines, lines


@pytest.fixture
def strangers(folders, tmp_path):
    """Three models of one shape and vocabulary that have nothing to do with each other."""
    return {
        role: folders.write(tmp_path / role, folders.weights(seed), vocab=folders.words())
        for seed, role in enumerate(("base", "chat", "onto"), 1)
    }


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_difference_of_unrelated_models_is_refused(strangers, folders, tmp_path, dry_run):
    with pytest.raises(CheckpointError, match=r"chat is no fine-tune of base.*--allow-unrelated") as caught:
        graft(**strangers, out=tmp_path / "out", dry_run=dry_run)
    assert "onto is no fine-tune of base" in str(caught.value) and not (tmp_path / "out").exists()
    done = graft(**strangers, out=tmp_path / "out", allow_unrelated=True)
    assert any("no fine-tune" in note and "allow-unrelated" in note for note in done.notes)
    out, base, chat, onto = (folders.read(folder) for folder in [tmp_path / "out", *strangers.values()])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(out[name], (onto[name].double() + chat[name].double() - base[name].double()).bfloat16())


def test_merges_by_differences_want_a_parent_too(strangers, tmp_path):
    a, b, c = map(str, strangers.values())
    recipe = {"merge_method": "task_arithmetic", "base_model": a, "models": [{"model": b}], "parameters": {"weight": 1}}
    for job in (recipe, f"{c} + 0.5*({b} - {a})"):
        with pytest.raises(CheckpointError, match="no fine-tune of"):
            merge(job, tmp_path / "out")
        assert merge(job, tmp_path / "out", allow_unrelated=True, dry_run=True).notes
    soup = {"merge_method": "linear", "models": [{"model": a}, {"model": b}], "parameters": {"weight": 1}}
    assert any("are unrelated" in note for note in merge(soup, tmp_path / "out", dry_run=True).notes)
    assert any("no fine-tune of" in note for note in lineage(a, [b, c]).notes)


def test_a_few_outliers_do_not_hide_a_parent(folders, tmp_path):
    base = folders.weights(1, dtype=torch.float16)
    child = folders.near(base, 2)
    child["model.layers.0.mlp.up_proj.weight"][0, 0] = 60000.0
    models = open_models({"a": folders.write(tmp_path / "a", base), "b": folders.write(tmp_path / "b", child)}, "test")
    cosine, _ = kinship(models["a"], models["b"])
    assert cosine is not None and cosine > 0.9


def only_sentencepiece(folders, tmp_path, name, tensors, content=b"pieces"):
    folder = folders.write(tmp_path / name, tensors)
    (folder / "tokenizer.model").write_bytes(content)
    return folder


def test_tokens_that_cannot_be_compared_are_refused_unless_told(folders, tmp_path):
    base = folders.weights(1)
    a = folders.write(tmp_path / "a", base, vocab=folders.words())
    b = only_sentencepiece(folders, tmp_path, "b", folders.near(base, 2))
    recipe = {"merge_method": "linear", "models": [{"model": str(m)} for m in (a, b)], "parameters": {"weight": 1}}
    for job in (
        lambda **more: merge(recipe, tmp_path / "out", dry_run=True, **more),
        lambda **more: merge(f"{a} + 0.5*({b} - {a})", tmp_path / "out", dry_run=True, **more),
        lambda **more: graft(a, b, a, tmp_path / "out", dry_run=True, **more),
    ):
        with pytest.raises(CheckpointError, match=r"has only tokenizer\.model.*--same-tokens"):
            job()
        assert any("same-tokens" in note for note in job(same_tokens=True).notes)


def test_equal_sentencepiece_files_are_equal_tokens(folders, tmp_path):
    base = folders.weights(1)
    a, b = (only_sentencepiece(folders, tmp_path, n, t) for n, t in (("a", base), ("b", folders.near(base, 2))))
    recipe: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1}}
    recipe["models"] = [{"model": str(m)} for m in (a, b)]
    assert merge(recipe, tmp_path / "out").tensors["merged"]
    c = only_sentencepiece(folders, tmp_path, "c", folders.near(base, 3), b"other pieces")
    recipe["models"].append({"model": str(c)})
    with pytest.raises(CheckpointError, match=r"has only tokenizer\.model"):
        merge(recipe, tmp_path / "out3")


def test_refusals_of_the_command_line_are_one_line(strangers, tmp_path, capsys):
    from lapis.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["graft", *(f"--{role}={folder}" for role, folder in strangers.items()), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().err.strip()
    assert end.value.code == 1 and text.count("\n") == 0 and "--allow-unrelated" in text
    main(["graft", *(f"--{role}={folder}" for role, folder in strangers.items()), "--out", str(tmp_path / "out"),
          "--allow-unrelated", "--dry-run", "--json"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["dry_run"]
