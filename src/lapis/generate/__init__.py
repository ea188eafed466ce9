"""Text out of a model: sampling, streaming, batches. `lapis.generate(...)` is the function of that name."""

from typing import TYPE_CHECKING

from lapis.rooms import furnish

if TYPE_CHECKING:
    from lapis.generate.generate import Memory, Reply, generate, generate_batch, stream
    from lapis.generate.options import Sampling
    from lapis.generate.ready import open_ready, ready

__all__ = ["Memory", "Reply", "Sampling", "generate", "generate_batch", "open_ready", "ready", "stream"]

furnish(
    __name__,
    {
        "Memory": "generate", "Reply": "generate", "Sampling": "options", "generate": "generate",
        "generate_batch": "generate", "open_ready": "ready", "ready": "ready", "stream": "generate",
    },
    verb="generate",
)  # fmt: skip
