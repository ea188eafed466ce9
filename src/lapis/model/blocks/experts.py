"""A block whose MLP is a mixture of experts: a router sends each token through a few of many MLPs.

Tokens are put in the order of their experts, so that each expert is one product over its own. Leaves out: the loss that
keeps the choices even (training/objectives/balance.py).

Shapes: B batch, T time, D model dim, N tokens, E experts, K experts of a token, R = N K rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.errors import ConfigError
from lapis.families.config import Experts, ModelConfig
from lapis.model.blocks.norm import compute_dtype
from lapis.model.blocks.standard import Architecture, Mlp, TransformerBlock


class Router(nn.Module):
    """Scores of each token, x W^T. It is no nn.Linear, so that an adapter over the MLP leaves choices as they are."""

    bias: nn.Parameter | None

    def __init__(self, dim: int, scores: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(scores, dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(scores)) if bias else None)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weight, self.bias)


class MixtureOfExperts(nn.Module):
    """sum over the K most probable experts of p_e(x) mlp_e(x), p = softmax(router(x)) (Shazeer et al. 2017,
    arXiv:1701.06538; softmax before the choice, as in Fedus et al. 2021, arXiv:2101.03961).

    With a shared expert, sigmoid(shared_gate(x)) shared(x) is added (Qwen2). stacked: makes all experts as one module,
    which gives them in their order; the router then has a bias.
    """

    def __init__(
        self, config: ModelConfig, stacked: Callable[[ModelConfig, int], nn.Module] | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        if config.experts is None:
            raise ConfigError(f"model: a {config.family} model has experts; give experts: {{count: 8, active: 2}}")
        self.settings: Experts = config.experts
        count = self.settings.count
        self.router = Router(config.dim, count, bias=stacked is not None)
        self.experts: Any = stacked(config, count) if stacked else nn.ModuleList(Mlp(config) for _ in range(count))
        shared_dim = self.settings.shared_dim
        self.shared = Mlp(config, width=shared_dim) if shared_dim else None
        self.shared_gate = Router(config.dim, 1) if shared_dim else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        weights_NK, chosen_NK = choose(self.router(x_ND), self.settings)
        out_ND = self._mixed(x_ND, weights_NK.to(x_ND.dtype), chosen_NK)
        if self.shared is not None and self.shared_gate is not None:
            out_ND = out_ND + torch.sigmoid(self.shared_gate(x_ND)) * self.shared(x_ND)
        return out_ND.view(x_BTD.shape)

    def _mixed(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """The weighted sum over the experts of each token.

        Where gradients are wanted, rows are gathered at once and an expert without tokens is computed too, so that it
        has a gradient of zeros. Elsewhere rows are gathered expert by expert, in memory that is still in the cache.
        """
        learns, active = torch.is_grad_enabled(), chosen_NK.shape[1]
        order_R = chosen_NK.flatten().argsort(stable=True)
        sizes = torch.bincount(chosen_NK.flatten(), minlength=len(self.experts)).tolist()
        tokens = list(torch.split(order_R // active, sizes))
        weights = list(torch.split(weights_NK.flatten()[order_R, None], sizes))
        if x_ND.device.type == "cpu" and compute_dtype(x_ND) == torch.bfloat16:
            for number, size in enumerate(sizes):
                more = few_shapes(size) - size
                tokens[number] = F.pad(tokens[number], (0, more))  # the first token, whose weight here is 0
                weights[number] = F.pad(weights[number], (0, 0, 0, more))
        padded = [len(numbers) for numbers in tokens]
        gathered = torch.split(x_ND.index_select(0, torch.cat(tokens)), padded) if learns else None
        out_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            if sizes[number] or learns:
                own = x_ND.index_select(0, tokens[number]) if gathered is None else gathered[number]
                real, mixed = slice(sizes[number]), expert(own, weights[number]).to(out_ND.dtype)
                out_ND.index_add_(0, tokens[number][real], mixed[real])
        return out_ND


def few_shapes(rows: int) -> int:
    """The rows that a product in bfloat16 is given: a power of two or a multiple of 64, as oneDNN keeps each kernel.

    Args:
        rows: That there are.
    """
    return min(rows, 1) << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def choose(logits_NE: Tensor, settings: Experts) -> tuple[Tensor, Tensor]:
    """The weights of the chosen experts of each token, float32 [N, K], and their numbers, int64 [N, K]."""
    weights_NK, chosen_NK = logits_NE.float().softmax(-1).topk(settings.active, dim=-1)
    return weights_NK / weights_NK.sum(-1, keepdim=True) if settings.normalized else weights_NK, chosen_NK


def mlp_of(config: ModelConfig, layer: int) -> nn.Module:
    """The mixture of a layer, or the ordinary MLP that it has instead."""
    if config.mixes_experts(layer):
        return MixtureOfExperts(config)
    return Mlp(config, width=config.experts.dense_dim if config.experts is not None else 0)


class ExpertsBlock(TransformerBlock):
    """The usual block, with a mixture in the place of its MLP where the layer has one."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        whole = config.experts is None  # then the mixture says what is missing
        super().__init__(config, layer, mlp=MixtureOfExperts(config) if whole else mlp_of(config, layer))


ARCHITECTURE = Architecture(ExpertsBlock)
