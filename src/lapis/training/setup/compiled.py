"""torch.compile, block by block, where it pays: the blocks share one graph, so that compiling is short.

"auto" estimates first, from the time of a step and the length of the run; then it compiles, measures, and keeps what is
faster. Leaves out: compiling the head (its loss runs in chunks, cross_entropy.py) and the optimizer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from lapis.errors import TrainingError
from lapis.model.transformer import Transformer

Compile = Literal["auto", "on", "off"]

# share of a step that compiling the blocks may save, and the seconds that it takes, on the safe side
_GAIN = {"cpu": 0.1, "cuda": 0.3}
_COST = {"cpu": 60.0, "cuda": 60.0}


@contextmanager
def compiled(model: Transformer, on: bool) -> Iterator[None]:
    """While inside, the blocks run compiled."""
    import torch

    blocks = list(model.blocks) if on else []
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        setattr(block, "forward", torch.compile(block.forward))  # noqa: B010
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                setattr(block, "forward", forward)  # noqa: B010


def pays(
    model: Transformer, mode: Compile, seconds: Callable[[], float], parts: int, budget: float | None, kind: str
) -> tuple[bool, str | None]:
    """Whether to compile, and half a sentence that says why where it was measured.

    seconds: measures one micro-batch, the shortest of a few. parts: micro-batches of the run, where their number is
    known; budget: else its seconds. kind: of device.
    """
    if mode == "off":
        return False, None
    if mode == "on":
        _tried(model, seconds)
        return True, None
    least = 2 * _COST.get(kind, 60.0) / _GAIN.get(kind, 0.1)  # seconds of a run that make it worth a try
    if parts < 100 if budget is None else budget < least:
        return False, None
    plain = seconds()
    if budget is None and plain * parts < least:
        return False, None
    try:
        faster = _tried(model, seconds)
    except TrainingError as error:
        return False, str(error)
    said = f"a micro-batch takes {faster * 1000:,.0f} ms compiled, {plain * 1000:,.0f} ms as it is"
    return faster < 0.97 * plain, said


def _tried(model: Transformer, seconds: Callable[[], float]) -> float:
    """Seconds with compiled blocks. Raises TrainingError where they do not compile (no C++ compiler, for one)."""
    import torch

    try:
        with compiled(model, True):
            return seconds()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's own kinds differ between versions of torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise TrainingError(f"train: torch.compile failed ({reason}); set compile to off") from None
