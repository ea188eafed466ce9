"""Qwen3-Next's and 3.5's blocks: attention with a gate on its output, or a gated delta net, with a state of fixed size.

A delta net computes a chunk of tokens at a time; a single token with a state is a chunk of one, so training, reading a
prompt and generating are one function. Its state is in float32.

Shapes: B batch, T time, D model dim, H heads of keys, V heads of values, E their head dims, C channels, K kernel,
N tokens of a chunk.
"""

from math import log
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.errors import ConfigError
from lapis.families.config import Delta, ModelConfig
from lapis.model.blocks.attention import Attention, Shared
from lapis.model.blocks.experts import mlp_of
from lapis.model.blocks.gemma3 import make_offset_norm
from lapis.model.blocks.norm import RMSNorm
from lapis.model.blocks.standard import Architecture, TransformerBlock
from lapis.model.cache import Cache

EPS = 1e-6  # of the lengths that queries and keys are divided by


class GatedAttention(Attention):
    """Attention whose mixed values are multiplied by sigmoid(gate(x)) (Qwen Team 2025, arXiv:2505.06708)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, make_offset_norm)
        self.gate = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)

    def gated(self, mixed_BTX: Tensor, x_BTD: Tensor) -> Tensor:
        return mixed_BTX * torch.sigmoid(self.gate(x_BTD))


class Convolution(nn.Module):
    """Each channel over the last K tokens, itself included. weight: [C, 1, K]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))

    def forward(self, x_BCT: Tensor) -> Tensor:
        return F.conv1d(x_BCT, self.weight, groups=len(self.weight))


