"""What kind of thing a part is, for rules that treat norms and token tables differently from the rest."""

import re

from lapis.families.base import Part

_NORM = re.compile(r"(^|[._])(norm|layernorm|ln|rmsnorm)([._0-9]|$)|norm$|^ln_")


def is_norm(part: Part) -> bool:
    """A layer norm, RMS norm, or query/key norm; by name, so that unknown families work."""
    return bool(_NORM.search(part.component.lower()))


def is_vocabulary(part: Part) -> bool:
    """The token embedding or the head that scores tokens: one row per token."""
    return part.component in ("embed", "head")
