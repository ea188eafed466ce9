"""Where the differences that a graft adds come from: two opened models, or files of deltas (weights/delta/)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from lapis.checkpoint import Checkpoint
from lapis.text.tokenizer.vocabulary import Vocabulary, rows_for
from lapis.weights.engine.sources import RowsOf, Source, Stored
from lapis.weights.engine.tiles import Tile
from lapis.weights.matching import counterparts

Apply = Callable[[Tile, Any], tuple[torch.Tensor, torch.Tensor]]


class Differences(Protocol):
    """What one or several chat models learned, tensor by tensor, by the names that `onto` has.

    template: The tokens that only chatting gave a meaning. shared: Tokens whose rows have a difference; None where
    tokens cannot be told.
    """

    template: list[str]
    shared: set[str] | None

    def sources(self, name: str) -> tuple[Source, ...]:
        """What `apply` reads behind onto's tensor."""
        ...

    def token_rows(self, name: str, tokens: Sequence[str | None]) -> tuple[Source, ...]:
        """The same for a tensor of tokens, row by row; a row of None is zero."""
        ...

    def template_rows(self, name: str) -> tuple[Source, Mapping[str, int]]:
        """The first chat's own rows for the template's tokens, and which row each token has there."""
        ...

    def apply(self, scales: Sequence[float]) -> Apply:
        """The kernel onto + sum of scale * difference, for the tiles of onto and of `sources`."""
        ...


class ModelDifferences:
    """chat - base of opened models. The roles are onto, base, chat, chat2, ..."""

    def __init__(
        self, inputs: Mapping[str, Checkpoint], words: Mapping[str, Vocabulary | None], template: list[str]
    ) -> None:  # fmt: skip
        self._inputs, self._words, self.template = inputs, words, template
        self._roles = [role for role in inputs if role != "onto"]
        self._names = {role: counterparts(inputs["onto"], checkpoint) for role, checkpoint in inputs.items()}
        known = [None if (vocabulary := words[role]) is None else set(vocabulary.ids) for role in self._roles]
        self.shared = None if None in known else set.intersection(*(each for each in known if each is not None))

    def sources(self, name: str) -> tuple[Source, ...]:
        return tuple(self._stored(role, name) for role in self._roles)

    def token_rows(self, name: str, tokens: Sequence[str | None]) -> tuple[Source, ...]:
        listed = []
        for role in self._roles:
            vocabulary = self._words[role]
            assert vocabulary is not None
            listed.append(RowsOf(self._stored(role, name), rows_for(tokens, vocabulary)))
        return tuple(listed)

    def template_rows(self, name: str) -> tuple[Source, Mapping[str, int]]:
        vocabulary = self._words["chat"]
        assert vocabulary is not None
        return self._stored("chat", name), vocabulary.ids

    def apply(self, scales: Sequence[float]) -> Apply:
        return add_difference(scales)

    def _stored(self, role: str, name: str) -> Stored:
        return Stored(role, self._inputs[role], self._names[role][name])


def add_difference(scales: Sequence[float]) -> Apply:
    """The kernel onto + sum of scale * (chat - base), for inputs onto, base, chat, chat2, ... in float32."""
    first, *rest = scales

    def apply(tile: Tile, _state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        onto, base, chat, *more = tile.inputs
        delta = chat.sub_(base)
        if first != 1.0:
            delta.mul_(first)
        for other, scale in zip(more, rest, strict=True):
            delta.add_(other.sub_(base), alpha=scale)
        return torch.add(onto, delta, out=base), delta

    return apply
