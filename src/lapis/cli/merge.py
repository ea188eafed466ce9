"""`lapis merge`: models merged by a recipe, or by one line of arithmetic."""

from lapis.cli.graft import bar, told
from lapis.cli.output import line, show


def merge(
    recipe: str | None = None,
    /,
    *,
    out: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    methods: bool = False,
    json: bool = False,
) -> None:
    """Merge models by a recipe in mergekit's YAML, or by a line such as "A + 0.8*(B - C)".

    Parameters
    ----------
    recipe
        A YAML file, or a sum of multiples of model folders.
    out
        A new folder.
    seed
        What random masks are drawn from, instead of the recipe's.
    overwrite
        Swap an existing folder for the new one, whole.
    allow_nonfinite
        Count NaN and Inf instead of stopping.
    dry_run
        Check everything and say what would be done; read no weights, write nothing.
    methods
        List the merge methods with their parameters, and do nothing else.
    json
        Print one JSON object.
    """
    from lapis.errors import ConfigError

    if methods:
        listing = method_table()
        show({"methods": listing}, json, lambda: tell_methods(listing))
        return
    if recipe is None or out is None:
        raise ConfigError("merge: needs a recipe and --out; lapis merge --methods lists what can be done")
    from lapis.weights.merge.merge import merge as run

    with bar("merging") as tell:
        result = run(
            recipe, out, seed=seed,
            overwrite=overwrite, allow_nonfinite=allow_nonfinite, dry_run=dry_run, progress=tell,
        )  # fmt: skip
    show(result.to_json(), json, lambda: told(result))


def method_table() -> list[dict[str, object]]:
    """Every merge method with its formula and parameters, from their signatures and docstrings."""
    from lapis.weights.merge.methods import METHODS, Parameter

    return [
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


def tell_methods(listing: list[dict[str, object]]) -> None:
    for entry in listing:
        line(f"\n{entry['name']} (base: {entry['base']})", "bold")
        line(entry["help"])
        parameters = entry["parameters"]
        assert isinstance(parameters, dict)
        for name, p in parameters.items():
            default = "must be set" if p["default"] is None else f"default {p['default']}"
            each = ", one for each model" if p["per_model"] else ""
            line(f"    {name}: {p['help']} ({default}{each})")
