"""What generation, evaluation and the lens ask of a model: hidden states, a head, a cache, a few facts of its shape.

lapis' own Transformer gives it, and a model of transformers does behind the same face (outside.py). What trains, saves
or changes weights asks for a Transformer.

Shapes: B batch, T time, D model dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lapis.families.config import Head, Image


class Outline(Protocol):
    """The facts of a model's shape that a reader needs; a ModelConfig has them, and more."""

    @property
    def family(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def reach(self) -> int: ...
    @property
    def causal(self) -> bool: ...
    @property
    def head(self) -> Head: ...
    @property
    def image(self) -> Image | None: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...


class TokenCache(Protocol):
    """What a model has read of some rows of tokens, so that the next step reads only what is new."""

    @property
    def length(self) -> int: ...

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order; int64."""

    def truncate(self, length: int) -> None:
        """Forgets all but the first tokens. Raises ValueError where that cannot be done."""


class ReadableModel(nn.Module, ABC):
    """A model that can be run and looked into.

    Attributes:
        config: Its shape.
        head: From hidden states of any leading shape to logits.
        blocks: What `start` gives goes through them, one by one, to `end`. Empty where a model is not entered between
            its layers, and `end` does it all.
        notes: What loading had to say.
        generation: generation_config.json of the folder.
    """

    config: Outline
    head: nn.Module
    blocks: nn.ModuleList
    notes: list[str]
    generation: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def hidden(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None, types_BT: Tensor | None = None, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """The last hidden state, [B, T, D], which the head reads; the arguments are those of `Transformer.forward`."""

    @abstractmethod
    def start(self, ids_BT: Tensor) -> tuple[Tensor, Any]:
        """What the first of `blocks` is given, and what all of them are given beside it."""

    @abstractmethod
    def end(self, x_BTD: Tensor) -> Tensor:
        """The last hidden state, [B, T, D], from what left the last of `blocks`."""

    @abstractmethod
    def new_cache(self, batch: int, room: int) -> TokenCache:
        """An empty cache for `batch` rows, which begins with room for `room` tokens of each."""
