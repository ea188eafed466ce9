"""A model as it is served: under a name that says nothing of this machine, with its tokenizer and its limits."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.checkpoint.adapter import head_of
from lapis.errors import ConfigError
from lapis.generation.options import DecodingRuntime
from lapis.generation.ready import open_ready
from lapis.model.blocks.norm import compute_dtype
from lapis.model.check import read_config
from lapis.model.reading.readable import ReadableModel
from lapis.model.size import free_memory
from lapis.model.transformer import Transformer
from lapis.serving.engine.pooling import Pooling, read_pooling
from lapis.serving.engine.slots import slot_bytes
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.wording import format_count

CACHE_SHARE = 0.5  # of the memory that is free once all weights are there, for keys and values
LEAST_CONTEXT = 256


@dataclass(frozen=True)
class ServedModel:
    """name: what clients call it. source: what the user typed, which no answer shows. context: of prompt and reply.

    replies: whether it continues text; a model that does not has embeddings only. chats: whether it has a template.
    """

    name: str
    source: str
    model: Transformer
    tokenizer: Tokenizer
    context: int
    pooling: Pooling = field(default_factory=Pooling)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def replies(self) -> bool:
        return self.model.config.head == "lm" and self.model.config.causal

    @property
    def chats(self) -> bool:
        return self.replies and self.tokenizer.chat_template is not None

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.model.embed.weight)

    def defaults(self) -> Mapping[str, Any]:
        """What the folder's generation_config.json says of sampling."""
        return self.model.generation

    def token(self, index: int) -> dict[str, Any]:
        """A token as text, with its id and bytes; a part of a character is a replacement character with its byte."""
        return {"token": self.tokenizer.decode([index]), "id": index, "bytes": list(self.tokenizer.bytes_of(index))}

    def hides(self, text: str) -> str:
        """A message without the places of this machine."""
        for place in sorted({self.source, self.tokenizer.source, str(Path(self.source).absolute())}, key=len)[::-1]:
            text = text.replace(place, self.name)
        return text


def name_models(sources: list[str]) -> list[str]:
    """A name for each: the last part of its path, numbered where two would share it.

    Args:
        sources: What the user typed.

    Raises:
        ConfigError: For a model that is named twice.
    """
    names: list[str] = []
    places: list[str] = []
    for source in sources:
        folder = Path(source)
        place = str(folder.resolve()) if folder.exists() else source
        if place in places:
            raise ConfigError(f"serve: {source} is named twice; name each model once")
        places.append(place)
        name = short = folder.resolve().name if folder.exists() else source
        number = 2
        while name in names:
            name, number = f"{short}-{number}", number + 1
        names.append(name)
    return names


def open_models(sources: list[str], runtime: DecodingRuntime, rows: int, most: int | None) -> list[ServedModel]:
    """The models of folders or of the hub, ready to reply, with the context that the memory holds for `rows` of each.

    Args:
        sources: Folders, adapters (served with their base) or models of the hub.
        runtime: Device and precision.
        rows: Replies at once.
        most: Tokens that prompt and reply may have together; None for all that the model has.

    Raises:
        ConfigError: Before weights are read, for a model that is named twice, a classifier, a pooling not built.
        CheckpointError: For a folder that cannot be served.
    """
    names = name_models(sources)
    checkpoints = [open_checkpoint(source, adapters=True) for source in sources]
    for checkpoint in checkpoints:
        _check_head(checkpoint)
    poolings = [read_pooling(checkpoint) for checkpoint in checkpoints]
    opened = [(_own(model), tokenizer) for model, tokenizer in (open_ready(c, runtime) for c in checkpoints)]
    device = opened[0][0].embed.weight.device
    free = free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    served = []
    for name, source, pooling, (model, tokenizer) in zip(names, sources, poolings, opened, strict=True):
        context = model.config.reach if most is None else min(most, model.config.reach)
        if free is not None and model.config.causal:
            each = slot_bytes(model.config, compute_dtype(model.embed.weight)) * rows
            fits = max(int(free * CACHE_SHARE / len(sources)) // each, LEAST_CONTEXT)
            if fits < context:
                model.notes.append(
                    f"{name}: {format_count(rows, 'reply', 'replies at once')} of {context:,} tokens "
                    f"{'does' if rows == 1 else 'do'} not fit into memory; the context is "
                    f"{fits:,} (--rows and --context change that)"
                )
                context = fits
        if model.config.head == "lm" and model.config.causal and tokenizer.chat_template is None:
            model.notes.append(f"{name}: has no chat template; /v1/completions and /v1/embeddings only")
        served.append(ServedModel(name, source, model, tokenizer, context, pooling))
    return served


def _own(model: ReadableModel) -> Transformer:
    """The model, where lapis runs it itself. Raises ConfigError for one of transformers, whose cache has no slots."""
    if not isinstance(model, Transformer):
        raise ConfigError(f"serve: a {model.config.family} model runs through transformers, which is not served here")
    return model


def _check_head(checkpoint: Checkpoint) -> None:
    """Raises ConfigError for a model, or an adapter, that neither writes nor gives vectors of texts."""
    config = read_config(checkpoint)
    own = head_of(checkpoint)[0] if checkpoint.adapter is not None else None
    if config.image is not None or (own or config.head) in ("classes", "scalar"):
        raise ConfigError(
            f"serve: {checkpoint.source} has the head of a classifier; serve a model that writes, or an encoder"
        )
