"""`merge_method: moe`: refusals, the account, what is drawn; test_mergekit_moe.py has the weights beside mergekit's."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lapis
from lapis.cli.main import main
from lapis.errors import LapisError
from tests.weights.conftest import DIM, FFN, near, weights, words, write_model


@pytest.fixture
def models(tmp_path):
    """base, one and two: Llama's kind, in bfloat16, with a tokenizer."""
    base = weights(0)
    for seed, name in enumerate(("base", "one", "two")):
        write_model(tmp_path / name, near(base, seed) if seed else base, vocab=words())
    return tmp_path


def recipe_of(models, **more):
    experts = [{"source_model": str(models / name), "positive_prompts": [text]} for name, text in
               (("one", "w1 w2"), ("two", "w3"))]  # fmt: skip
    return {"merge_method": "moe", "base_model": str(models / "base"), "experts": experts, **more}


def test_account_tells_of_every_tensor(models, tmp_path, capsys):
    path = tmp_path / "moe.yaml"
    document = recipe_of(models, gate_mode="hidden")
    del document["merge_method"]  # as mergekit-moe has it
    path.write_text(yaml.safe_dump(document))
    main(["merge", str(path), "--out", str(tmp_path / "dry"), "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["tensors"]["merged"] and not (tmp_path / "dry").exists()
    main(["merge", str(path), "--out", str(tmp_path / "out"), "--json"])
    counts = json.loads(capsys.readouterr().out)["tensors"]
    # two layers: a router and three matrices of two experts; embedding, last norm, two norms and four of attention
    assert counts == {"merged": 2 * (1 + 6), "copied": 2 + 2 * 6, "skipped": 2 * 3 + 2 * (2 + 2 * 6)}
    account = json.loads((tmp_path / "out" / "lapis-merge.json").read_text())
    assert {entry["reason"] for entry in account["skipped"]} == {
        "the experts take the place of the base's MLPs", "an expert gives its MLPs only"
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()


def test_noise_is_drawn_from_the_seed(models, tmp_path):
    document = recipe_of(models, gate_mode="random", dtype="float32")
    document["experts"][0]["noise_scale"] = 0.1
    found = []
    for seed in (1, 1, 2):
        lapis.merge(document, tmp_path / "out", seed=seed, overwrite=True)
        found.append(load_file(tmp_path / "out" / "model.safetensors"))
    name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    own = load_file(models / "one" / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"].float()
    assert torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[2][name])
    assert 0.09 < float((found[0][name] - own).std()) < 0.11


def test_gates_that_are_nearly_parallel_are_noted(models, tmp_path):
    document = recipe_of(models, gate_mode="cheap_embed")
    document["experts"][1]["positive_prompts"] = ["w1 w2 w1 w2 w1 w2"] * 40
    document["experts"][0]["positive_prompts"] = ["w1 w2 w1 w2 w1 w2 w1"] * 40
    assert any("nearly parallel in all layers" in note for note in lapis.merge(document, tmp_path / "out").notes)


REFUSED = {
    "no prompts": ({}, "has no positive_prompts"),
    "same prompts": ({}, "the same prompts"),
    "too few": ({"experts_per_token": 3}, "experts_per_token is 3 of 2"),
    "no such mode": ({"gate_mode": "hiden"}, "hidden"),
    "a wrong key": ({"expert": []}, "experts"),
    "another architecture": ({"architecture": "deepseek"}, "mixtral, qwen3_moe, qwen2_moe"),
    "no shared experts": ({"architecture": "qwen"}, "0 shared_experts"),
    "two shared experts": ({}, "2 shared_experts"),
    "unlike widths": ({}, "intermediate_size is 24"),
    "another kind": ({}, "models of one kind"),
    "no states": ({}, "states=lapis.prompt_states"),
    "biases": ({"gate_mode": "random"}, "bias"),
    "prompts of no texts": ({}, "a list of texts"),
    "no model": ({}, "nowhere"),
    "in stages": ({}, "stands alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, models, tmp_path):
    more, said = REFUSED[case]
    document = recipe_of(models, **more)
    one = document["experts"][0]
    if case == "no prompts":
        del one["positive_prompts"]
    elif case == "same prompts":
        one["positive_prompts"] = document["experts"][1]["positive_prompts"]
    elif case == "two shared experts":
        document["shared_experts"] = document["experts"]
    elif case == "unlike widths":
        wide = {name: torch.cat([t, t[:1]]) if t.shape == (FFN, DIM) else t for name, t in weights(3).items()}
        wide = {name: torch.cat([t, t[:, :1]], 1) if t.shape == (DIM, FFN) else t for name, t in wide.items()}
        one["source_model"] = str(write_model(tmp_path / "wide", wide, config={"intermediate_size": FFN + 1}))
    elif case == "another kind":
        path = models / "one" / "config.json"
        path.write_text(path.read_text().replace('"llama"', '"qwen2"'))
    elif case == "biases":
        path = models / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
        tensors = load_file(models / "base" / "model.safetensors")
        tensors |= {f"model.layers.{i}.self_attn.{n}_proj.bias": torch.zeros(DIM if n in "qo" else DIM // 2)
                    for i in range(2) for n in "qkvo"}  # fmt: skip
        save_file(tensors, models / "base" / "model.safetensors", {"format": "pt"})
    elif case == "prompts of no texts":
        one["positive_prompts"] = "w1"
    elif case == "no model":
        one["source_model"] = str(tmp_path / "nowhere")
    elif case == "in stages":
        document = {"merge_method": "linear", "models": [{"model": document}, {"model": str(models / "one")}]}
    with pytest.raises(LapisError) as refusal:
        lapis.merge(document, tmp_path / "out")
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
