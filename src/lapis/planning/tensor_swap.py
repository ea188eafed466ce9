"""One model in memory, whose tensors can be set to base's, to chat's, or to anything on the line between them.

Nothing is added and subtracted again: a tensor is read anew from its checkpoint, so what was put in is taken out
without a trace. At most one tensor of each model is held beside the model, large ones by rows. The rows of the chat
template's tokens are chat's from the start, as in a graft. Leaves out measuring.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.families.shapes import SAME
from lapis.model.check import plan_load
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.weights.matching import counterparts, is_vocabulary

Side = Literal["home", "chat"]
CHUNK = 1 << 22  # elements of a large tensor that are mixed at a time


class Bench:
    """The model of `home` (base itself, or a continuation of it), loaded; differences are chat - base.

    template: rows of home -> rows of chat that they are throughout. model: the Transformer, in float32.
    """

    def __init__(
        self, home: Checkpoint, base: Checkpoint, chat: Checkpoint, template: Mapping[int, int] | None = None
    ) -> None:
        self.home, self.base, self.chat = home, base, chat
        self.template = dict(template or {})
        self._names = {"base": counterparts(home, base), "chat": counterparts(home, chat)}
        self._targets = {name: (rule, targets) for name, rule, targets in plan_load(home).steps}
        self.model: Transformer = load(home, torch.float32)
        self.model.requires_grad_(False)
        self._parameters = dict(self.model.named_parameters())
        self.vocabulary = [name for name in self._targets if is_vocabulary(home.part(name))]
        for name in self.vocabulary:
            self.put([name], "home")

    def movable(self, name: str) -> bool:
        """Whether a tensor of home has a place in the model and a difference to add."""
        return name in self._targets and all(name in names for names in self._names.values())

    def parameters(self, name: str) -> list[tuple[str, Tensor]]:
        """The parameters of the model that a tensor on disk fills, by name."""
        return [(target, self._parameters[target]) for target in self._targets[name][1]]

    @torch.no_grad()
    def put(self, names: Iterable[str], side: Side, scale: float = 1.0) -> None:
        """Sets tensors to home's, or to home + scale * (chat - base); with scale 1 and home = base that is chat's."""
        for name in names:
            if not self.movable(name):
                continue
            rule, targets = self._targets[name]
            elements = self.home.info(name).elements
            if rule.transform is SAME and elements > CHUNK:
                flat = self._parameters[targets[0]].view(-1)
                for first in range(0, elements, CHUNK):
                    last = min(first + CHUNK, elements)
                    flat[first:last] = self._mixed(name, side, scale, first, last)
            else:
                whole = self._mixed(name, side, scale, 0, elements).view(self.home.info(name).shape)
                for target, value in zip(targets, rule.transform.apply(whole, self._shapes(targets)), strict=True):
                    self._parameters[target].copy_(value)
            if name in self.vocabulary:
                self._put_template(name)

    @torch.no_grad()
    def difference(self, name: str) -> tuple[Tensor, ...]:
        """chat - base, float32, in the shapes of the parameters that the tensor fills; 0 in the template's rows."""
        rule, targets = self._targets[name]
        delta = self._delta(name, 0, self.home.info(name).elements).view(self.home.info(name).shape)
        if name in self.vocabulary:
            delta[list(self.template)] = 0
        return rule.transform.apply(delta, self._shapes(targets))

    def _shapes(self, targets: tuple[str, ...]) -> list[tuple[int, ...]]:
        return [tuple(self._parameters[target].shape) for target in targets]

    def _mixed(self, name: str, side: Side, scale: float, first: int, last: int) -> Tensor:
        if side == "chat" and scale == 1.0 and self.home is self.base:
            return self.chat.read_range(self._names["chat"][name], first, last).float()
        own = self.home.read_range(name, first, last).float()
        return own if side == "home" else own.add_(self._delta(name, first, last), alpha=scale)

    def _delta(self, name: str, first: int, last: int) -> Tensor:
        chat = self.chat.read_range(self._names["chat"][name], first, last).float()
        return chat.sub_(self.base.read_range(self._names["base"][name], first, last).float())

    def _put_template(self, name: str) -> None:
        (target,) = self._targets[name][1]
        for row, other in self.template.items():
            self._parameters[target][row] = self.chat.read_rows(self._names["chat"][name], other, other + 1)[0].float()
