"""Gemma 4's block: attention whose sizes depend on the layer, keys that later layers read, and vectors for each layer.

Shapes: B batch, T time, D model dim, H heads, E head dim, L layers, P numbers that a layer reads of a token, F
inner width of an expert, N tokens.
"""

from math import sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import MLP_KINDS, ModelConfig
from lapis.model.blocks.attention import Attention, Shared
from lapis.model.blocks.experts import MixtureOfExperts, Router, choose
from lapis.model.blocks.gemma3 import SandwichBlock
from lapis.model.blocks.norm import RMSNorm, make_norm
from lapis.model.blocks.rope import rotate
from lapis.model.blocks.stacked import StackedExperts, StackedLinear
from lapis.model.blocks.standard import ACTIVATIONS, Architecture, Mlp, times
from lapis.model.cache import Cache


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps): RMSNorm without a weight."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class UnevenAttention(Attention):
    """Attention with normed values. A layer that borrows has no k and v; one of k = v has no v (`Uneven`)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config.at(layer), layer)
        self.source, self.eps = config.keys_from(layer), config.norm_eps
        self.lends = any(config.keys_from(other) == layer for other in range(layer + 1, config.layers))
        self.borrows, own_v = config.borrows(layer), not config.keys_are_values(layer)
        if self.borrows:
            self.k = self.k_norm = None  # type: ignore[assignment]
        if self.borrows or not own_v:
            self.v = None  # type: ignore[assignment]

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        rotation = shared.near_rotation if self.near else shared.rotation
        assert rotation is not None and self.q_norm is not None
        q_BTHE = rotate(self.q_norm(self.q(x_BTD).view(B, T, -1, self.head_dim)), rotation)
        if self.borrows:
            assert shared.lent is not None
            k_BKSE, v_BKSE = shared.lent.of[self.source]
        else:
            assert self.k_norm is not None
            k_BTKE = self.k(x_BTD).view(B, T, -1, self.head_dim)
            v_BTKE = k_BTKE if self.v is None else self.v(x_BTD).view(k_BTKE.shape)
            k_BKSE = rotate(self.k_norm(k_BTKE), rotation).transpose(1, 2)
            v_BKSE = unit(v_BTKE, self.eps).transpose(1, 2)
            if cache is not None:
                k_BKSE, v_BKSE = cache.update(self.layer, k_BKSE, v_BKSE)
            if self.lends and shared.lent is not None:
                shared.lent.of[self.layer] = k_BKSE, v_BKSE
        mask, causal = shared.near if self.near else shared.full
        mixed_BHTE = self.core(q_BTHE.transpose(1, 2), k_BKSE, v_BKSE, mask, causal)
        out_BTD: Tensor = self.o(mixed_BHTE.transpose(1, 2).reshape(B, T, -1))
        return out_BTD


class ScaledRouter(Router):
    """Scores of a normed and scaled token, and what the weight of each expert is multiplied by once it is chosen."""

    starts: ClassVar = {"scale": 1.0, "gains": 1.0}

    def __init__(self, config: ModelConfig, count: int) -> None:
        super().__init__(config.dim, count)
        self.eps = config.norm_eps
        self.scale, self.gains = nn.Parameter(torch.empty(config.dim)), nn.Parameter(torch.empty(count))

    def forward(self, x_ND: Tensor) -> Tensor:
        return super().forward(unit(x_ND, self.eps) * self.scale * x_ND.shape[-1] ** -0.5)


class GatedExperts(StackedExperts):
    """All experts of a block, down(act(gate(x)) * up(x)) each; gate_up [X, 2 F, D] and down [X, D, F]."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        super().__init__()
        self.gate_up = StackedLinear(count, config.dim, 2 * config.ffn_dim)
        self.down = StackedLinear(count, config.ffn_dim, config.dim)
        self.act = ACTIVATIONS[MLP_KINDS[config.mlp][1]]

    def inner(self, both_N2F: Tensor) -> Tensor:
        gate_NF, up_NF = both_N2F.chunk(2, -1)
        return times(self.act(gate_NF), up_NF)


