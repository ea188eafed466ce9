"""Descent and spectra: against families of models whose tree is known, and against numpy's SVD."""

import numpy as np
import pytest
import torch

from lapis.errors import CheckpointError
from lapis.weights.diff import measures
from lapis.weights.diff.diff import diff
from lapis.weights.diff.lineage import lineage
from lapis.weights.engine.fp8 import FP8


@pytest.fixture
def tree(folders, tmp_path):
    """base -> chat, base -> code, chat -> more"""
    base = folders.weights(1, vocab=400)
    made = {"base": base, "chat": folders.near(base, 2), "code": folders.near(base, 3)}
    made["more"] = folders.near(made["chat"], 4)
    return {name: folders.write(tmp_path / name, tensors) for name, tensors in made.items()}


def test_cosines_equal_float64_and_tell_who_descends_from_whom(tree, folders):
    result = lineage(tree["base"], [tree["chat"], tree["code"], tree["more"]])
    vectors = {k: torch.cat([t.double().ravel() for _, t in sorted(folders.read(p).items())]) for k, p in tree.items()}
    deltas = torch.stack([vectors[name] - vectors["base"] for name in ("chat", "code", "more")])
    expected = (
        np.corrcoef(deltas.numpy()) * 0 + (deltas @ deltas.T / deltas.norm(dim=1)[:, None] / deltas.norm(dim=1)).numpy()
    )
    assert np.array(result.cosines) == pytest.approx(expected, abs=1e-7)
    assert result.relative_norms == pytest.approx((deltas.norm(dim=1) / vectors["base"].norm()).tolist(), rel=1e-6)
    assert result.notes == [f"{tree['more']} looks made from {tree['chat']}: it contains its difference"]
    assert len(result.layers) == 3


def test_siblings_and_a_base_that_is_not_the_parent(tree):
    assert "independent" in lineage(tree["base"], [tree["chat"], tree["code"]]).notes[0]
    assert (
        "went the same way" in lineage(tree["code"], [tree["chat"], tree["base"]]).notes[0]
        or "made from" in (lineage(tree["code"], [tree["chat"], tree["base"]]).notes[0])
    )
    assert "are the same" in lineage(tree["base"], [tree["chat"], tree["chat"]]).notes[0]
    assert "equals" in lineage(tree["base"], [tree["base"], tree["chat"]]).notes[0]


def test_no_tensor_in_common(folders, tmp_path):
    one = folders.write(tmp_path / "one", folders.weights(1))
    base = {name: torch.cat([t, t]) for name, t in folders.weights(1).items()}
    two = folders.write(tmp_path / "two", base)
    with pytest.raises(CheckpointError, match="no tensor of the same shape"):
        lineage(one, [two, two])


def test_exact_spectra_equal_numpy(trio, folders):
    models = trio(dtype=torch.float32)
    a, b = folders.read(models["base"]), folders.read(models["chat"])
    for line in diff(models["base"], models["chat"], spectra=True).tensors:
        if line["layer"] is None or len(line["shape"]) != 2:
            assert "stable_rank" not in line
            continue
        x = a[line["name"]].double().numpy()
        s = np.linalg.svd(b[line["name"]].double().numpy() - x, compute_uv=False)
        assert line["singular_values"] == pytest.approx(s.tolist(), rel=1e-4)
        assert line["stable_rank"] == pytest.approx(float((s**2).sum() / s[0] ** 2), rel=1e-4)
        assert line["rank_90"] == int(np.argmax(np.cumsum(s**2) >= 0.9 * (s**2).sum())) + 1
        w = np.linalg.svd(x, compute_uv=False)
        sigma = (np.quantile(w, 0.75) - np.quantile(w, 0.25)) / 1.349
        edge = sigma * (1 + np.sqrt(min(x.shape) / max(x.shape)))
        assert line["weight_snr"] == pytest.approx(w[w > edge].sum() / max(w[w <= edge].sum(), 1e-30) / w[0], rel=1e-3)


def test_a_low_rank_change_is_seen_by_the_randomized_way_too(folders, tmp_path, monkeypatch):
    base = folders.weights(1, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    wide = {name: torch.randn(300, 200) * 0.02, "model.embed_tokens.weight": base["model.embed_tokens.weight"]}
    change = torch.randn(300, 3) @ torch.randn(3, 200) * 0.01
    partial = {"model_type": "partial"}
    one = folders.write(tmp_path / "one", wide, config=partial)
    two = folders.write(tmp_path / "two", {**wide, name: wide[name] + change}, config=partial)
    exact = next(x for x in diff(one, two, spectra=True).tensors if x["name"] == name)
    monkeypatch.setattr(measures, "EXACT", 100)
    monkeypatch.setattr(measures, "DIRECTIONS", 20)
    rough = next(x for x in diff(one, two, spectra=True).tensors if x["name"] == name)
    assert exact["rank_90"] == rough["rank_90"] <= 3
    assert rough["stable_rank"] == pytest.approx(exact["stable_rank"], rel=1e-3)
    assert rough["snr"] is None and exact["snr"] is not None


def test_fp8_differs_from_its_source_by_its_rounding_only(folders, tmp_path):
    base = folders.weights(1)
    stored = {}
    for name, tensor in base.items():
        stored[name] = tensor
        if "_proj" in name:
            scale = tensor.float().abs().max() / 448
            stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale")] = scale.reshape(1)
    table = diff(folders.write(tmp_path / "a", base), folders.write(tmp_path / "b", stored))
    assert "F8_E4M3" in FP8 and all(0.01 < x["relative_norm"] < 0.04 for x in table.tensors if "_proj" in x["name"])
    assert all("scale" in name for name in table.only_in_b)
