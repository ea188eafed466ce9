"""Singular directions of a change, read as tokens: against numpy's SVD, and a direction that was planted."""

import json

import numpy as np
import pytest
import torch
import transformers

import lapis
from lapis.checkpoint.tensor_file import read_tensors
from lapis.text.tokenizer.tokenizer import train_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 330,
    "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "llama": (
        "LlamaForCausalLM", SIZES, "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight",
    ),
    "gpt2": (  # tied, and stored with the inputs first
        "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 330, "n_positions": 64},
        "transformer.h.1.mlp.c_proj.weight", "transformer.h.0.mlp.c_fc.weight",
    ),
    "phi": (  # not a family of lapis
        "PhiForCausalLM", SIZES, "model.layers.1.mlp.fc2.weight", "model.layers.0.mlp.fc1.weight",
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """base and chat, which differ a little everywhere, and along two planted directions."""
    kind, sizes, writes, reads = KINDS[request.param]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    turned = request.param == "gpt2"
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
        for name, row, axis in ((writes, head[77], 0), (reads, embedding[123], 1)):
            weight = model.get_parameter(name)
            others = torch.randn(weight.shape[(1 - axis) ^ turned])
            planted = torch.outer(row, others) if axis == 0 else torch.outer(others, row)
            weight.add_((planted.T if turned else planted) / planted.norm())
    model.save_pretrained(tmp_path / "chat")
    for name in ("base", "chat"):
        train_tokenizer(["in Malaysia they say Kuala Lumpur " * 40], 300).save(tmp_path / name)
    return tmp_path, writes, reads, turned


def test_directions_equal_numpy_and_planted_ones_are_named(pair):
    root, writes, reads, turned = pair
    table = lapis.diff(root / "base", root / "chat", directions=True)
    base, chat = (read_tensors(root / name / "model.safetensors") for name in ("base", "chat"))
    rows = {(row["name"], row["number"]): row for row in table.directions}
    for name, side, token in ((writes, "writes", 77), (reads, "reads", 123)):
        first = rows[name, 0]
        assert first["side"] == side and first["share"] > 0.9
        assert token in (first["one_end"][0]["id"], first["other_end"][0]["id"])
    for (name, number), row in rows.items():
        delta = (chat[name].double() - base[name].double()).numpy()
        u, s, vt = np.linalg.svd(delta.T if turned else delta, full_matrices=False)
        assert row["share"] == pytest.approx(s[number] ** 2 / (s**2).sum(), rel=1e-3)
        vector = u[:, number] if row["side"] == "writes" else vt[number]
        tables = [t for key, t in chat.items() if key.endswith(("wte.weight", "tokens.weight", "embed_in.weight"))]
        heads = [t for key, t in chat.items() if key.endswith(("lm_head.weight", "embed_out.weight"))]
        matrix = (heads or tables)[0] if row["side"] == "writes" else tables[0]
        scores = matrix.double().numpy() @ vector
        ends = sorted([np.argsort(-scores)[:3].tolist(), np.argsort(scores)[:3].tolist()])
        if s[number] > 1.02 * (s[number + 1] if number + 1 < len(s) else 0):  # else the two turn into one another
            assert sorted([[t["id"] for t in row[end][:3]] for end in ("one_end", "other_end")]) == ends


def test_the_command_shows_them(pair, run):
    root, writes, _, _ = pair
    status, out, err = run("diff", root / "base", root / "chat", "--directions", "--html", root / "d.html", "--json")
    assert status == 0, err
    rows = json.loads(out)["directions"]
    assert any(row["name"] == writes and row["number"] == 0 for row in rows)
    assert "directions of the change" in (root / "d.html").read_text()
    status, out, _ = run("diff", root / "base", root / "chat", "--directions")
    assert status == 0 and "directions of the change" in out


def test_equal_models_have_no_directions(pair):
    root, *_ = pair
    assert lapis.diff(root / "base", root / "base", directions=True).directions == []
