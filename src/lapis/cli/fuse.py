"""`lapis fuse`: an adapter added to its base."""

from typing import Literal

from lapis.cli.graft import bar, print_result
from lapis.cli.output import show

LOSS = 0.05  # share of what an adapter adds, lost to rounding, that is worth a hint


def fuse(
    adapter: str,
    /,
    *,
    out: str,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    json: bool = False,
) -> None:
    """Add an adapter (LoRA, DoRA; PEFT's format) to the model that it was trained on, as a model of its own.

    Args:
        adapter: An adapter folder.
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
    lossy = result.lost_to_rounding is not None and result.lost_to_rounding > LOSS and dtype != "float32"
    hint = "; --dtype float32 keeps it" if lossy else ""
    show(result.to_json(), json, lambda: print_result(result, hint))
