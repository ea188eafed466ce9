"""A running average of the weights, which is often better than the last of them (Polyak and Juditsky 1992).

Leaves out: averages of several lengths, averaging of checkpoints after the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """average <- decay * average + (1 - decay) * weights after each step, in float32, of what is trained.

    The decay starts at 1/10 and rises to `decay`, so that the random beginning is soon forgotten. With decay 0 there is
    no average, and every method is idle.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.tensors: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after update number `step` (1, 2, ...)."""
        if not self.decay:
            return
        share = 1 - min(self.decay, step / (step + 9))
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter.float(), share)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from saved tensors."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the model has the average's weights."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(own[name])

    @torch.no_grad()
    def put(self) -> None:
        """The model gets the average's weights, to keep."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.tensors[name])
