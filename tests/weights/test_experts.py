"""Experts in arithmetic on weights: each is a part of its own, so that nothing here knows of them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapis.families.config import Experts, ModelConfig
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.weights.diff.diff import diff
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge

SHAPE = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, vocab=31, context=32, family="mixtral",
                    experts=Experts(3, 2))  # fmt: skip
DOWN = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, and two that differ from it a little, without tokenizers."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    for role in ("base", "chat", "onto"):
        save(model, folder / role)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return {role: folder / role for role in ("base", "chat", "onto")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_graft_scales_experts_by_pattern(models: dict[str, Path], tmp_path: Path) -> None:
    graft(**models, out=tmp_path / "out", scale="mlp.experts=0.5,mlp.experts.2.down=2", same_tokens=True)
    base, chat, onto, out = (tensors(folder) for folder in (*models.values(), tmp_path / "out"))
    for name in out:
        if ".experts." in name:
            scale = 2.0 if name.endswith("experts.2.w2.weight") else 0.5
            exact = onto[name].double() + scale * (chat[name].double() - base[name].double())
            torch.testing.assert_close(out[name].double(), exact, rtol=0, atol=1e-7)


def test_layers_are_stacked_with_their_experts(models: dict[str, Path], tmp_path: Path) -> None:
    merge({
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(models[role]), "layer_range": [0, 2]}]} for role in ("base", "chat")],
    }, tmp_path / "out", same_tokens=True)  # fmt: skip
    out, chat = tensors(tmp_path / "out"), tensors(models["chat"])
    assert torch.equal(out[DOWN.replace("layers.1", "layers.3")], chat[DOWN])
    assert load(tmp_path / "out").config == dataclasses.replace(SHAPE, layers=4, extra={})


def test_diff_has_a_line_for_each_and_a_row_for_all(models: dict[str, Path]) -> None:
    table = diff(models["base"], models["chat"])
    assert [line.part.component for line in table.lines if line.name == DOWN] == ["mlp.experts.2.down"]
    rows = {row["component"]: row["tensors"] for row in table.by("component")}
    assert rows["mlp.experts.down"] == 6 and rows["mlp.router"] == 2
