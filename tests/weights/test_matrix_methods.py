"""Methods that take matrices apart, or weigh with what was gathered, against their papers' formulas in float64."""

import numpy as np
import pytest
import torch

from lapis.errors import ConfigError
from lapis.weights.merge.methods import METHODS

from .test_methods import close, deltas_of, tensors
from .whole_tensors import merge_tensors

SHAPES = [(12, 20), (20, 12), (16, 16), (3, 8, 6)]


def by_matrix(function, deltas):
    """function over each matrix of a stack, in numpy."""
    arrays = [delta.numpy() for delta in deltas]
    if arrays[0].ndim == 2:
        return torch.from_numpy(function(arrays))
    return torch.from_numpy(np.stack([function([a[i] for a in arrays]) for i in range(len(arrays[0]))]))


def polar(matrix):
    """(M M^T)^-1/2 M through eigenvectors: the orthogonal factor, without a singular value decomposition."""
    small = matrix.T @ matrix
    values, vectors = np.linalg.eigh(small)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


def task_singular_vectors(deltas):
    """Algorithm 1 of arXiv 2412.00081, with block-diagonal S and whitening by eigenvectors."""
    count = max(1, min(deltas[0].shape) // len(deltas))
    lefts, rights, values = [], [], []
    for delta in deltas:
        scores, right = np.linalg.eigh(delta.T @ delta)
        order = np.argsort(-scores)[:count]
        sizes = np.sqrt(scores[order])
        lefts.append(delta @ right[:, order] / sizes)
        rights.append(right[:, order])
        values.append(sizes)
    return polar(np.concatenate(lefts, 1)) @ np.diag(np.concatenate(values)) @ polar(np.concatenate(rights, 1)).T


def isotropic(deltas):
    """Equations 5 and 6 of arXiv 2502.04959: the mean singular value times the orthogonal factor of the sum."""
    total = sum(deltas)
    wide = total.shape[0] < total.shape[1]
    mean = np.sqrt(np.clip(np.linalg.eigvalsh(total @ total.T if wide else total.T @ total), 0, None)).mean()
    return mean * (polar(total.T).T if wide else polar(total))


def wudi_by_autograd(deltas, steps, rate=1e-5):
    """The loss of arXiv 2503.08099 as it is written there, differentiated by torch and stepped by torch's Adam."""
    d = [torch.from_numpy(delta) for delta in deltas]
    merged = sum(d).clone().requires_grad_()
    adam = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        sum(((merged - each) @ each.T).square().sum() / each.square().sum() for each in d).backward()
        adam.step()
    return merged.detach().numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "oracle"), [
    ("tsv_m", task_singular_vectors), ("iso_c", isotropic), ("wudi", lambda d: wudi_by_autograd(d, 300)),
])  # fmt: skip
def test_matrices_equal_the_papers_formulas(method, oracle, shape):
    base, models = tensors(3, shape)
    merged = merge_tensors(method, models, base, parameters={"weight": [1, 0.5, 0.8], "lambda": 0.7})
    weighted = [w * d for w, d in zip((1, 0.5, 0.8), deltas_of(base, models), strict=True)]
    close(merged, base.double() + 0.7 * by_matrix(oracle, weighted))


def test_wudi_has_left_the_sum_and_nears_its_minimum():
    base, models = tensors(2)
    deltas = deltas_of(base, models)

    def loss(merged):
        return sum(float(((merged - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)

    results = {
        steps: merge_tensors("wudi", models, base, parameters={"steps": steps}).double() - base.double()
        for steps in (1, 300, 3000, 0)
    }
    losses = {steps: loss(result) for steps, result in results.items()}
    assert loss(sum(deltas)) > losses[1] > losses[300] > losses[3000] > losses[0] * 0.999


def test_the_exact_minimum_of_wudi_has_no_gradient():
    base, models = tensors(2, (10, 40))  # wider than what the differences span: the minimum is not unique
    merged = merge_tensors("wudi", models, base, parameters={"steps": 0}).double() - base.double()
    deltas = deltas_of(base, models)
    gradient = sum((merged - d) @ d.T @ d / d.square().sum() for d in deltas)
    assert float(gradient.norm()) < 1e-4 * float(sum(deltas).norm()) ** 2
    outside = torch.linalg.svd(torch.cat(deltas), full_matrices=True)[2][20:]
    torch.testing.assert_close(merged @ outside.T, sum(deltas) @ outside.T, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "wudi"])
@pytest.mark.parametrize(("shape", "layer"), [((40,), True), ((12, 20), False)])
def test_what_is_no_matrix_of_a_layer_is_averaged(method, shape, layer):
    base, models = tensors(2, shape)
    merged = merge_tensors(method, models, base, parameters={"weight": [1, 0.5]}, layer=layer)
    one, two = deltas_of(base, models)
    close(merged, base.double() + (one + 0.5 * two) / 2)


def grams_of(count, inputs, rows=200):
    vectors = [torch.randn(rows, inputs, generator=torch.Generator().manual_seed(i)).double() for i in range(count)]
    for i, each in enumerate(vectors):
        each[:, i] *= 5
    return [each.T @ each / rows for each in vectors]


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_equals_least_squares(off_diagonal):
    """Equation 2 of arXiv 2212.09849, solved as the least squares that it answers, over all models' vectors at once."""
    _, models = tensors(3, (10, 14))
    grams = grams_of(3, 14)
    weights = (1, 2, 0.5)
    merged = merge_tensors("regmean", models, parameters={"weight": weights, "off_diagonal": off_diagonal},
                           statistics=[gram.float() for gram in grams])  # fmt: skip
    rows, aims = [], []
    for w, gram, model in zip(weights, grams, models, strict=True):
        reduced = off_diagonal * gram + (1 - off_diagonal) * torch.diag(torch.diag(gram))
        root = np.linalg.cholesky(w * reduced.float().double().numpy())  # root root^T is the Gram matrix
        rows.append(root.T)
        aims.append(root.T @ model.double().numpy().T)
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(aims), rcond=None)[0].T
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), atol=1e-7, rtol=1e-5)


def test_regmean_averages_where_no_token_has_been():
    _, (one, two) = tensors(2, (10, 14))
    grams = [torch.zeros(14, 14) for _ in range(2)]
    for gram, scale in zip(grams, (1.0, 3.0), strict=True):
        gram[0, 0] = scale
    merged = merge_tensors("regmean", [one, two], statistics=grams)
    mean = (one.double() + two.double()) / 2
    close(merged[:, 1:], mean[:, 1:])
    close(merged[:, 0], 0.25 * one[:, 0].double() + 0.75 * two[:, 0].double())


def test_fisher_equals_its_formula():
    _, models = tensors(3)
    shares = [torch.rand(48, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    shares[1][0] = 0
    merged = merge_tensors("fisher", models, parameters={"weight": [1, 2, 0.5], "floor": 0.01}, statistics=shares)
    weighted = [w * share.double().clamp(min=0.01) for w, share in zip((1, 2, 0.5), shares, strict=True)]
    expected = sum(w * m.double() for w, m in zip(weighted, models, strict=True)) / sum(weighted)
    close(merged, expected)


def test_weights_that_sum_to_nothing_are_refused():
    with pytest.raises(ConfigError, match="regmean: the weights sum to 0"):
        METHODS["regmean"].start({"weight": (1.0, -1.0)}, 2)