class MlpBesideExperts(MixtureOfExperts):
    """A mixture with an ordinary MLP (gate, up, down) beside it, whose sum the block makes.

    The router reads the token as it comes, the experts read it normed; `forward` is the mixture.
    """

    router: ScaledRouter

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        assert config.experts is not None
        self.settings = config.experts
        plain = Mlp(config, width=config.experts.dense_dim)
        assert plain.gate is not None
        self.gate, self.up, self.down, self.act = plain.gate, plain.up, plain.down, plain.act
        self.router = ScaledRouter(config, config.experts.count)
        self.experts = GatedExperts(config, config.experts.count)

    def plain(self, x_BTD: Tensor) -> Tensor:
        """What the ordinary MLP says."""
        out_BTD: Tensor = self.down(self.act(self.gate(x_BTD)) * self.up(x_BTD))
        return out_BTD

    def mixed(self, x_BTD: Tensor, normed_BTD: Tensor) -> Tensor:
        """What the chosen experts say of `normed_BTD`; `x_BTD` chooses."""
        weights_NK, chosen_NK = choose(self.router(x_BTD.flatten(0, -2)), self.settings)
        weights_NK = weights_NK * self.router.gains[chosen_NK]
        normed_ND = normed_BTD.flatten(0, -2)
        return self._mixed(normed_ND, weights_NK.to(normed_ND.dtype), chosen_NK).view(x_BTD.shape)


class LayerGate(nn.Module):
    """out(act(gate(x)) * inputs): how much of what this layer reads of a token goes to the stream, and as what."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(config.dim, width, bias=False), nn.Linear(width, config.dim, bias=False)
        self.act = ACTIVATIONS[MLP_KINDS[config.mlp][1]]

    def forward(self, x_BTD: Tensor, inputs_BTP: Tensor) -> Tensor:
        out_BTD: Tensor = self.out(self.act(self.gate(x_BTD)) * inputs_BTP)
        return out_BTD


class LayerEmbed(nn.Module):
    """(norm(project(x) / sqrt(D)) + sqrt(P) table[id]) / sqrt(2), P numbers for each layer, of which norm is over."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.layer_inputs is not None
        self.count, self.width = config.layers, config.layer_inputs.width
        self.weight = nn.Parameter(torch.empty(config.layer_inputs.vocab, config.layers * self.width))
        self.project = nn.Linear(config.dim, config.layers * self.width, bias=False)
        self.norm = RMSNorm(self.width, config.norm_eps)

    def forward(self, ids_BT: Tensor, x_BTD: Tensor) -> Tensor:
        scale = torch.tensor(sqrt(self.width), dtype=self.weight.dtype, device=self.weight.device)
        shape = (*ids_BT.shape, self.count, self.width)
        rows_BTLP = (F.embedding(ids_BT, self.weight) * scale).view(shape)
        projected = self.project(x_BTD) * x_BTD.shape[-1] ** -0.5
        inputs_BTLP: Tensor = (self.norm(projected.view(shape)) + rows_BTLP) * 2**-0.5
        return inputs_BTLP


class UnevenBlock(SandwichBlock):
    """Gemma 3's block with norms that multiply by their weight, then its inputs of the layer; all times `scale`.

    (Gemma 4 as published.) scale lies in the folder, and no training moves it.
    """

    starts: ClassVar = {"scale": 1.0}
    only_adds = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        more: tuple[str, ...] = ("mlp_dense", "experts", "experts_out") if config.experts is not None else ()
        more += ("inputs_out",) if config.layer_inputs is not None else ()
        mlp = MlpBesideExperts(config) if config.experts is not None else Mlp(config.at(layer))
        super().__init__(config, layer, make_norm, more, mlp)
        self.attn = UnevenAttention(config, layer)
        self.inputs = LayerGate(config, config.layer_inputs.width) if config.layer_inputs is not None else None
        self.scale = nn.Parameter(torch.empty(1))
        self.layer = layer

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        x_BTD = super().forward(x_BTD, shared, cache)
        if self.inputs is not None and shared.inputs_BTLP is not None:
            x_BTD = x_BTD + self.norm.inputs_out(self.inputs(x_BTD, shared.inputs_BTLP[..., self.layer, :]))
        return x_BTD * self.scale.detach().to(x_BTD.dtype)

    def fed(self, x_BTD: Tensor) -> Tensor:
        """What the MLP says, and the experts beside it where there are any, each normed."""
        norm, mlp = self.norm, self.mlp
        if not isinstance(mlp, MlpBesideExperts):
            return super().fed(x_BTD)
        plain_BTD: Tensor = norm.mlp_dense(mlp.plain(norm.mlp(x_BTD)))
        mixed_BTD: Tensor = norm.experts_out(mlp.mixed(x_BTD, norm.experts(x_BTD)))
        return plain_BTD + mixed_BTD


ARCHITECTURE = Architecture(UnevenBlock, make_norm, lambda config: sqrt(config.dim), LayerEmbed)
