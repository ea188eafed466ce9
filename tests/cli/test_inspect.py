"""`lapis inspect`: the keys that other programs rely on, what people read, and what bad input gets."""

import json
from pathlib import Path

import pytest
import torch

from lapis.cli.inspect import inspect
from lapis.errors import CheckpointError, ConfigError, OutputError
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer

TINY = ModelConfig(dim=16, layers=3, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=32, tied=True)


def test_json_has_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    inspect("gpt2", context=512, json=True)
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and result["family"] == "gpt2"
    assert result["parameters"]["total"] == 124_439_808 and result["parameters"]["block"] == 7_087_872
    assert set(result["parameters"]) >= {"total", "embedding", "position", "block", "head"}
    assert result["memory"]["kv_cache_bytes"] == 2 * 12 * 768 * 512 * 2
    assert result["memory"]["weights_bytes"] == 2 * 124_439_808 and result["flops"]["per_token"] > 2e8
    assert len(result["layers"]) == 12


def test_a_folder_is_counted_from_its_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Transformer(TINY)
    save(model, tmp_path / "m", torch.float16)
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    inspect(str(tmp_path / "m"), json=True)
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert result["memory"]["dtype"] == "float16" and result["parameters"]["head"] == 0
    assert result["notes"] == ["ignored pytorch_model.bin: pickles are never read"]
    assert err == "note: ignored pytorch_model.bin: pickles are never read\n"


def test_what_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    inspect("bert-base-uncased")
    out = capsys.readouterr().out
    assert "109,482,240 parameters, 12 layers" in out and "with the masked head: 109,514,298" in out
    assert "What grows with the context" in out


def test_mixers(capsys: pytest.CaptureFixture[str]) -> None:
    inspect(mixers="512x768", json=True)
    rows = json.loads(capsys.readouterr().out)["mixers"]
    assert [row["parameters"] for row in rows] == [154_619_215_872, 590_592, 2_362_368]
    inspect(mixers="512x768")
    assert "154,619,215,872" in capsys.readouterr().out


def test_the_pages_hold_the_numbers(tmp_path: Path) -> None:
    inspect("gpt2", html=tmp_path / "gpt2.html", json=True)
    assert "124,439,808 parameters" in (tmp_path / "gpt2.html").read_text()
    inspect(mixers="512x768", html=tmp_path / "mixers.html", json=True)
    assert "154,619,215,872" in (tmp_path / "mixers.html").read_text()
    with pytest.raises(OutputError, match="exists already"):
        inspect("gpt2", html=tmp_path / "gpt2.html")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "gpt3"}, '"gpt3" is no folder and no published size; did you mean "gpt2"?'),
        ({}, "give a model folder, the name of a published size, or --mixers 512x768"),
        ({"model": "gpt2", "context": 0}, "context is 0"),
        ({"mixers": "512"}, 'is "512"; expected TOKENSxFEATURES'),
        ({"mixers": "0x3"}, "expected TOKENSxFEATURES"),
    ],
)
def test_refusals(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        inspect(*([arguments.pop("model")] if "model" in arguments else []), **arguments)  # type: ignore[arg-type]
    assert says in str(error.value)


def test_fault_35_a_folder_that_lies_is_refused(tmp_path: Path) -> None:
    save(Transformer(TINY), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 1000000000'))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is 31x16 but 31x1000000000"):
        inspect(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "context", "words"),
    [
        ("gpt2", 1025, "1,025 is beyond the 1,024 learned positions of the model, which cannot run it"),
        ("bert-base-uncased", 4000, "4,000 is beyond the 512 learned positions"),
        ("gemma-3-270m", 40_000, "40,000 is beyond the 32,768 positions that the model was trained for"),
    ],
)
def test_a_context_beyond_the_positions_is_named(
    model: str, context: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(model, context=context, json=True)
    out, err = capsys.readouterr()
    (note,) = json.loads(out)["notes"]
    assert words in note and err == f"note: {note}\n"
    inspect(model, context=min(context, 512), json=True)
    assert json.loads(capsys.readouterr().out)["notes"] == []
