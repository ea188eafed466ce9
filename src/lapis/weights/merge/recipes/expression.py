"""A merge as one line: `A + 0.8*(B - C)`. The names are folders of models; the rest is a sum of multiples of them.

A name may hold what a path holds: letters, digits, `_ . / ~ @ :` and a hyphen without spaces around it, so that
`runs/malay-chat + 0.8*(chat - base)` reads as one would say it; anything else goes in quotes. The line is parsed with
Python's grammar and an allow-list of sums, differences and products with numbers; nothing is ever evaluated as code.
"""

import ast
import re

from lapis.config import check_number
from lapis.errors import ConfigError
from lapis.weights.merge.methods import METHODS
from lapis.weights.merge.recipes.recipe import Input, Recipe, Slice

_OPERAND = re.compile(
    r"""(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.~@:]))"""
    r"""|(?P<quoted>"[^"]+"|'[^']+')"""
    r"""|(?P<name>[\w.~/][\w.~@:/]*(?:-+[\w.~@:/]+)*)"""
    r"""|(?P<operator>[-+(])|(?P<space>\s+)"""
)
_OPERATOR = re.compile(r"(?P<operator>[-+*/()])|(?P<space>\s+)")


def parse_expression(text: str) -> Recipe:
    """`A + 0.8*(B - C)` as a recipe: linear, not normalized, with each model's coefficient as its weight.

    Raises ConfigError for what is not such a sum, naming the place.
    """
    terms = coefficients(text)
    if not terms:
        raise ConfigError(f'"{text}": names no model')
    inputs = tuple(Input(model, parameters={"weight": weight}) for model, weight in terms.items())
    return Recipe(METHODS["linear"], (Slice(inputs),), None, {"normalize": False}, written={"expression": text})


def coefficients(text: str) -> dict[str, float]:
    """Model -> coefficient, in the order in which the models are named; those that cancel out are an error."""
    if len(text) > 10_000:
        raise ConfigError("expression: longer than 10,000 characters; write a recipe")
    names: list[str] = []
    source, at, operand = "", 0, True  # a slash begins a path where an operand is due, and divides elsewhere
    while at < len(text):
        match = (_OPERAND if operand else _OPERATOR).match(text, at)
        if not match:
            raise ConfigError(f'"{text}": "{text[at]}" at {at + 1} is not understood; put names with spaces in quotes')
        if match.lastgroup in ("name", "quoted"):
            names.append(match[0].strip("\"'"))
            source += f" _{len(names) - 1} "
        else:
            source += match[0]
        if match.lastgroup != "space":
            operand = match.lastgroup == "operator" and match[0] != ")"
        at = match.end()
    try:
        tree = ast.parse(source.strip(), mode="eval")
        value = _value(tree.body, names, text)
    except (SyntaxError, RecursionError, MemoryError):
        raise ConfigError(f'"{text}": not a sum of models; expected the like of A + 0.8*(B - C)') from None
    if isinstance(value, float):
        raise ConfigError(f'"{text}": a number, not a model')
    gone = [name for name, weight in value.items() if weight == 0]
    if gone:
        raise ConfigError(f'"{text}": {gone[0]} cancels out; leave it away')
    for name, weight in value.items():
        check_number(weight, f'"{text:.200}": the factor of {name:.100}')
    return value


def _value(node: ast.expr, names: list[str], text: str) -> float | dict[str, float]:
    """A number, or a linear combination of models."""
    match node:
        case ast.Name(id=name):
            return {names[int(name[1:])]: 1.0}
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            check_number(number, f'"{text:.200}": a number')
            return float(number)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand, names, text)
            return _times(value, -1.0) if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as operator, right=right):
            one, other = _value(left, names, text), _value(right, names, text)
            return _plus(one, _times(other, -1.0 if isinstance(operator, ast.Sub) else 1.0), text)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            one, other = _value(left, names, text), _value(right, names, text)
            if isinstance(one, dict) and isinstance(other, dict):
                raise ConfigError(f'"{text}": multiplies models with each other; a model can be multiplied by a number')
            return _times(other, one) if isinstance(one, float) else _times(one, other)  # type: ignore[arg-type]
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            divisor = _value(right, names, text)
            if not isinstance(divisor, float) or divisor == 0:
                raise ConfigError(f'"{text}": can be divided by a number other than 0 only')
            return _times(_value(left, names, text), 1 / divisor)
    raise ConfigError(f'"{text}": only + - * / and brackets are understood')


def _times(value: float | dict[str, float], factor: float) -> float | dict[str, float]:
    if isinstance(value, float):
        return value * factor
    return {name: weight * factor for name, weight in value.items()}


def _plus(one: float | dict[str, float], other: float | dict[str, float], text: str) -> float | dict[str, float]:
    if isinstance(one, float) and isinstance(other, float):
        return one + other
    if isinstance(one, float) or isinstance(other, float):
        raise ConfigError(f'"{text}": adds a number to a model; did you mean to multiply?')
    total = dict(one)
    for name, weight in other.items():
        total[name] = total.get(name, 0.0) + weight
    return total