class DeltaNet(nn.Module):
    """S_t = exp(g_t) S_{t-1} + k_t (b_t (v_t - exp(g_t) S_{t-1}^T k_t))^T, o_t = S_t^T q_t: the gated delta rule.

    (Yang et al. 2024, arXiv:2412.06464.) Queries, keys and values go through a short convolution first, and what comes
    out is normed and multiplied by silu(gate(x)).
    """

    starts: ClassVar = {"steps": 1.0, "rates": log(4.0)}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if config.delta is None:
            raise ConfigError(f"model: a {config.family} model has layers of a delta net; give delta")
        self.layer, self.settings = layer, config.delta
        delta = self.settings
        self.qkv = nn.Linear(config.dim, delta.channels, bias=False)
        self.gate = nn.Linear(config.dim, delta.values, bias=False)
        self.beta = nn.Linear(config.dim, delta.value_heads, bias=False)
        self.decay = nn.Linear(config.dim, delta.value_heads, bias=False)
        self.conv = Convolution(delta.channels, delta.kernel)
        self.steps = nn.Parameter(torch.empty(delta.value_heads))
        self.rates = nn.Parameter(torch.empty(delta.value_heads))
        self.norm = RMSNorm(delta.value_dim, config.norm_eps)
        self.o = nn.Linear(delta.values, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None) -> Tensor:
        if shared.segments_BT is not None:
            return self._by_segment(x_BTD, shared.segments_BT)
        return self._of_rows(x_BTD, shared.real_BT, cache)

    def _of_rows(self, x_BTD: Tensor, real_BT: Tensor | None, cache: Cache | None) -> Tensor:
        """Each row one text. What is padding is 0 to the convolution and leaves the state as it is."""
        B, T, _ = x_BTD.shape
        delta = self.settings
        if real_BT is not None:
            x_BTD = x_BTD * real_BT[..., None]
        past_BCK, state_BVEE = (None, None) if cache is None else cache.state(self.layer)
        mixed_BCT = self.qkv(x_BTD).transpose(1, 2)
        if past_BCK is None:
            past_BCK = mixed_BCT.new_zeros(B, delta.channels, delta.kernel - 1)
        mixed_BCT = torch.cat((past_BCK.to(mixed_BCT.dtype), mixed_BCT), 2)
        seen_BTC = F.silu(self.conv(mixed_BCT)).transpose(1, 2)
        keys = delta.heads * delta.head_dim
        parts = torch.split(seen_BTC, [keys, keys, delta.values], -1)
        widths = (delta.head_dim, delta.head_dim, delta.value_dim)
        q, k, v = (
            part.view(B, T, -1, width).transpose(1, 2).float() for part, width in zip(parts, widths, strict=True)
        )
        repeats = delta.value_heads // delta.heads
        q, k = (_unit(part).repeat_interleave(repeats, 1) for part in (q, k))
        beta_BTV = self.beta(x_BTD).sigmoid().float()
        decay_BTV = -self.rates.float().exp() * F.softplus(self.decay(x_BTD).float() + self.steps)
        if real_BT is not None:
            beta_BTV, decay_BTV = beta_BTV * real_BT[..., None], decay_BTV * real_BT[..., None]
        if state_BVEE is None:
            state_BVEE = q.new_zeros(B, delta.value_heads, delta.head_dim, delta.value_dim)
        out_BVTE, state_BVEE = gated_delta_rule(
            q * delta.head_dim**-0.5, k, v, decay_BTV.transpose(1, 2), beta_BTV.transpose(1, 2), state_BVEE
        )
        if cache is not None:
            cache.keep(self.layer, mixed_BCT[:, :, T:], state_BVEE)
        normed_BTVE = self.norm(out_BVTE.transpose(1, 2).to(x_BTD.dtype))
        gate_BTVE = self.gate(x_BTD).view(normed_BTVE.shape).float()
        out_BTD: Tensor = self.o((normed_BTVE * F.silu(gate_BTVE)).to(x_BTD.dtype).flatten(2))
        return out_BTD

    def _by_segment(self, x_BTD: Tensor, segments_BT: Tensor) -> Tensor:
        """Each segment as a row of its own, and back."""
        begins = torch.ones_like(segments_BT, dtype=torch.bool)
        begins[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        rows_M = begins.flatten().cumsum(0) - 1
        sizes_N = torch.bincount(rows_M)
        firsts_N = sizes_N.cumsum(0) - sizes_N
        places_M = torch.arange(len(rows_M), device=rows_M.device) - firsts_N[rows_M]
        alone = x_BTD.new_zeros(len(sizes_N), int(sizes_N.max()), x_BTD.shape[-1])
        alone = alone.index_put((rows_M, places_M), x_BTD.flatten(0, 1))
        return self._of_rows(alone, None, None)[rows_M, places_M].view(x_BTD.shape)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def gated_delta_rule(
    q_BVTE: Tensor, k_BVTE: Tensor, v_BVTE: Tensor, decay_BVT: Tensor, beta_BVT: Tensor, state_BVEE: Tensor
) -> tuple[Tensor, Tensor]:
    """What each token reads of the state that all tokens up to it have written to, and the last state.

    In a chunk the corrections that its tokens write depend on each other along a triangle, which is solved at once
    (arXiv:2412.06464, section 3.3).

    Args:
        q_BVTE: Queries, float32, as all else.
        k_BVTE: Keys of length 1.
        v_BVTE: Values.
        decay_BVT: Logarithm of what the state is multiplied by, 0 or below.
        beta_BVT: How much of a correction is written, 0 to 1.
        state_BVEE: Before the first token; rows for keys, columns for values.
    """
    out = []
    for first in range(0, q_BVTE.shape[2], Delta.CHUNK):
        part = slice(first, first + Delta.CHUNK)
        q, k, v, beta = q_BVTE[:, :, part], k_BVTE[:, :, part], v_BVTE[:, :, part], beta_BVT[:, :, part, None]
        sums_BVN = decay_BVT[:, :, part].cumsum(2)
        since_BVN1 = sums_BVN.exp()[..., None]
        later = torch.ones(sums_BVN.shape[2], sums_BVN.shape[2], dtype=torch.bool, device=q.device).triu(1)
        between = (sums_BVN[..., :, None] - sums_BVN[..., None, :]).masked_fill(later, -torch.inf).exp()
        errors = beta * (v - since_BVN1 * (k @ state_BVEE))
        written = torch.linalg.solve_triangular(
            beta * (k @ k.transpose(-1, -2)) * between, errors, upper=False, unitriangular=True
        )
        out.append(since_BVN1 * (q @ state_BVEE) + (q @ k.transpose(-1, -2) * between) @ written)
        left = (sums_BVN[..., -1:] - sums_BVN).exp()[..., None]
        state_BVEE = since_BVN1[:, :, -1:] * state_BVEE + (k * left).transpose(-1, -2) @ written
    return torch.cat(out, 2), state_BVEE


class DeltaBlock(TransformerBlock):
    """x + mixer(norm(x)), then the same with the MLP or experts; the mixer is `delta` or `attn`, by the layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, make_offset_norm, mlp=mlp_of(config, layer))
        self.linear = config.delta is not None and layer in config.delta.layers
        if self.linear:
            del self.attn
            self.delta = DeltaNet(config, layer)
        else:
            self.attn = GatedAttention(config, layer)

    @property
    def mixer(self) -> nn.Module:
        """What mixes the tokens in this layer."""
        return self.delta if self.linear else self.attn

    @property
    def added(self) -> tuple[nn.Module, nn.Module]:
        return self.mixer, self.mlp

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        x_BTD = x_BTD + self._dropped(self.mixer(self.norm.attn(x_BTD), shared, cache))
        return x_BTD + self._dropped(self.mlp(self.norm.mlp(x_BTD)))


ARCHITECTURE = Architecture(DeltaBlock, make_offset_norm)
