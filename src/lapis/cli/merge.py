"""`lapis merge`: models merged by a recipe, or by one line of arithmetic."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lapis.cli.graft import bar, print_result
from lapis.cli.output import line, show
from lapis.weights.options import MergeOptions

if TYPE_CHECKING:
    from lapis.checkpoint import Checkpoint
    from lapis.weights.merge.mixture.gates import PromptStates


def merge(
    recipe: str | None = None,
    /,
    *,
    out: str | None = None,
    options: Annotated[MergeOptions, Parameter(name="*")] = MergeOptions(),  # noqa: B008
    methods: bool = False,
    json: bool = False,
) -> None:
    """Merge models by a recipe in mergekit's YAML, or by a line such as "A + 0.8*(B - C)".

    Args:
        recipe: A YAML file, or a sum of multiples of model folders.
        out: A new folder.
        methods: List the merge methods with their parameters, and do nothing else.
        json: Print one JSON object.
    """
    from lapis.errors import ConfigError

    if methods:
        listing = method_table()
        show({"methods": listing}, json, lambda: print_methods(listing))
        return
    if recipe is None or out is None:
        raise ConfigError("merge: needs a recipe and --out; lapis merge --methods lists what can be done")
    from lapis.weights.merge.merge import merge as run

    def states(base: "Checkpoint") -> "PromptStates":
        from lapis.planning.gather import prompt_states

        return prompt_states(base)

    with bar("merging") as report:
        result = run(recipe, out, **asdict(options), states=states, progress=report)
    show(result.to_json(), json, lambda: print_result(result))


def method_table() -> list[dict[str, object]]:
    """Every merge method with its formula and parameters, from their signatures and docstrings."""
    from lapis.weights.merge.methods import METHODS, Parameter
    from lapis.weights.merge.mixture.recipe import GATE_MODES, METHOD

    choices = "; ".join(f"{mode}: {text}" for mode, text in GATE_MODES.items())
    listing: list[dict[str, object]] = [
        {
            "name": method.name,
            "help": method.help,
            "base": method.base,
            "parameters": {
                name: {
                    "help": parameter.help,
                    "default": None if parameter.default is Parameter.MISSING else parameter.default,
                    "per_model": parameter.per_model,
                }
                for name, parameter in method.parameters.items()
            },
        }
        for method in METHODS.values()
    ]
    return [
        *listing,
        {
            "name": METHOD,
            "help": "The models' MLPs side by side as experts, with gates by gate_mode (mergekit-moe's recipe).",
            "base": "required",
            "parameters": {"gate_mode": {"help": choices, "default": "hidden", "per_model": False}},
        },
    ]


def print_methods(listing: list[dict[str, object]]) -> None:
    for entry in listing:
        line(f"\n{entry['name']} (base: {entry['base']})", "bold")
        line(entry["help"])
        parameters = entry["parameters"]
        assert isinstance(parameters, dict)
        for name, p in parameters.items():
            default = "must be set" if p["default"] is None else f"default {p['default']}"
            each = ", one for each model" if p["per_model"] else ""
            line(f"    {name}: {p['help']} ({default}{each})")
