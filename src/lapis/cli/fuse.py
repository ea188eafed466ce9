"""`lapis fuse`: an adapter added to its base."""

from lapis.cli.graft import bar, print_result
from lapis.cli.output import show
from lapis.weights.options import Dtype


def fuse(
    adapter: str,
    /,
    *,
    out: str,
    base: str | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    json: bool = False,
) -> None:
    """Add an adapter (LoRA, DoRA; PEFT's format) to the model that it was trained on, as a model of its own.

    Args:
        adapter: An adapter folder, or an adapter of the hub.
        out: A new folder.
        base: The model that the adapter belongs to, where it is not at the place that the adapter names.
        dtype: Of the weights that are written; by default the base's.
        overwrite: Swap an existing folder for the new one, whole.
        allow_nonfinite: Count NaN and Inf instead of stopping.
        json: Print one JSON object.
    """
    from lapis.weights.fuse.fuse import fuse as run

    with bar("fusing") as tell:
        result = run(
            adapter, out, base=base, dtype=dtype, overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=tell
        )
    show(result.to_json(), json, lambda: print_result(result))
