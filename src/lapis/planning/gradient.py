"""Gradient x difference: what the losses say of every tensor's change without making it.

One backward pass over the exam gives for each tensor the dot product of the loss's gradient with chat - base (how the
loss changes, to first order, when the difference is added) and the squared length of the gradient (how much the loss
would have of moving there). A gradient is used as soon as it is there and let go, so that beside the model there is one
tensor's gradient and one tensor's difference.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lapis.planning.measure import Batch
from lapis.planning.tensor_swap import Bench

Dots = dict[str, dict[str, float]]  # tensor -> "chats" and "text" -> figure


class Gradients:
    """Sums over an exam, by tensor on disk. dots: gradient . difference. squares: |gradient|^2, summed by batch."""

    def __init__(self, bench: Bench, names: Iterable[str]) -> None:
        self.bench = bench
        self.dots: Dots = {}
        self.squares: Dots = {}
        self._owner: dict[str, tuple[str, int]] = {}
        self._names = [name for name in names if bench.movable(name)]
        for name in self._names:
            for i, (target, _) in enumerate(bench.parameters(name)):
                self._owner[target] = name, i

    def run(self, batches: Iterable[Batch], weights: dict[str, float] | None = None) -> dict[str, float]:
        """Backward passes over batches; the loss of each kind is its mean over tokens times its weight (1)."""
        batches = [batch for batch in batches if len(batch.rows_R)]
        counts: dict[str, int] = {}
        for batch in batches:
            counts[batch.kind] = counts.get(batch.kind, 0) + len(batch.rows_R)
        losses: dict[str, float] = {}
        handles: list[Any] = []
        kind = ""

        def hook(target: str) -> Any:
            def take(parameter: Tensor) -> None:
                self._take(target, parameter, kind)

            return take

        try:
            for name in self._names:
                for target, parameter in self.bench.parameters(name):
                    parameter.requires_grad_(True)
                    added = parameter.register_post_accumulate_grad_hook(hook(target))  # type: ignore[no-untyped-call]
                    handles.append(added)
            for batch in batches:
                kind = batch.kind
                loss = self._loss(batch) / counts[kind]
                losses[kind] = losses.get(kind, 0.0) + float(loss.detach())
                (loss * (weights or {}).get(kind, 1.0)).backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
            self.bench.model.requires_grad_(False)
        return losses

    def _loss(self, batch: Batch) -> Tensor:
        hidden_BTD = self.bench.model.hidden(batch.ids_BT)
        logits_RV = self.bench.model.head(hidden_BTD[batch.rows_R, batch.places_R]).float()
        return nn.functional.cross_entropy(logits_RV, batch.targets_R, reduction="sum")

    def _take(self, target: str, parameter: Tensor, kind: str) -> None:
        assert parameter.grad is not None
        name, place = self._owner[target]
        difference = self.bench.difference(name)[place]
        for table, value in (
            (self.dots, torch.sum(parameter.grad * difference, dtype=torch.float64)),
            (self.squares, torch.sum(parameter.grad**2, dtype=torch.float64)),
        ):
            row = table.setdefault(name, {})
            row[kind] = row.get(kind, 0.0) + float(value)
        parameter.grad = None
