"""A merge recipe, in mergekit's YAML as it is: what is merged, from which layers, with which parameters where.

    merge_method: ties
    base_model: runs/base
    models:
      - {model: runs/malay, parameters: {weight: 0.6, density: 0.5}}
      - model: runs/chat
        parameters:
          weight:
            - {filter: self_attn, value: [0.2, 0.8]}   # a gradient over the layers
            - {value: 0.4}
    dtype: bfloat16

Exactly one of models, slices and modules. Keys of lapis's own: `seed`, an input's `statistics`, and the parameter
`numerics`. An unknown key is an error that names the nearest. Leaves out: what a parameter is for a tensor
(parameters.py), recipes within recipes (stages.py), and the models themselves (weights/merge/plan.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lapis.config import check_number, nearest, truth
from lapis.errors import ConfigError
from lapis.families.fields import MOST_LAYERS
from lapis.parsing import quoted
from lapis.weights.merge.methods import METHODS, Method
from lapis.weights.merge.recipes.parameters import check_parameters, only

MOST_PADDING = 1 << 16  # rows

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Input:
    """A model in a slice. layers: [first, last), None for all of them. statistics: a folder of `lapis gather`."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    statistics: str | None = None


@dataclass(frozen=True)
class Slice:
    """Output layers that are made together, one layer of each input for each."""

    inputs: tuple[Input, ...]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSource:
    """Where a token's row comes from. kind: model, zero, or "" for the usual rule. token: string or id there."""

    kind: str = ""
    model: str = ""
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokens:
    """The output's vocabulary. source: "union", "base" or a model."""

    source: str
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int = 1


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and checked as far as that goes without its models.

    written: as the user gave it. stages: the recipes of those of its models that are made on the way.
    """

    method: Method
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    module: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    tokens: Tokens | None = None
    chat_template: str | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, "Recipe"] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """Every model that is named, the base first."""
        named = [self.base] if self.base else []
        named += [s.base for s in self.slices if s.base]
        named += [entry.model for s in self.slices for entry in s.inputs]
        return list(dict.fromkeys(named))

    @property
    def stacks(self) -> bool:
        """True where layers are picked, so that the output may have another number of them."""
        return any(entry.layers for s in self.slices for entry in s.inputs)


def parse_recipe(document: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe as a mapping, as YAML gives it."""
    known = {
        "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
        "tokenizer_source", "tokenizer", "chat_template", "seed", "name",
    }  # fmt: skip
    name = document.get("merge_method")
    if name == "moe":
        raise ConfigError(f"{where}: a mixture of experts stands alone; merge it first, then name its folder")
    only(document, known, where)
    if not isinstance(name, str) or name not in METHODS:
        shown = f'"{name:.60}"' if isinstance(name, str) else quoted(name)
        what = "merge_method is missing" if name is None else f"merge_method is {shown}"
        raise ConfigError(f"{where}: {what}; {nearest(shown, METHODS)}")
    method, notes = METHODS[name], []
    body, module = _body(document, where)
    base = _optional_text(document, "base_model", where)
    given = [key for key in ("models", "slices") if body.get(key)]
    if len(given) != 1:
        raise ConfigError(f"{where}: give exactly one of models, slices and modules; there are {len(given)}")
    if given == ["models"]:
        inputs = [
            _input(entry, f"{where}: models[{i}]", False) for i, entry in enumerate(read_list(body, "models", where))
        ]
        slices = [Slice(tuple(inputs))]
    else:
        slices = [_slice(entry, f"{where}: slices[{i}]") for i, entry in enumerate(read_list(body, "slices", where))]
        layers = sum(max(last - first for first, last in filter(None, (e.layers for e in s.inputs))) for s in slices)
        if layers > MOST_LAYERS:
            raise ConfigError(f"{where}: the slices hold {layers:,} layers; a model has at most {MOST_LAYERS:,}")
    if base and given == ["models"] and base not in [entry.model for entry in slices[0].inputs]:
        slices = [Slice((*slices[0].inputs, Input(base)))]
        notes.append(f"base_model {base} is not among the models; added")
    for i, each in enumerate(slices):
        _check_inputs(method, each, each.base or base, f"{where}: slices[{i}]" if given == ["slices"] else where)
    recipe = Recipe(
        method,
        tuple(slices),
        base,
        _mapping(document, "parameters", where),
        module,
        read_dtype(document, where),
        _tokens(document, where),
        _optional_text(document, "chat_template", where),
        read_whole(document.get("seed", 0), f"{where}: seed"),
        written=dict(document),
    )
    for place, parameters in recipe_scopes(recipe):
        notes += check_parameters(method, parameters, f"{where}: {place}")
    return Recipe(**{**recipe.__dict__, "notes": tuple(dict.fromkeys(notes))})


