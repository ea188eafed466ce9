"""What every layer would say: `lapis.lens(...)`, attention maps, contributions, the tuned lens."""

import sys
from types import ModuleType

from lapis.lens.logit_lens import lens
from lapis.lens.table import LensTrace
from lapis.lens.tuned import TunedLens, tune

__all__ = ["LensTrace", "TunedLens", "lens", "tune"]


class _Package(ModuleType):
    """Python binds `lapis.lens` to this package as soon as it is imported; so the package can be called."""

    __call__ = staticmethod(lens)


sys.modules[__name__].__class__ = _Package
