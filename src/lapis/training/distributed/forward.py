"""How far this process is, for the others of its run: whoever computes or waits says so; liveness.py tells it on."""

from collections.abc import Iterator
from contextlib import contextmanager


class _Here:
    """steps: How often this process came a step forward. waits: Whether it waits for others."""

    def __init__(self) -> None:
        self.steps, self.waits = 0, False


_here = _Here()


def step_forward() -> None:
    """Notes that this process computes and gets somewhere: a block of the model, a reward, a part of a file."""
    _here.steps += 1


@contextmanager
def waiting() -> Iterator[None]:
    """While inside, this process waits for others."""
    before, _here.waits = _here.waits, True
    step_forward()
    try:
        yield
    finally:
        _here.waits = before
        step_forward()


def place() -> str:
    """Both, as the others read it: "12 1" is the twelfth step, and waiting."""
    return f"{_here.steps} {int(_here.waits)}"


def waits(place: str) -> bool:
    """Whether the process of a place waits for others."""
    return place.endswith("1") and " " in place
