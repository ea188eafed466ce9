"""The figures of a difference equal a float64 recomputation; rows are matched by token; strangers are told."""

import re

import numpy as np
import pytest
import torch

from lapis.errors import CheckpointError
from lapis.weights.diff.diff import diff


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_figures_equal_float64(trio, folders, dtype):
    models = trio(dtype=dtype)
    a, b = folders.read(models["base"]), folders.read(models["chat"])
    table = diff(models["base"], models["chat"])
    assert {line["name"] for line in table.tensors} == set(a)
    for line in table.tensors:
        x, y = (t[line["name"]].double().numpy().ravel() for t in (a, b))
        d = y - x
        expected = {
            "cosine": x @ y / np.linalg.norm(x) / np.linalg.norm(y),
            "angle": np.degrees(np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))),
            "relative_norm": np.linalg.norm(d) / np.linalg.norm(x),
            "mean_abs": np.abs(d).mean(),
            "max_abs": np.abs(d).max(),
            "identical": (d == 0).mean(),
        }
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_groups_add_sums(trio, folders):
    models = trio()
    a, b = folders.read(models["base"]), folders.read(models["chat"])
    x, y = (torch.cat([t[n].double().ravel() for n in sorted(t) if ".layers.1." in n]) for t in (a, b))
    [group] = [g for g in diff(models["base"], models["chat"]).by("layer") if g["layer"] == 1]
    assert group["relative_norm"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
    assert group["tensors"] == 9


def test_what_was_all_zeros_changed_by_no_share(folders, tmp_path):
    chat = folders.weights(1)
    name = "model.layers.1.self_attn.q_proj.weight"
    base = {**chat, name: torch.zeros_like(chat[name])}
    table = diff(folders.write(tmp_path / "a", base), folders.write(tmp_path / "b", chat))
    assert table.finding() == "attn.q of layer 1 is all zeros in the first model and not in the second"


def test_rounding_floor_is_what_rounding_gives(folders, tmp_path):
    fine = folders.weights(1, vocab=4000, dtype=torch.float32)
    exact = {name: tensor.double() * (1 + 1e-9) for name, tensor in fine.items()}
    coarse = {name: tensor.to(torch.bfloat16) for name, tensor in fine.items()}
    rounded, whole = folders.write(tmp_path / "a", coarse), folders.write(tmp_path / "b", exact)
    table = diff(whole, rounded)
    assert table.total["relative_norm"] == pytest.approx(table.total["rounding_floor"], rel=0.02)
    assert not any("coarsely" in note for note in table.notes)
    table = diff(rounded, whole)  # nothing was rounded to b's dtype, and what a may have lost is said
    assert table.total["rounding_floor"] < 1e-7
    [note] = [note for note in table.notes if "coarsely" in note]
    [about] = re.findall(r"about (\S+) of the length", note)
    assert table.total["relative_norm"] == pytest.approx(float(about), rel=0.1)


def test_a_small_change_that_is_stored_exactly_counts(folders, tmp_path):
    """A change of a thousandth, in float32 beside a parent in bfloat16, is no rounding, and a row that has it moved."""
    base = folders.weights(1)
    chat = {name: tensor.float() for name, tensor in base.items()}
    chat["model.layers.0.mlp.up_proj.weight"] *= 1.001
    chat["model.embed_tokens.weight"][5] *= 1.001
    one = folders.write(tmp_path / "a", base, vocab=folders.words())
    table = diff(one, folders.write(tmp_path / "b", chat, vocab=folders.words()), rows=True)
    assert table.floor_finding() == ""
    assert [row["id"] for row in table.moved(3)] == [5]


def test_rows_show_the_template(trio, folders, tmp_path):
    base = folders.weights(1)
    chat = folders.near(base, 2, size=1e-3)
    chat["model.embed_tokens.weight"][[33, 34]] += 1
    one = folders.write(tmp_path / "a", base, vocab=folders.words())
    two = folders.write(tmp_path / "b", chat, vocab=folders.words(), template=folders.template)
    table = diff(one, two, rows=True)
    assert [row["token"] for row in table.moved(2)] == ["<|im_end|>", "<|im_start|>"] or [
        row["token"] for row in table.moved(2)
    ] == ["<|im_start|>", "<|im_end|>"]
    assert all(row["special"] for row in table.moved(2))
    [outliers] = table.outliers()
    assert outliers["outliers"] == 2 and outliers["special"] == 2
    assert outliers["without"]["relative_norm"] < 0.05 < outliers["with"]["relative_norm"]
    x, y = base["model.embed_tokens.weight"].double(), chat["model.embed_tokens.weight"].double()
    for row in table.rows:
        i = row["id"]
        assert row["relative_norm"] == pytest.approx(float((y[i] - x[i]).norm() / x[i].norm()), rel=1e-6)
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(x[i], y[i], 0)), rel=1e-6)
    assert table.rows[36]["kind"] == "padding"


def test_vocabularies_that_differ_are_matched_by_string(folders, tmp_path):
    base, names = folders.weights(1), folders.words()
    moved = dict(zip(names, reversed(names.values()), strict=True))
    chat = {name: tensor.clone() for name, tensor in base.items()}
    for token, row in moved.items():
        chat["model.embed_tokens.weight"][row] = base["model.embed_tokens.weight"][names[token]]
    one = folders.write(tmp_path / "a", base, vocab=names)
    two = folders.write(tmp_path / "b", chat, vocab=moved)
    table = diff(one, two, rows=True)
    assert table.total["identical"] == 1.0
    assert len(table.rows) == len(names)


def test_other_shapes_are_all_listed(folders, tmp_path):
    base = folders.weights(1)
    wide = {name: torch.cat([t, t], 0) if "mlp.up" in name else t for name, t in base.items()}
    with pytest.raises(CheckpointError, match=r"2 problems.*layers\.0\.mlp\.up_proj.*layers\.1\.mlp\.up_proj"):
        diff(folders.write(tmp_path / "a", base), folders.write(tmp_path / "b", wide))


def test_unrelated_models_are_told(folders, tmp_path):
    base = folders.weights(1)
    turned = {n: torch.stack([-t.view(-1, 2)[:, 1], t.view(-1, 2)[:, 0]], 1).view(t.shape) for n, t in base.items()}
    table = diff(folders.write(tmp_path / "a", base), folders.write(tmp_path / "b", turned))
    assert table.unrelated() and "not parent and child" in str(table)
    assert not diff(tmp_path / "a", folders.write(tmp_path / "c", folders.near(base, 2))).unrelated()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fault_19_nonfinite_is_refused(folders, tmp_path, bad):
    base = folders.weights(1)
    chat = folders.near(base, 2)
    chat["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    with pytest.raises(CheckpointError, match=r"b: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        diff(folders.write(tmp_path / "a", base), folders.write(tmp_path / "b", chat))
