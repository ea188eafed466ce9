"""The balance loss of mixtures of experts, added to any objective's (Fedus et al. 2021, arXiv:2101.03961, section 2.2).

Without it a router learns to choose the same few experts again and again. A micro-batch has one such loss, over all
layers and real tokens together, as in transformers; it is weighted by what the micro-batch supervises.

Shapes: B batch, T time, N tokens, E experts, K experts of a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapis.model.blocks.experts import MixtureOfExperts, Router, choose
from lapis.model.transformer import Transformer


@dataclass(frozen=True)
class Choices:
    """What one router gave in one forward pass. real_N: False = padding; None where there is none."""

    mixture: MixtureOfExperts
    logits_NE: Tensor
    real_N: Tensor | None


def coefficient(model: Transformer) -> float:
    """What the balance loss is multiplied by; 0 for a model without experts."""
    return model.config.experts.balance if model.config.experts is not None else 0.0


@contextmanager
def watched_choices(model: Transformer) -> Iterator[list[Choices]]:
    """While inside, what the routers give is added to a list, where it has gradients and the model wants the loss."""
    choices: list[Choices] = []
    real_N: Tensor | None = None

    def before_block(block: nn.Module, inputs: Any) -> None:
        nonlocal real_N
        real_BT = inputs[1].real_BT
        real_N = None if real_BT is None else real_BT.flatten()

    def note(mixture: MixtureOfExperts, logits_NE: Tensor) -> None:
        if logits_NE.requires_grad:
            choices.append(Choices(mixture, logits_NE, real_N))

    handles = []
    if coefficient(model):
        for block in model.blocks:
            handles.append(block.register_forward_pre_hook(before_block))
            mixture = block.mlp
            if not isinstance(mixture, MixtureOfExperts):  # of a layer with an ordinary MLP
                continue
            assert isinstance(mixture.router, Router)
            handles.append(
                mixture.router.register_forward_hook(lambda _, inputs, logits, own=mixture: note(own, logits))
            )
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(choices: list[Choices]) -> Tensor:
    """E times the sum over experts of (share of tokens that chose it) (its mean probability); K where all is even."""
    chosen_E: Tensor | float = 0.0
    probable_E: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    for each in choices:
        _, chosen_NK = choose(each.logits_NE, each.mixture.settings)
        real_N = torch.ones_like(chosen_NK[:, 0]) if each.real_N is None else each.real_N
        weight_N = real_N.to(torch.float32)
        E, K = each.logits_NE.shape[1], chosen_NK.shape[1]
        counts_E = torch.zeros(E, device=weight_N.device)
        chosen_E = chosen_E + counts_E.scatter_add_(0, chosen_NK.flatten(), weight_N.repeat_interleave(K))
        probable_E = probable_E + (each.logits_NE.float().softmax(-1) * weight_N[:, None]).sum(0)
        tokens = tokens + weight_N.sum()
    assert isinstance(chosen_E, Tensor) and isinstance(probable_E, Tensor)
    return len(chosen_E) * (chosen_E * probable_E).sum() / tokens**2
