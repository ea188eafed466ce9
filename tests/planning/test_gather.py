"""What `lapis gather` writes, beside transformers' layers and gradients in float64, and merges that weigh with it."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError, ConfigError, DataError
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.planning.gather import gather
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.weights.merge.merge import merge
from lapis.weights.merge.statistics import FILE, open_statistics

TEXT = ["one two three and more of the same. " * 6, "four five six, seven: something else " * 9, "short"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small models of one kind, with text: name -> path."""
    root = tmp_path_factory.mktemp("gather")
    tokenizer = train_tokenizer([" ".join(TEXT)], 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=300, context=64))
    for name in ("one", "two"):
        save(model, root / name)
        tokenizer.save(root / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return {name: root / name for name in ("one", "two", "text.jsonl")}


def reference(folder, context=64):
    """transformers' model in float64, and the ids of the windows that are read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = Tokenizer.open(folder)
    windows = []
    for text in TEXT:
        ids = [tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id, *tokenizer.encode(text)]
        scored = 1
        while scored < len(ids):
            first = 0 if scored == 1 else scored - context // 2
            windows.append((ids[first : first + context + 1], scored - first))
            scored = first + context + 1
    return model, windows


def test_gram_matrices_are_of_what_layers_read(folders, tmp_path):
    result = gather(folders["one"], tmp_path / "out", "gram", text=folders["text.jsonl"])
    model, windows = reference(folders["one"])
    sums = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:

            def hook(_, inputs, name=name):
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
                sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + x.T @ x

            module.register_forward_pre_hook(hook)
    count = sum(len(ids) for ids, _ in windows)
    for ids, _ in windows:
        model(torch.tensor([ids]))
    checkpoint = open_checkpoint(folders["one"])
    held = open_statistics(tmp_path / "out", "gram", checkpoint)
    assert set(held.index) == set(sums) and result["tensors"] == len(sums) == 14
    assert result["tokens"] == count
    for name, total in sums.items():
        torch.testing.assert_close(held.read(name).double(), total / count, atol=1e-5, rtol=1e-4)
    stored = load_file(tmp_path / "out" / FILE)
    assert len(stored) == 8  # q, k and v read the same, and so do gate and up


def test_fisher_is_the_mean_of_squared_gradients(folders, tmp_path):
    gather(folders["one"], tmp_path / "out", "fisher", text=folders["text.jsonl"])
    model, windows = reference(folders["one"])
    squares = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for ids, first in windows:
        model.zero_grad()
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sum(logp[place - 1, ids[place]] for place in range(first, len(ids))).backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square() / len(windows)
    held = load_file(tmp_path / "out" / FILE)
    assert held.keys() == squares.keys()
    for name in held:
        torch.testing.assert_close(held[name].double(), squares[name].detach(), atol=1e-6, rtol=1e-3)


def recipe(folders, method, statistics, **parameters):
    models = [{"model": str(folders[n]), "statistics": str(statistics / n)} for n in ("one", "two")]
    return {"merge_method": method, "models": models, "parameters": parameters}


@pytest.fixture(scope="module")
def statistics(folders, tmp_path_factory):
    """kind -> folder with what was gathered of either model."""
    result = {}
    for kind in ("gram", "fisher"):
        result[kind] = tmp_path_factory.mktemp(kind)
        for name in ("one", "two"):
            gather(folders[name], result[kind] / name, kind, text=folders["text.jsonl"])
    return result


def test_regmean_fits_the_models_better_than_their_mean(folders, statistics, tmp_path):
    merge(recipe(folders, "regmean", statistics["gram"], off_diagonal=1.0), tmp_path / "out")
    merge(recipe(folders, "regmean", statistics["gram"], off_diagonal=1.0), tmp_path / "again", stage_memory=0)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    models = [load_file(folders[n] / "model.safetensors") for n in ("one", "two")]
    held = [open_statistics(statistics["gram"] / n, "gram", open_checkpoint(folders[n])) for n in ("one", "two")]
    for name, value in merged.items():
        mean = (models[0][name].double() + models[1][name].double()) / 2
        if name not in held[0].index:
            torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=1e-6)
            continue
        grams = [each.read(name).double() for each in held]

        def misfit(weight, name=name, grams=grams):
            apart = [weight.double() - model[name].double() for model in models]
            return sum(float((d @ gram * d).sum()) for d, gram in zip(apart, grams, strict=True))

        assert misfit(value) < misfit(mean)
        nudged = [misfit(value + 1e-3 * torch.randn_like(value)) for _ in range(3)]
        assert misfit(value) < min(nudged)


def test_fisher_by_recipe_equals_its_formula(folders, statistics, tmp_path):
    merge(recipe(folders, "fisher", statistics["fisher"], floor=1e-8), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    models = [load_file(folders[n] / "model.safetensors") for n in ("one", "two")]
    shares = [load_file(statistics["fisher"] / n / FILE) for n in ("one", "two")]
    for name, value in merged.items():
        f = [share[name].double().clamp(min=1e-8) for share in shares]
        expected = (f[0] * models[0][name].double() + f[1] * models[1][name].double()) / (f[0] + f[1])
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)


def test_statistics_that_do_not_fit_are_refused(folders, statistics, tmp_path):
    wrong = recipe(folders, "fisher", statistics["gram"])
    with pytest.raises(CheckpointError, match="holds gram and not fisher"):
        merge(wrong, tmp_path / "out")
    without = recipe(folders, "regmean", statistics["gram"])
    del without["models"][1]["statistics"]
    with pytest.raises(ConfigError, match=r"regmean needs statistics of .*two; give the folder of lapis gather"):
        merge(without, tmp_path / "out")
    with pytest.raises(ConfigError, match="linear has no use for them; leave them out"):
        merge(recipe(folders, "linear", statistics["gram"], weight=1), tmp_path / "out")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    held = load_file(statistics["fisher"] / "one" / FILE)
    for metadata, message in (
        ({"format": "lapis-statistics", "version": "9"}, "format .9. is not known"),
        ({"format": "lapis-statistics", "version": "1", "statistics": "{"}, "its description cannot be read"),
        ({"format": "lapis-statistics", "version": "1", "statistics": json.dumps(
            {"kind": "fisher", "model": {"source": "x", "headers_sha256": "0"}, "same": {}})}, "of another model"),
    ):  # fmt: skip
        save_file(held, damaged / FILE, metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            open_statistics(damaged, "fisher", open_checkpoint(folders["one"]))
    with pytest.raises(CheckpointError, match=f"holds no {FILE}; make it with lapis gather"):
        open_statistics(folders["two"], "gram", open_checkpoint(folders["one"]))
    assert not (tmp_path / "out").exists()


def test_nothing_to_gather_from_is_refused(folders, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ConfigError, match="give --text or --chats"):
        gather(folders["one"], tmp_path / "out")
    with pytest.raises(DataError):
        gather(folders["one"], tmp_path / "out", text=empty)
    assert not (tmp_path / "out").exists()


def test_as_it_is_typed(run, folders, tmp_path: Path):
    status, out, _ = run("gather", folders["one"], "--kind", "fisher", "--text", folders["text.jsonl"], "--tokens", 90,
                         "--out", tmp_path / "out", "--json")  # fmt: skip
    result = json.loads(out)
    assert status == 0 and result["kind"] == "fisher" and 90 <= result["tokens"] < 90 + 65 + 1
    assert math.isclose(result["bytes"], sum(t.nbytes for t in load_file(tmp_path / "out" / FILE).values()))
    status, _, err = run("gather", folders["one"], "--text", folders["text.jsonl"], "--out", tmp_path / "out")
    assert status == 1 and "exists already" in err
