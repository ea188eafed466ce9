"""The one configurable transformer: its shape, its parts, and how it is loaded and saved."""

from typing import TYPE_CHECKING

from lapis.rooms import furnish

if TYPE_CHECKING:
    from lapis.model.cache import Cache
    from lapis.model.config import Image, ModelConfig, Rope
    from lapis.model.load import load, save
    from lapis.model.transformer import Transformer

__all__ = ["Cache", "Image", "ModelConfig", "Rope", "Transformer", "load", "save"]

furnish(
    __name__,
    {
        "Cache": "cache", "Image": "config", "ModelConfig": "config", "Rope": "config",
        "Transformer": "transformer", "load": "load", "save": "load",
    },
)  # fmt: skip
