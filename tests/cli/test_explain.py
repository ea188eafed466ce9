"""`lapis explain` as it is typed: the page, the JSON, and what bad input gets."""

import json

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

TEXT = "in Malaysia they say Kuala Lumpur is the capital of Malaysia, and Jakarta of Indonesia. "
PROMPT = "the capital of Malaysia is"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two models of one shape with one tokenizer."""
    root = tmp_path_factory.mktemp("explain")
    tokenizer = train_tokenizer([TEXT * 40], 320)
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(
            dim=32, heads=4, kv_heads=2, ffn_dim=48, vocab=tokenizer.vocab_size, context=40, layers=3
        ))  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        save(model, root / name)
        tokenizer.save(root / name)
    return [str(root / name) for name in ("one", "other")]


def test_a_page_and_one_json_object(folders, tmp_path, run):
    page = tmp_path / "explain.html"
    status, out, err = run(
        "explain", folders[0], PROMPT, "--against", folders[1], "--track", "Kuala", "--html", page, "--json"
    )
    result = json.loads(out)
    assert status == 0 and f"page: {page}" in err and page.stat().st_size < 1_000_000
    assert [token["text"] for token in result["tokens"]][-2:] == [" Malaysia", " is"]
    assert result["build"]["kv_heads"] == 2 and result["against"]["name"] == folders[1]
    assert result["grid"]["ranks"]["Kuala"][0][0] >= 1
    assert "default-src 'none'" in page.read_text(encoding="utf-8")
    assert "exists already" in run("explain", folders[0], PROMPT, "--html", page)[2]


def test_people_see_the_finding_and_how_to_get_the_page(folders, run):
    status, out, _ = run("explain", folders[0], PROMPT, "--places", "2")
    assert status == 0 and "is said next" in out and "--html FILE" in out
    assert "what is shown are the last 2 of them" in out


def test_bad_input_is_one_line(folders, run):
    for arguments, expected in (
        ([PROMPT * 9], "the context of"), ([""], "empty"), ([PROMPT, "--places", "0"], "expected 1 to 96"),
    ):  # fmt: skip
        status, out, err = run("explain", folders[0], *arguments)
        assert status == 1 and out == "" and expected in err and len(err.splitlines()) == 1, err


def test_other_pages_name_the_command(folders, tmp_path, run):
    for command in (["lens", folders[0], PROMPT], ["inspect", folders[0]]):
        page = tmp_path / f"{command[0]}.html"
        assert run(*command, "--html", page)[0] == 0
        assert "lapis explain" in page.read_text(encoding="utf-8")


def test_a_family_that_lapis_does_not_run_is_explained_too(tmp_path, run):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer([TEXT * 40], 320)
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=tokenizer.vocab_size, max_position_embeddings=64,
    )  # fmt: skip
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    tokenizer.save(tmp_path / "phi")
    status, out, err = run("explain", tmp_path / "phi", PROMPT, "--html", tmp_path / "phi.html", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["build"]["family"] == "phi" and result["attention"]["weights"]["shape"][:2] == [2, 4]
    assert result["stream"]["taken"] is not None and len(result["attention"]["heads"]) > 0
