"""Apertus' block: the usual one, with xIELU in its MLP.

Shapes: B batch, T time, D model dim.
"""

from math import expm1, log
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import ModelConfig
from lapis.model.blocks.standard import Architecture, Mlp, TransformerBlock

BETA, EPS, ALPHA = 0.5, -1e-6, 0.8


class Xielu(nn.Module):
    """A parabola above 0, an exponential below (Huang and Schlag 2024, arXiv:2411.13010).

    alpha_p and alpha_n bend the two sides. beta and eps lie in the folder too, and no training moves them.
    """

    starts: ClassVar = {"alpha_p": log(expm1(ALPHA)), "alpha_n": log(expm1(ALPHA - BETA)), "beta": BETA, "eps": EPS}

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        self.beta, self.eps = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        beta, eps = self.beta.detach(), self.eps.detach()
        above, below = F.softplus(self.alpha_p), beta + F.softplus(self.alpha_n)
        return torch.where(x > 0, above * x * x + beta * x, (torch.expm1(torch.minimum(x, eps)) - x) * below + beta * x)


class ApertusBlock(TransformerBlock):
    """The usual block; its MLP is down(xIELU(up(x)))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, mlp=Mlp(config, Xielu()))


ARCHITECTURE = Architecture(ApertusBlock)
