"""Text out of a model: sampling, streaming, batches. `lapis.generate(...)` is the function of that name."""

import sys
from types import ModuleType

from lapis.generate.generate import Memory, Reply, generate, generate_batch, stream
from lapis.generate.ready import ready
from lapis.generate.sampling import Sampling

__all__ = ["Memory", "Reply", "Sampling", "generate", "generate_batch", "ready", "stream"]


class _Package(ModuleType):
    """Python binds `lapis.generate` to this package as soon as it is imported; so the package can be called."""

    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Package