def recipe_scopes(recipe: Recipe) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping of parameters with the place where it stands."""
    yield "parameters", recipe.parameters
    yield "module parameters", recipe.module
    for i, each in enumerate(recipe.slices):
        yield f"slices[{i}] parameters", each.parameters
        for entry in each.inputs:
            yield f"parameters of {entry.model}", entry.parameters


def _body(document: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Where models or slices stand: at the top, or in the one module."""
    modules = document.get("modules")
    if not modules:
        return document, {}
    if document.get("models") or document.get("slices"):
        raise ConfigError(f"{where}: give exactly one of models, slices and modules")
    if not isinstance(modules, Mapping) or len(modules) != 1:
        raise ConfigError(f"{where}: modules must hold one module; merge the parts of a composed model one by one")
    ((name, module),) = modules.items()
    if not isinstance(module, Mapping):
        raise ConfigError(f"{where}: modules: {name} holds no mapping")
    only(module, {"slices", "models", "parameters"}, f"{where}: modules: {name}")
    return module, _mapping(module, "parameters", f"{where}: modules: {name}")


def _slice(entry: Any, where: str) -> Slice:
    only(entry, {"sources", "base_model", "residual_weight", "parameters"}, where)
    if entry.get("residual_weight") is not None:
        raise ConfigError(f"{where}: residual_weight does nothing in mergekit either; remove it")
    inputs = tuple(
        _input(each, f"{where}: sources[{i}]", True) for i, each in enumerate(read_list(entry, "sources", where))
    )
    lengths = {last - first for each in inputs for first, last in [each.layers or (0, 0)]}
    if len(lengths) != 1:
        raise ConfigError(f"{where}: all inputs must give the same number of layers; they give {sorted(lengths)}")
    return Slice(inputs, _optional_text(entry, "base_model", where), _mapping(entry, "parameters", where))


def _input(entry: Any, where: str, layered: bool) -> Input:
    only(entry, {"model", "parameters", "statistics"} | ({"layer_range"} if layered else set()), where)
    model = read_text(entry.get("model"), f"{where}: model")
    layers = None
    if layered:
        span = entry.get("layer_range")
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise ConfigError(f"{where}: layer_range is {quoted(span)}; expected [first, last), such as [0, 12]")
        layers = (span[0], span[1])
        if not 0 <= layers[0] < layers[1] <= MOST_LAYERS:
            why = "holds no layers" if layers[1] <= MOST_LAYERS else f"goes beyond {MOST_LAYERS:,} layers"
            raise ConfigError(f"{where}: layer_range {quoted(span)} {why}")
    return Input(model, layers, _mapping(entry, "parameters", where), _optional_text(entry, "statistics", where))


