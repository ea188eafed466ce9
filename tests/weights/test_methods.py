"""Merge methods against the same formulas computed in float64 on whole tensors, and what must not change the result."""

from math import acos, sin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import ConfigError
from lapis.weights.merge.methods import METHODS, Block

from .whole_tensors import merge_tensors

SHAPE = (48, 64)


def tensors(count, shape=SHAPE, size=3e-3, seed=0):
    """A base and `count` fine-tunes as bf16 checkpoints hold them, so that equal magnitudes are common."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    models = [(base.float() + torch.randn(shape, generator=generator) * size).bfloat16() for _ in range(count)]
    return base, models


def deltas_of(base, models):
    return [model.double() - base.double() for model in models]


def top_mask(delta, low, high):
    """True for the ascending ranks [low, high) of abs(delta); of equals the earlier ranks higher."""
    flat = delta.abs().flatten().numpy()
    order = np.lexsort((-np.arange(flat.size), flat))
    mask = np.zeros(flat.size, bool)
    mask[order[low:high]] = True
    return torch.from_numpy(mask).view(delta.shape)


def random_mask(delta, model, probability, name="w", seed=7):
    drawn = Block([delta.float()] * (model + 1), name=name, seed=seed).random(model)
    return torch.from_numpy(drawn.astype(np.float64)) < probability * 2.0**32


def keep_of(method, delta, i, n):
    """The mask and the keep probability, straight from the definitions."""
    if method == "ties":
        return top_mask(delta, n - max(1, int(0.3 * n)), n), 1.0
    if method.startswith("breadcrumbs"):
        staying = int(0.3 * n)
        low = n - staying - int(0.05 * n)
        return top_mask(delta, low, low + staying), 1.0
    if method.startswith("dare"):
        return random_mask(delta, i, 0.3), 0.3
    rows = delta.abs()
    rank = (rows.unsqueeze(2) > rows.unsqueeze(1)).sum(2).double()
    earlier = torch.ones(rows.shape[1], rows.shape[1]).tril(-1).bool()
    rank += ((rows.unsqueeze(2) == rows.unsqueeze(1)) & earlier).sum(2)
    probability = 0.3 - 0.1 + 0.2 * rank / (rows.shape[1] - 1)
    return random_mask(delta, i, probability), probability


def thinned(method, base, models, weight, rescale, normalize, elect, numerics, lambda_):
    staying = []
    for i, delta in enumerate(deltas_of(base, models)):
        mask, probability = keep_of(method, delta, i, delta.numel())
        masked = delta * mask
        if rescale and numerics == "paper":
            masked = masked / probability
        elif rescale:
            masked = masked * (delta.abs().sum() / masked.abs().sum())
        staying.append(masked)
    d = torch.stack(staying)
    w = torch.tensor(weight, dtype=torch.float64).view(-1, 1, 1)
    if not elect:
        return base.double() + lambda_ * (w * d).sum(0) / (w.sum() if normalize else 1.0)
    if numerics == "paper":
        sign = d.sum(0).sign()
    else:
        sign = torch.where((w * d).sum(0) >= 0, 1.0, -1.0)
    agrees = ((w * d).sign() == sign) & (sign != 0)
    divisor = (w * agrees).sum(0) if normalize else torch.ones(SHAPE)
    return base.double() + lambda_ * (w * d * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)


THINNED = {  # method -> (rescale, normalize, elect), the defaults
    "ties": (False, True, True),
    "dare_linear": (True, False, False),
    "dare_ties": (True, False, True),
    "della": (True, True, True),
    "della_linear": (True, False, False),
    "breadcrumbs": (False, False, False),
    "breadcrumbs_ties": (False, False, True),
}


def close(merged, expected, size=1e-6):
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), expected.double(), rtol=1e-6, atol=size * 0.02)


@pytest.mark.parametrize("numerics", ["mergekit", "paper"])
@pytest.mark.parametrize("method", THINNED)
def test_thinned_differences_equal_their_definition(method, numerics):
    base, models = tensors(3)
    rescale, normalize, elect = THINNED[method]
    parameters = {"weight": [0.5, 0.9, 0.4], "density": 0.3, "numerics": numerics, "lambda": 0.7}
    if method.startswith("breadcrumbs"):
        parameters["gamma"] = 0.05
    if method.startswith("della"):
        parameters["epsilon"] = 0.1
    merged = merge_tensors(method, models, base, parameters=parameters, name="w", seed=7)
    expected = thinned(method, base, models, (0.5, 0.9, 0.4), rescale, normalize, elect, numerics, 0.7)
    if (elect, rescale, numerics) == (True, True, "paper"):  # a sum of 0 has a sign after a division, by rounding alone
        apart = (merged - expected).abs() > 1e-6
        assert int(apart.sum()) <= 2
        expected = torch.where(apart, merged.double(), expected)
    close(merged, expected)


def test_linear_task_arithmetic_and_passthrough():
    base, (a, b) = tensors(2)
    x, y, z = a.double(), b.double(), base.double()
    close(merge_tensors("linear", [a, b], parameters={"weight": [1, 3]}), (x + 3 * y) / 4)
    close(merge_tensors("linear", [a, b], parameters={"weight": [1, 3], "normalize": False}), x + 3 * y)
    close(
        merge_tensors("task_arithmetic", [a, b], base, parameters={"weight": [0.5, 2]}), z + 0.5 * (x - z) + 2 * (y - z)
    )
    half = {"weight": [0.5, 2], "normalize": True, "lambda": 0.5}
    close(merge_tensors("task_arithmetic", [a, b], base, parameters=half), z + 0.5 * (0.2 * (x - z) + 0.8 * (y - z)))
    close(merge_tensors("passthrough", [a], parameters={"scale": 0.5}), x / 2)
    assert torch.equal(merge_tensors("passthrough", [a]), a.float())


def test_nearswap_ram_and_ramplus():
    base, (a, b) = tensors(2)
    z, (d, e) = base.double(), deltas_of(base, [a, b])
    w = (1e-3 / d.abs().clamp(min=1e-6)).clamp(0, 1)
    close(merge_tensors("nearswap", [a], base, parameters={"t": 1e-3}), w * a.double() + (1 - w) * z)
    p, q = d.abs() > 2e-3, e.abs() > 2e-3
    both, alone = p & q, p ^ q
    mean = torch.where(both, (d + e) / 2, 0.0)
    close(merge_tensors("ram", [a, b], base, parameters={"epsilon": 2e-3}), z + mean + alone * (d * p + e * q))
    scale = [1 + 0.3 * min(max(int(both.sum()) / int((m & alone).sum()), 0), 0.5) for m in (p, q)]
    plus = merge_tensors("ramplus_tl", [a, b], base, parameters={"epsilon": 2e-3, "r": 0.3, "alpha": 0.5})
    close(plus, z + mean + alone * (d * p * scale[0] + e * q * scale[1]))


def spherical(x, y, t):
    angle = acos(float(x.flatten() @ y.flatten() / x.norm() / y.norm()))
    return (sin((1 - t) * angle) * x + sin(t * angle) * y) / sin(angle)


def test_slerp_far_apart_and_near():
    base, (far,) = tensors(1, size=0.02)
    close(merge_tensors("slerp", [far], base, parameters={"t": 0.3}), spherical(base.double(), far.double(), 0.3))
    base, (near,) = tensors(1, size=1e-4)
    close(merge_tensors("slerp", [near], base, parameters={"t": 0.3}), 0.7 * base.double() + 0.3 * near.double())


@pytest.mark.parametrize("with_base", [True, False])
def test_nuslerp_flat_by_rows_and_by_columns(with_base):
    base, (a, b) = tensors(2)
    z = base.double() if with_base else torch.zeros(SHAPE, dtype=torch.float64)
    x, y = a.double() - z, b.double() - z
    flat = spherical(x, y, 0.75)
    rows = torch.stack([spherical(i, j, 0.75) for i, j in zip(x, y, strict=True)])
    columns = torch.stack([spherical(i, j, 0.75) for i, j in zip(x.T, y.T, strict=True)]).T
    for options, expected in (
        ({}, flat),
        ({"nuslerp_flatten": False}, rows),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, columns),
    ):
        parameters = {"weight": [1, 3], **options}
        close(merge_tensors("nuslerp", [a, b], base if with_base else None, parameters=parameters), z + expected, 1e-5)


def test_multislerp_and_karcher_on_vectors():
    base, models = tensors(3, size=0.02)
    z, d = base.double(), deltas_of(base, models)
    w = torch.tensor([1, 2, 3], dtype=torch.float64) / 6
    units = [x / x.norm() for x in d]
    mean = sum(wi * u for wi, u in zip(w, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(wi * (u - (u * mean).sum() * mean) for wi, u in zip(w, units, strict=True))
    size = tangent.norm() + 1e-8
    point = mean * torch.cos(size) + tangent * torch.sin(size) / size
    expected = z + point * sum(wi * x.norm() for wi, x in zip(w, d, strict=True))
    close(merge_tensors("multislerp", models, base, parameters={"weight": [1, 2, 3]}), expected, 1e-5)

    x = [model.double() for model in models]
    units = [v / v.norm() for v in x]
    mean = sum(units) / 3
    mean = mean / mean.norm()
    for _ in range(10):
        angles = [torch.acos((mean * u).sum()) for u in units]
        step = sum(a / torch.sin(a) * (u - (mean * u).sum() * mean) / 3 for a, u in zip(angles, units, strict=True))
        if step.norm() < 1e-5:
            break
        mean = torch.cos(step.norm()) * mean + torch.sin(step.norm()) * step / step.norm()
        mean = mean / mean.norm()
    close(merge_tensors("karcher", models), mean * sum(v.norm() for v in x) / 3, 1e-5)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(filter_wise):
    base, models = tensors(3)
    shared = torch.randn(SHAPE, dtype=torch.float64) * 3e-3
    models = [(model.double() + shared).bfloat16() for model in models]
    z, d = base.double(), deltas_of(base, models)
    rows = d if filter_wise else [x.view(1, -1) for x in d]
    cosine = sum(torch.cosine_similarity(rows[i], rows[j], dim=1) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    t = (3 * cosine / (1 + 2 * cosine)).unsqueeze(1)
    merged = merge_tensors("model_stock", models, base, parameters={"filter_wise": filter_wise})
    close(merged, t * sum(m.double() for m in models) / 3 + (1 - t) * z)


@pytest.mark.parametrize("numerics", ["mergekit", "paper"])
@pytest.mark.parametrize("select", [1.0, 0.25])
def test_sce(select, numerics):
    base, models = tensors(3, size=3e-4)
    z, d = base.double(), torch.stack(deltas_of(base, models))
    variance = torch.stack([x.float() for x in d]).var(0, correction=0)
    count = int(torch.count_nonzero(variance) * select)
    d = d * (top_mask(variance.double(), variance.numel() - count, variance.numel()) if select < 1 else 1.0)
    w = d.square().mean((1, 2))
    w = torch.full_like(w, 1 / 3) if float(w.sum()) < 1e-6 and numerics == "mergekit" else w / w.sum()
    sign = torch.where(d.sum(0) >= 0, 1.0, -1.0) if numerics == "mergekit" else d.sum(0).sign()
    share = (d.sign() == sign) * w.view(3, 1, 1)
    merged = merge_tensors("sce", models, base, parameters={"select_topk": select, "numerics": numerics})
    close(merged, z + (d * share).sum(0) / share.sum(0).clamp(min=1e-6))


def test_arcee_fusion():
    base, (a,) = tensors(1)
    z, x = base.double(), a.double()
    p, q = x.softmax(-1) + 1e-8, z.softmax(-1) + 1e-8
    score = (x - z).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = score.flatten().sort().values
    first, median, third = (ordered[int(share * (ordered.numel() - 1))] for share in (0.25, 0.5, 0.75))
    expected = torch.where(score >= median + 1.5 * (third - first), x, z)
    merged = merge_tensors("arcee_fusion", [a], base)
    near = (score / (median + 1.5 * (third - first)) - 1).abs() < 1e-5
    torch.testing.assert_close(merged.double()[~near], expected[~near], rtol=1e-6, atol=1e-8)


SETTINGS = {
    "ties": {"weight": [1, 0.5], "density": 0.4},
    "dare_ties": {"weight": [1, 0.5], "density": 0.4},
    "dare_linear": {"weight": [1, 0.5], "density": 0.4, "numerics": "paper"},
    "della": {"weight": [1, 0.5], "density": 0.4},
    "breadcrumbs": {"weight": [1, 0.5], "density": 0.4, "gamma": 0.02},
    "nuslerp": {"weight": [1, 0.5]},
    "multislerp": {"weight": [1, 0.5]},
    "model_stock": {},
    "sce": {"select_topk": 0.3},
    "ramplus_tl": {"epsilon": 1e-3},
}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(SETTINGS)), st.integers(1, 40), st.integers(1, 33), st.integers(1, 400))
def test_the_size_of_blocks_changes_nothing(method, rows, columns, elements):
    base, models = tensors(2, (rows, columns))
    whole = merge_tensors(method, models, base, parameters=SETTINGS[method], name="w", seed=3)
    pieces = merge_tensors(method, models, base, parameters=SETTINGS[method], name="w", seed=3, elements=elements)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-9)


def test_masks_follow_seed_name_and_model_and_nothing_else():
    whole = Block([torch.zeros(9, 7)], name="w", seed=1).random(0).reshape(-1)
    for first in (0, 1, 5, 8, 13):
        part = Block([torch.zeros(1, 20)], name="w", seed=1, first=first).random(0).reshape(-1)
        assert np.array_equal(part, whole[first : first + 20])
    assert whole[:3].tolist() == [2669345215, 3969822161, 2583054307]  # a merge made today is a merge made in a year
    for other in (Block([torch.zeros(9, 7)], name="w", seed=2), Block([torch.zeros(9, 7)], name="v", seed=1)):
        assert not np.array_equal(other.random(0).reshape(-1), whole)
    assert not np.array_equal(Block([torch.zeros(9, 7)] * 2, name="w", seed=1).random(1).reshape(-1), whole)


@pytest.mark.parametrize("shape", [(), (5,), (1, 1), (3, 4, 5), (0, 4)])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_every_shape(method, shape):
    base, models = tensors(max(METHODS[method].least, min(2, METHODS[method].most or 2)), shape)
    given_values = {"weight": 0.5, "density": 0.5, "t": 0.5}
    parameters = {key: value for key, value in given_values.items() if key in METHODS[method].parameters}
    merged = merge_tensors(method, models, base if METHODS[method].base != "ignored" else None, parameters=parameters)
    assert merged.shape == shape and bool(torch.isfinite(merged).all())


def test_nothing_to_add_leaves_the_base():
    base, models = tensors(2)
    for method in sorted(METHODS):
        if METHODS[method].base == "required":
            same = [base] * (METHODS[method].least if METHODS[method].most is None else METHODS[method].most)
            parameters = {k: 0.5 for k in ("weight", "density", "t") if k in METHODS[method].parameters}
            merged = merge_tensors(method, same, base, parameters=parameters)
            torch.testing.assert_close(merged, base.float(), rtol=1e-6, atol=0)
    for method in THINNED:
        merged = merge_tensors(method, models, base, parameters={"weight": 1, "density": 0})
        assert torch.equal(merged, base.float())


def test_parameters_that_cannot_be_are_refused():
    base, models = tensors(2)
    with pytest.raises(ConfigError, match="weights sum to 0"):
        merge_tensors("linear", models, parameters={"weight": [1, -1]})
    with pytest.raises(ConfigError, match=r"density 0\.9 with epsilon 0.15"):
        merge_tensors("della", models, base, parameters={"weight": 1, "density": 0.9})


def test_every_method_says_what_it_does():
    for method in METHODS.values():
        assert "\n" not in method.help.split("\n\n")[0] or len(method.help) > 40
        assert all(parameter.help for parameter in method.parameters.values())
