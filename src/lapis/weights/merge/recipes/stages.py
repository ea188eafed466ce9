"""Recipes whose outputs are inputs of others: several documents in one file, or a recipe in the place of a model.

    name: warm
    merge_method: linear
    models: [{model: runs/a, parameters: {weight: 0.5}}, {model: runs/b, parameters: {weight: 0.5}}]
    ---
    merge_method: slerp
    base_model: warm
    models: [{model: runs/c}]
    parameters: {t: 0.3}

The document that no other one uses is the output; where one has no name, it is that one. Leaves out: how a stage is
computed (weights/merge/plan.py).
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lapis.config import load_yaml_documents
from lapis.errors import ConfigError
from lapis.weights.merge.recipes.expression import parse_expression
from lapis.weights.merge.recipes.recipe import Recipe, parse_recipe
from lapis.wording import format_count

MOST = 64  # stages of one recipe
_DEEPEST = 16  # recipes within recipes

RecipeLike = Recipe | Mapping[str, Any] | str | os.PathLike[str]
"""A YAML file, its content as a mapping, a line such as "A + 0.8*(B - C)", or what was read of them."""

_Document = dict[str, Any]


def open_recipe(recipe: RecipeLike) -> Recipe:
    """A recipe from whatever a user gives. Raises ConfigError with the place in the file."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_stages([dict(recipe)])
    text = os.fspath(recipe)
    if text.endswith((".yaml", ".yml")) or os.path.isfile(text):
        return parse_stages(load_yaml_documents(text), text)
    return parse_expression(text)


def parse_stages(documents: list[_Document], where: str = "recipe") -> Recipe:
    """The recipe of the output, with those that its inputs are made by in `Recipe.stages`.

    Args:
        documents: As YAML gives them.
        where: What an error begins with.

    Raises:
        ConfigError: For a stage that is made from itself, with the circle, that nobody uses, or that no recipe is.
    """
    named: dict[str, _Document] = {}
    last: list[_Document] = []
    for number, document in enumerate(documents):
        name = document.get("name")
        if name is None or len(documents) == 1:
            last.append(document)
        elif not isinstance(name, str) or not name or "/" in name:
            raise ConfigError(f"{where}: document {number + 1}: name is {name!r}; expected a word")
        elif name in named:
            raise ConfigError(f"{where}: two documents are named {name}; give each its own name")
        else:
            named[name] = document
    if len(last) > 1:
        what = format_count(len(last), "document has", "documents have")
        raise ConfigError(f"{where}: {what} no name; name all but the one that is the output")
    written = {"stages": dict(named)} if named else {}
    for name in list(named):
        named[name] = _without_nested(named[name], named, name, where)
    final = _without_nested(last[0], named, "", where) if last else None
    if len(named) > MOST:
        raise ConfigError(f"{where}: {len(named)} stages; the limit is {MOST}")
    recipes = {name: parse_recipe(document, f"{where}: {name}") for name, document in named.items()}
    output = parse_recipe(final, where) if final is not None else None
    _check_circles(recipes, where)
    used = {model for recipe in (*recipes.values(), *([output] if output else [])) for model in recipe.models}
    unused = [name for name in recipes if name not in used]
    if output is None:
        if len(unused) != 1:
            raise ConfigError(
                f"{where}: nothing uses {', '.join(unused)}; one document is the output, leave out the rest"
            )
        output = recipes[unused.pop()]
    elif output.models and output.written.get("name") in output.models and not recipes:
        if not os.path.lexists(name := str(output.written["name"])):
            raise ConfigError(f"{where}: {name} is made from {name}; a stage cannot be made from itself")
    if unused:
        raise ConfigError(f"{where}: nothing uses {', '.join(unused)}; leave out what the output does not need")
    whole = _linked(output, recipes, {})
    return replace(whole, written={**(last[0] if last else output.written), **written})


def _without_nested(document: _Document, named: dict[str, _Document], of: str, where: str, depth: int = 0) -> _Document:
    """The document with each recipe in the place of a model taken out, given a name and put among the named ones."""
    if depth > _DEEPEST:
        raise ConfigError(f"{where}: recipes within recipes, more than {_DEEPEST} deep")

    def place(value: Any) -> Any:
        if not isinstance(value, Mapping) or "merge_method" not in value:
            return value
        name = str(value.get("name") or f"{of or 'stage'}.{len(named) + 1}")
        if name in named:
            raise ConfigError(f"{where}: two recipes are named {name}; give each its own name")
        named[name] = dict(value)  # before what is in it, so that their names differ
        named[name] = _without_nested(named[name], named, name, where, depth + 1)
        return name

    def entry(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        changed = {key: place(item) if key in ("model", "base_model") else item for key, item in value.items()}
        if isinstance(value.get("sources"), list):
            changed["sources"] = [entry(item) for item in value["sources"]]
        return changed

    result = dict(entry(document))
    bodies = [result]
    if isinstance(modules := document.get("modules"), Mapping):
        result["modules"] = {name: dict(body) for name, body in modules.items() if isinstance(body, Mapping)} or modules
        bodies += [body for body in result["modules"].values() if isinstance(body, dict)]
    for body in bodies:
        for key in ("models", "slices"):
            if isinstance(body.get(key), list):
                body[key] = [entry(item) for item in body[key]]
    return result


def _check_circles(recipes: Mapping[str, Recipe], where: str) -> None:
    """Raises ConfigError with the names along a circle, where a stage needs its own output."""
    sound: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            steps = [*above[above.index(name) :], name]
            circle = ", ".join(f"{one} is made from {other}" for one, other in pairwise(steps))
            raise ConfigError(f"{where}: {circle}; a stage cannot be made from itself: take one of these out")
        if name not in sound:
            for model in recipes[name].models:
                if model in recipes:
                    visit(model, (*above, name))
            sound.add(name)

    for name in recipes:
        visit(name, ())


def _linked(recipe: Recipe, recipes: Mapping[str, Recipe], made: dict[str, Recipe]) -> Recipe:
    """The recipe with its stages in it; a stage that several use is one object."""
    for name in recipe.models:
        if name in recipes and name not in made:
            made[name] = _linked(recipes[name], recipes, made)
    return replace(recipe, stages={name: made[name] for name in recipe.models if name in recipes})


def each_stage(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """All stages below a recipe by name, each once, those that others need first."""
    seen: set[str] = set()

    def below(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
        for name, stage in recipe.stages.items():
            if name not in seen:
                seen.add(name)
                yield from below(stage)
                yield name, stage

    yield from below(recipe)
