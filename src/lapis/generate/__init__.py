"""Text out of a model: sampling, streaming, batches. `lapis.generate(...)` is the function of that name.

Names are imported when they are first used: reading options needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapis.generate.generate import Memory, Reply, generate, generate_batch, stream
    from lapis.generate.options import Sampling
    from lapis.generate.ready import open_ready, ready

_PLACES = {
    "Memory": "generate", "Reply": "generate", "Sampling": "options", "generate": "generate",
    "generate_batch": "generate", "open_ready": "ready", "ready": "ready", "stream": "generate",
}  # fmt: skip

__all__ = ["Memory", "Reply", "Sampling", "generate", "generate_batch", "open_ready", "ready", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lapis.generate' has no attribute {name!r}")
    return getattr(import_module(f"lapis.generate.{_PLACES[name]}"), name)


class _Room(ModuleType):
    """`lapis.generate` is both this package and a function, so the package can be called. Importing the submodules
    `generate` and `ready` binds these names here; they are also functions' names, and the functions win."""

    def __call__(self, model: Any, tokenizer: Any, prompt: Any, sampling: Any = None) -> str:
        from lapis.generate.generate import generate
        from lapis.generate.options import Sampling

        return generate(model, tokenizer, prompt, sampling or Sampling())

    def __setattr__(self, name: str, value: Any) -> None:
        own = isinstance(value, ModuleType) and _PLACES.get(name) == name
        super().__setattr__(name, getattr(value, name) if own else value)


sys.modules[__name__].__class__ = _Room
