"""How a text becomes one vector, as an encoder's folder says: sentence-transformers' modules.json."""

from dataclasses import dataclass
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.errors import ConfigError

MODES = ("cls_token", "mean_tokens")


@dataclass(frozen=True)
class Pooling:
    """first: the first token's vector, else the mean of all. normalized: to length 1."""

    first: bool = False
    normalized: bool = False


def read_pooling(checkpoint: Checkpoint) -> Pooling:
    """The pooling of a folder; the mean where it says nothing.

    Args:
        checkpoint: Of the model.

    Raises:
        ConfigError: For a step that is not built: another vector would come out than the model was trained for.
    """
    steps: Any = checkpoint.json("modules.json")
    first = normalized = False
    for step in steps if isinstance(steps, list) else []:
        kind = str(step.get("type") if isinstance(step, dict) else step).rpartition(".")[2]
        if kind == "Pooling":
            settings = checkpoint.json(f"{step['path']}/config.json") or {}
            modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
            if modes not in ([f"pooling_mode_{mode}"] for mode in MODES):
                raise ConfigError(f"{checkpoint.source}: embeddings are pooled by {', '.join(modes) or 'nothing'}; "
                                  f"{' and '.join(MODES)} are built")  # fmt: skip
            first = modes == ["pooling_mode_cls_token"]
        elif kind == "Normalize":
            normalized = True
        elif kind != "Transformer":
            raise ConfigError(f"{checkpoint.source}: embeddings go through {kind!r:.60}, which is not built")
    return Pooling(first, normalized)
