"""What every layer would say: `lapis.lens(...)`, attention maps, contributions, the tuned lens."""

from typing import TYPE_CHECKING

from lapis.rooms import furnish

if TYPE_CHECKING:
    from lapis.lens.logit_lens import lens
    from lapis.lens.table import LensTrace
    from lapis.lens.tuned import TunedLens, tune

__all__ = ["LensTrace", "TunedLens", "lens", "tune"]

furnish(__name__, {"LensTrace": "table", "TunedLens": "tuned", "lens": "logit_lens", "tune": "tuned"}, verb="lens")
