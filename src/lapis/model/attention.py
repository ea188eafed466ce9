"""Attention: projections with parameters around a core without any, and the mask that a forward pass shares.

AttentionCore holds no parameters, so one forward hook sees q, k, v and the mask in every family:
`module.register_forward_hook(lambda core, args, out: ...)` with args = (q_BHTE, k_BKSE, v_BKSE, mask, causal).
The same core does cross-attention: hand it keys and values that come from another sequence, and no causal mask.

Shapes: B batch, T time, S time of keys, D model dim, H heads, K heads of keys, E head dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import ModelConfig
from lapis.model.cache import Cache
from lapis.model.dense import dense_attention, prefers_dense
from lapis.model.norm import make_norm
from lapis.model.rope import rotate


class View(NamedTuple):
    """Who sees whom. mask: [B or 1, 1, T or 1, S], added to the scores (0, or very low); None hides nothing.

    causal: token t sees the keys 0 to t, which costs no mask; then mask is None.
    """

    mask: Tensor | None
    causal: bool


class Shared(NamedTuple):
    """What all layers of one forward pass share. near: the view of layers with a sliding window."""

    cos: Tensor | None
    sin: Tensor | None
    full: View
    near: View


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(E) + mask) v, without parameters (Vaswani et al. 2017, section 3.2.1)."""

    def forward(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The mixed values, [B, H, T, E]. H is a multiple of K: each key head serves H/K query heads (GQA)."""
        B, H, T, E = q_BHTE.shape
        K = k_BKSE.shape[1]
        if mask is not None and mask.dtype != q_BHTE.dtype:
            mask = mask.to(q_BHTE.dtype)
        if T == 1 and H != K:
            # one token: the heads that share a key are stacked along time, and no key is repeated
            folded = F.scaled_dot_product_attention(q_BHTE.reshape(B, K, H // K, E), k_BKSE, v_BKSE, attn_mask=mask)
            return folded.reshape(B, H, 1, E)
        if prefers_dense(q_BHTE, k_BKSE.shape[2]):
            return dense_attention(q_BHTE, k_BKSE, v_BKSE, mask, causal)
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, enable_gqa=H != K
        )

    @staticmethod
    def weights(q_BHTE: Tensor, k_BKSE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The attention weights that `forward` does not keep, [B, H, T, S] float32; for looking, not for speed."""
        G, T, S = q_BHTE.shape[1] // k_BKSE.shape[1], q_BHTE.shape[2], k_BKSE.shape[2]
        scores = q_BHTE.float() @ k_BKSE.float().repeat_interleave(G, 1).transpose(-1, -2)
        scores = scores * q_BHTE.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(), -torch.inf)
        if mask is not None:
            scores = scores + mask.float()
        weights: Tensor = scores.softmax(-1)
        return weights


class Attention(nn.Module):
    """Queries, keys and values of a sequence, mixed by the core and projected back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.near = config.windowed(layer)
        bias, out_bias = config.bias in ("qkv", "attention", "all"), config.bias in ("attention", "all")
        inner, inner_kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, inner, bias=bias)
        self.k = nn.Linear(config.dim, inner_kv, bias=bias)
        self.v = nn.Linear(config.dim, inner_kv, bias=bias)
        self.o = nn.Linear(inner, config.dim, bias=out_bias)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else None
        self.core = AttentionCore()

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHE = self.q(x_BTD).view(B, T, -1, self.head_dim)
        k_BTKE = self.k(x_BTD).view(B, T, -1, self.head_dim)
        v_BKTE = self.v(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        if shared.cos is not None and shared.sin is not None:
            q_BTHE, k_BTKE = rotate(q_BTHE, shared.cos, shared.sin), rotate(k_BTKE, shared.cos, shared.sin)
        q_BHTE, k_BKSE, v_BKSE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BKTE
        if cache is not None:
            k_BKSE, v_BKSE = cache.update(self.layer, k_BKSE, v_BKSE)
        mask, causal = shared.near if self.near else shared.full
        mixed_BHTE = self.core(q_BHTE, k_BKSE, v_BKSE, mask, causal)
        out_BTD: Tensor = self.o(mixed_BHTE.transpose(1, 2).reshape(B, T, -1))
        return out_BTD


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = sees) as numbers to add to the scores. The lowest finite number, not -inf, so that a row
    that sees nothing (padding) stays finite."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
