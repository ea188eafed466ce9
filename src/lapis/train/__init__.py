"""Training: one loop, objectives, optimizers, exact resume.

    lapis.train(model, lapis.Chat(tokenizer, "chats.jsonl"), lapis.TrainConfig(steps=500), out="runs/chat")

`lapis.train` is this package and can be called: it is the function `lapis.train.train`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapis.train.config import TrainConfig
    from lapis.train.loop import TrainResult, train
    from lapis.train.objectives import Causal, Chat

_PLACES = {
    "Causal": "objectives", "Chat": "objectives", "TrainConfig": "config", "TrainResult": "loop", "train": "loop",
}  # fmt: skip

__all__ = ["Causal", "Chat", "TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lapis.train' has no attribute {name!r}")
    return getattr(import_module(f"lapis.train.{_PLACES[name]}"), name)


class _Callable(ModuleType):
    """A package and a function of one name, as the public API has it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from lapis.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
