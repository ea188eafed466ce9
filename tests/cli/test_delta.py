"""`lapis delta` as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer


@pytest.fixture
def lapis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> Any:
    """Runs a command beside base, chat and onto, which share a tokenizer."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 280)
    model = Transformer(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=tokenizer.rows, context=64, tied=True))
    for name in ("base", "chat", "onto"):
        save(model.bfloat16(), name)
        tokenizer.save(Path(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return run


def test_extract_show_and_apply(lapis: Any) -> None:
    extract = ("delta", "extract", "--base", "base", "--chat", "chat", "--json", "--out")
    status, out, err = lapis(*extract, "d")
    assert status == 0, err
    result = json.loads(out)
    assert result["relative_error"] == 0 and result["bytes"] == Path("d/delta.safetensors").stat().st_size
    assert result["check"]["kl_from"]["the exact graft"] == 0.0, result["check"]
    status, out, err = lapis(*extract, "d1", "--bits", "1")
    assert status == 0 and json.loads(out)["check"]["kl_from"]["the exact graft"] > 0, err
    Path("chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]}'
    )
    status, out, err = lapis(*extract, "d2", "--bits", "1", "--chats", "chats.jsonl")
    likely = json.loads(out)["check"]["response_nll"]
    assert (
        lapis("graft", "--base", "base", "--chat", "chat", "--onto", "base", "--norms", "add", "--out", "exact")[0] == 0
    )
    status, out, err = lapis("eval", "exact", "--chats", "chats.jsonl", "--json")
    assert likely["the exact graft"] == pytest.approx(json.loads(out)["chats"]["response_nll"], rel=1e-3), err
    assert likely["base + delta"] != likely["the exact graft"]
    status, out, err = lapis("delta", "show", "d1")
    assert status == 0 and "1 bit" in out and "base: base" in out and "signs" in out, err
    keys = {"out", "tensors", "bytes_read", "bytes_written", "seconds", "peak_memory_bytes", "sha256"}
    for name in ("d", "d1"):
        status, out, err = lapis("delta", "apply", name, "--onto", "onto", "--out", f"{name}-out", "--json")
        assert status == 0 and keys <= set(json.loads(out)), err
    assert lapis("graft", "--base", "base", "--chat", "chat", "--onto", "onto", "--out", "g", "--no-smoke")[0] == 0
    assert Path("g/model.safetensors").read_bytes() == Path("d-out/model.safetensors").read_bytes()
    scales = ("--scale", "0.5", "--scale", "1")
    assert lapis("delta", "apply", "d", "d1", "--onto", "onto", "--out", "two", *scales)[0] == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("delta", "apply", "--onto", "onto", "--out", "no"), "needs a delta"),
        (("delta", "apply", "base", "--onto", "onto", "--out", "no"), "holds no delta.safetensors"),
        (("delta", "show", "base"), "holds no delta.safetensors"),
        (("delta", "extract", "--base", "base", "--chat", "none", "--out", "no"), "none"),
        (("delta", "extract", "--base", "base", "--chat", "chat", "--out", "no", "--peft"), "give --rank"),
    ],
)
def test_refusals_are_one_line(lapis: Any, command: tuple[str, ...], words: str) -> None:
    status, out, err = lapis(*command)
    assert status == 1 and out == "" and words in err and len(err.strip().splitlines()) == 1, err
    assert not Path("no").exists()


def test_a_delta_in_the_place_of_a_model_is_refused(lapis: Any) -> None:
    assert lapis("delta", "extract", "--base", "base", "--chat", "chat", "--out", "d", "--no-smoke")[0] == 0
    for command in (("diff", "base", "d"), ("generate", "d", "hello")):
        status, _, err = lapis(*command)
        assert status == 1 and "lapis delta apply d --onto MODEL" in err, err


def test_an_adapter_on_a_given_base_runs(lapis: Any) -> None:
    extract = ("delta", "extract", "--base", "base", "--chat", "chat", "--out", "r", "--rank", "2", "--peft")
    assert lapis(*extract)[0] == 0
    Path("text.txt").write_text("the cat sat on the mat\n" * 4)
    for model in ("r", "base+r"):
        for command in (("eval", model, "--text", "text.txt"), ("generate", model, "the", "--max-tokens", "2")):
            status, _, err = lapis(*command)
            assert status == 0, err
