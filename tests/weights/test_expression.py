"""One-line recipes: sums of multiples of models, equal to plain arithmetic, and nothing else."""

import ast
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.errors import ConfigError
from lapis.weights.merge.recipes.expression import coefficients, parse_expression

READ = {
    "A + 0.8*(B - C)": {"A": 1, "B": 0.8, "C": -0.8},
    "A+0.8*(B - C)": {"A": 1, "B": 0.8, "C": -0.8},
    "runs/malay-chat + 0.5*(chat - base)": {"runs/malay-chat": 1, "chat": 0.5, "base": -0.5},
    "(A + B)/2": {"A": 0.5, "B": 0.5},
    "/models/A / 2 + /models/B-b": {"/models/A": 0.5, "/models/B-b": 1},
    "-A + 2*B - -C": {"A": -1, "B": 2, "C": 1},
    "'my models/a b' + 1e-1 * Qwen/Qwen2.5-0.5B@main": {"my models/a b": 1, "Qwen/Qwen2.5-0.5B@main": 0.1},
    "../7b-chat * 3 - 0.5*(../7b-chat + ~/x)": {"../7b-chat": 2.5, "~/x": -0.5},
}


@pytest.mark.parametrize("text", READ)
def test_sums_are_read(text):
    assert coefficients(text) == pytest.approx(READ[text])


def test_a_sum_is_a_linear_recipe():
    recipe = parse_expression("A + 0.8*(B - C)")
    assert recipe.method.name == "linear" and recipe.parameters == {"normalize": False}
    assert [(entry.model, entry.parameters["weight"]) for entry in recipe.slices[0].inputs] == [
        ("A", 1.0),
        ("B", 0.8),
        ("C", -0.8),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A * B", "multiplies models"),
        ("A + 1", "adds a number to a model"),
        ("2 + 3", "a number, not a model"),
        ("A / B", "divided by a number"),
        ("A / 0", "divided by a number other than 0"),
        ("A - A", "A cancels out"),
        ("A +", "not a sum of models"),
        ("A B", "not understood"),
        ("A ** 2", "not understood"),
        ("", "not a sum of models"),
        ("f(A)", "only"),
        ("A, B", "not understood"),
        ("[A]", "not understood"),
        ("A if B else C", "not understood"),
        ("A + 1e99*B", "between 1e-30 and 1e30"),
        ("(" * 4000 + "A" + ")" * 4000, "not a sum of models"),
        ("lambda: A", "not understood"),
    ],
)
def test_nothing_else_is(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        coefficients(text)
    assert "\n" not in str(error.value)


@given(st.recursive(
    st.sampled_from(["A", "B", "C"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(st.integers(1, 9), inner).map(lambda p: f"{p[0]} * {p[1]}"),
        inner.map(lambda text: f"({text}) / 4"),
    ),
    max_leaves=8,
))  # fmt: skip
def test_equals_the_same_sum_of_numbers(text):
    given_numbers = {"A": 3, "B": 50, "C": 700}
    tree = ast.parse(text, mode="eval")
    expected = _number(tree.body, given_numbers)
    try:
        result = coefficients(text)
    except ConfigError as error:
        assert "cancels out" in str(error)
        return
    assert sum(weight * given_numbers[name] for name, weight in result.items()) == pytest.approx(expected)


def _number(node, names):
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    left, right = _number(node.left, names), _number(node.right, names)
    apply = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
    return apply[type(node.op)](left, right)
