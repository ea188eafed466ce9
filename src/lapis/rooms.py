"""A package that imports its names when they are first used, and that may be a verb of the API: lapis.train(...).

    furnish(__name__, {"TrainConfig": "config", "train": "loop"}, verb="train")

says in which submodule each public name lives. Python binds `lapis.train` to the package as soon as anything imports
it, so a verb's package is made callable: it calls its function of that name. A submodule of the same name as a public
function (generate/generate.py) does not take the name away from it.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class Room(ModuleType):
    """A package with lazily imported names. Made from an ordinary one by `furnish`."""

    _places: Mapping[str, str]
    _verb: str | None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._places:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{self.__name__}.{self._places[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        taken = isinstance(value, ModuleType) and vars(self).get("_places", {}).get(name) == name
        super().__setattr__(name, getattr(value, name) if taken else value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._places})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._verb is None:
            raise TypeError(f"{self.__name__} is a package, not a function")
        return getattr(self, self._verb)(*args, **kwargs)


def furnish(package: str, places: Mapping[str, str], verb: str | None = None) -> None:
    """Makes `package` a Room: places is public name -> submodule, verb the name that a call of the package means."""
    module = sys.modules[package]
    module.__class__ = Room
    vars(module).update(_places=places, _verb=verb)
