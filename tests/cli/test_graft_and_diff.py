"""`lapis graft` and `lapis diff` as a user types them: JSON on standard output, one line for a refusal, a page."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lapis
from lapis.evaluation.agree import PROMPTS, agreement
from lapis.families.config import ModelConfig
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.chat.chat import encode_prompt
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three small models that were never trained, with one tokenizer, as lapis itself writes them."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a few words of text, said again and again: " * 20], 300)
    config = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, vocab=300, context=64)
    torch.manual_seed(0)
    base = Transformer(config)
    folders = {}
    for role in ("base", "chat", "onto"):
        with torch.no_grad():
            for weight in base.parameters():
                weight += 0.01 * torch.randn_like(weight)
        folders[role] = place / role
        save(base, folders[role])
        tokenizer.save(folders[role])
    return folders


def test_graft_prints_one_object_and_tries_the_result_out(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    options = [part for role, folder in models.items() for part in (f"--{role}", folder)]
    status, out, err = run("graft", *options, "--out", tmp_path / "out", "--scale", "0=0.5,1=1", "--json")
    assert status == 0 and err == ""
    result = json.loads(out)
    keys = {"out", "tensors", "bytes_read", "bytes_written", "seconds", "peak_memory_bytes", "sha256"}
    assert keys <= result.keys() and result["tensors"].keys() == {"merged", "copied", "skipped"}
    smoke = result["smoke"]
    assert smoke["finite"] and 0 < smoke["kl_from"]["onto"] < 1 and 0 < smoke["kl_from"]["chat"] < 1
    model, tokenizer = lapis.load(tmp_path / "out")
    assert lapis.generate(model, tokenizer, "a few", lapis.Sampling(max_tokens=2, temperature=0.0)) is not None
    status, out, err = run("graft", *options, "--out", tmp_path / "out")
    assert (status, out) == (1, "") and err.count("\n") == 1 and "exists already" in err


def test_diff_prints_one_object_and_writes_a_page(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    status, out, err = run("diff", models["base"], models["chat"], "--rows", "--html", page, "--json")
    assert status == 0 and err == f"page: {page}\n"
    result = json.loads(out)
    assert {"tensors", "rows", "same_shape", "only_in_a", "only_in_b"} <= result.keys()
    names = ("name", "layer", "component", "cosine", "relative_norm", "mean_abs", "max_abs", "identical")
    assert set(names) <= result["tensors"][0].keys()
    assert {"token", "id", "special", "relative_norm", "cosine"} <= result["rows"][0].keys()
    assert "changed most" in page.read_text(encoding="utf-8")
    assert "Is it the template" in page.read_text(encoding="utf-8")
    status, out, err = run("diff", models["base"], models["chat"], "--html", page)
    assert (status, out) == (1, "") and "exists already" in err
    again = ("--html", page, "--overwrite")
    status, out, _ = run("diff", models["base"], models["chat"], models["onto"], *again, "--json")
    assert status == 0 and json.loads(out)["cosines"][0][0] == pytest.approx(1)
    assert "How far each went" in page.read_text(encoding="utf-8")
    status, _, _ = run("diff", models["base"], models["chat"], "--spectra", *again)
    assert status == 0 and "has the lowest stable rank" in page.read_text(encoding="utf-8")
    status, out, _ = run("diff", models["base"], models["chat"])
    assert status == 0 and "changed most, by" in out and "below the rounding floor" not in out
    status, out, _ = run("diff", models["base"], models["base"])
    assert status == 0 and "No weight changed" in out
    status, out, err = run("diff", models["base"], tmp_path / "nothing")
    assert (status, out) == (1, "") and err.count("\n") == 1


def test_diff_says_what_rounding_alone_would_do(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    model = lapis.load(models["base"])[0].bfloat16()
    save(model, tmp_path / "a", torch.bfloat16)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight[0, 0] *= 1.01
    save(model, tmp_path / "b", torch.bfloat16)
    status, out, _ = run("diff", tmp_path / "a", tmp_path / "b")
    assert status == 0 and "1 of 1 change is below the rounding floor" in out


def test_rounding_is_said_with_the_remedy(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    """Where bfloat16 eats a small difference, in graft and merge alike."""
    model = lapis.load(models["base"])[0].bfloat16()
    save(model, tmp_path / "a", torch.bfloat16)
    small = load(tmp_path / "a").float()
    with torch.no_grad():
        for weight in small.parameters():
            weight *= 1.001
    save(small, tmp_path / "b", torch.float32)
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    shutil.copytree(a, c)
    hint = "of the difference (by norm); --dtype float32 keeps it"
    for number, command in enumerate((
        ("graft", "--base", a, "--chat", b, "--onto", a, "--no-smoke"),
        ("merge", f"{a} + 0.5*({b} - {c})"),
    )):  # fmt: skip
        more = () if command[0] == "graft" else ("--dtype", "bfloat16")
        status, out, _ = run(*command, *more, "--out", tmp_path / f"coarse{number}")
        assert status == 0 and hint in out
        status, out, _ = run(*command, "--out", tmp_path / f"fine{number}", "--dtype", "float32")
        assert status == 0 and "--dtype" not in out
        saved = load(tmp_path / f"fine{number}")
        assert {weight.dtype for weight in saved.parameters()} == {torch.float32}


def test_large_models_are_tried_out_on_fewer_tokens(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the end of one prompt, so that computing takes the same time for any size."""
    parameters = sum(weight.numel() for weight in lapis.load(models["base"])[0].parameters())
    labels: list[str] = []
    for tokens in (10, 30):
        monkeypatch.setattr("lapis.evaluation.agree._WORK", tokens * parameters)
        outcome = agreement(models["chat"], {"base": models["base"]}, progress=lambda *told: labels.append(told[2]))
        assert outcome["tokens"] == tokens and outcome["kl_from"]["base"] > 0
    monkeypatch.setattr("lapis.evaluation.agree._WORK", 0)
    assert agreement(models["chat"], {})["tokens"] == 8
    assert labels[0] == "trying the result out on 10 tokens: reading and running chat"


def test_a_graft_is_tried_out_in_one_pass(models: dict[str, Path]) -> None:
    outcome = agreement(models["chat"], {"base": models["base"]})
    tokenizer = Tokenizer.open(models["chat"])
    kl, places = 0.0, 0
    chat, base = (lapis.load(models[name])[0] for name in ("chat", "base"))
    asked = [encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    for ids in [*(tokenizer.encode(prompt) for prompt in PROMPTS), *asked]:
        with torch.no_grad():
            ours, theirs = (model(torch.tensor([ids]))[0, -8:].double().log_softmax(-1) for model in (chat, base))
        kl, places = kl + float((ours.exp() * (ours - theirs)).sum()), places + len(ours)
    assert outcome["positions"] == places and outcome["kl_from"]["base"] == pytest.approx(kl / places, rel=1e-4)