def _check_inputs(method: Method, within: Slice, base: str | None, where: str) -> None:
    """That a slice's inputs are what the method takes."""
    models = [entry.model for entry in within.inputs]
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice:
        raise ConfigError(f"{where}: {twice} stands twice among the inputs of {method.name}")
    for entry in within.inputs:
        if method.statistics and entry.statistics is None:
            remedy = f"lapis gather {entry.model} --kind {method.statistics} --text FILES --out DIR"
            raise ConfigError(f"{where}: {method.name} needs statistics of {entry.model}; give the folder of {remedy}")
        if entry.statistics is not None and not method.statistics:
            raise ConfigError(
                f"{where}: statistics of {entry.model}: {method.name} has no use for them; leave them out"
            )
    if method.base == "required" and base is None:
        raise ConfigError(f"{where}: {method.name} needs a base_model")
    if method.base == "required" and base not in models:
        raise ConfigError(f"{where}: the base_model {base} must be among the sources")
    count = len(models) - (method.base != "ignored" and base in models)
    if count < method.least or (method.most is not None and count > method.most):
        beside = " besides the base" if method.base != "ignored" else ""
        most = method.most or 0
        needs = f"{method.least} or more" if method.most is None else " to ".join(str(n) for n in {method.least, most})
        noun = "model" if needs == "1" else "models"
        raise ConfigError(f"{where}: {method.name} takes {needs} {noun}{beside}, and is given {count}")


def _tokens(document: Mapping[str, Any], where: str) -> Tokens | None:
    source, settings = document.get("tokenizer_source"), document.get("tokenizer")
    if source is not None and settings is not None:
        raise ConfigError(f"{where}: give tokenizer_source or tokenizer, not both")
    if settings is None:
        return None if source is None else Tokens(read_text(source, f"{where}: tokenizer_source"))
    only(settings, {"source", "tokens", "pad_to_multiple_of"}, f"{where}: tokenizer")
    listed = {
        token: _token_source(entry or {}, f'{where}: tokenizer: tokens: "{token}"')
        for token, entry in _mapping(settings, "tokens", f"{where}: tokenizer").items()
    }
    multiple = read_whole(settings.get("pad_to_multiple_of") or 1, f"{where}: tokenizer: pad_to_multiple_of")
    if multiple > MOST_PADDING:
        raise ConfigError(f"{where}: tokenizer: pad_to_multiple_of is {multiple:,}; expected at most {MOST_PADDING:,}")
    return Tokens(read_text(settings.get("source", "union"), f"{where}: tokenizer: source"), listed, max(1, multiple))


def _token_source(entry: Any, where: str) -> TokenSource:
    only(entry, {"source", "force"}, where)
    source, force = entry.get("source"), truth(entry.get("force", False))
    if force is None:
        raise ConfigError(f"{where}: force is {quoted(entry['force'])}; expected true or false")
    if source is None:
        return TokenSource(force=force)
    if isinstance(source, str):
        return TokenSource("model", read_text(source, f"{where}: source"), None, force)
    only(source, {"kind", "model", "token_id", "token"}, f"{where}: source")
    if source.get("kind") == "zero":
        return TokenSource("zero", force=force)
    token = source.get("token", source.get("token_id"))
    if source.get("kind") != "model_token" or token is None:
        raise ConfigError(f"{where}: source needs kind: zero, or kind: model_token with model and token or token_id")
    return TokenSource("model", read_text(source.get("model"), f"{where}: source: model"), token, force)


def read_dtype(document: Mapping[str, Any], where: str) -> str | None:
    """The output's dtype by its name in torch; None where the recipe names none."""
    for key in ("out_dtype", "dtype"):
        if document.get(key) is not None:
            name = str(document[key]).removeprefix("torch.")
            if name not in DTYPES:
                raise ConfigError(f'{where}: {key} is "{str(document[key])[:60]}"; {nearest(name, DTYPES)}')
            return name
    return None


def _mapping(document: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key}: expected key: value lines, got {quoted(value)}")
    return value


def read_list(document: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A list that must be there and hold something."""
    value = document.get(key)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: {key}: expected a list, got {quoted(value)}")
    return value


def read_text(value: Any, where: str) -> str:
    """The folder or the name of a model."""
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise ConfigError(f"{where} is {quoted(value)}; expected the folder or the name of a model")
    return value


def _optional_text(document: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if document.get(key) is None else read_text(document[key], f"{where}: {key}")


def read_whole(value: Any, where: str) -> int:
    """A whole number, 0 or more."""
    if type(value) is not int or value < 0:
        raise ConfigError(f"{where} is {quoted(value)}; expected a whole number")
    check_number(value, where)
    return value
