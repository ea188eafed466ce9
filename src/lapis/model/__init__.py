"""The one configurable transformer: its shape, its parts, and how it is loaded and saved.

Names are imported when they are first used: counting a model's size needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapis.model.cache import Cache
    from lapis.model.config import Image, ModelConfig, Rope
    from lapis.model.load import load, save
    from lapis.model.transformer import Transformer

_PLACES = {
    "Cache": "cache", "Image": "config", "ModelConfig": "config", "Rope": "config", "Transformer": "transformer",
    "load": "load", "save": "load",
}  # fmt: skip

__all__ = ["Cache", "Image", "ModelConfig", "Rope", "Transformer", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lapis.model' has no attribute {name!r}")
    return getattr(import_module(f"lapis.model.{_PLACES[name]}"), name)


class _Room(ModuleType):
    """Importing a submodule binds its name here; `load` is also a function's name, and the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.load if name == "load" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Room
