"""Attention: projections with parameters around a core without any, and the mask that a forward pass shares.

AttentionCore holds no parameters, so one forward hook sees q, k, v and the mask in every family:
`module.register_forward_hook(lambda core, args, out: ...)` with args = (q_BHTE, k_BKSE, v_BKSE, mask, causal).
The same core does cross-attention: hand it keys and values that come from another sequence, and no causal mask.

Shapes: B batch, T time, S time of keys, D model dim, H heads, K heads of keys, G = H / K, E head dim.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import ModelConfig
from lapis.model.blocks.norm import Norm, make_norm
from lapis.model.blocks.rope import Rotation, rotate
from lapis.model.cache import Cache


class View(NamedTuple):
    """Who sees whom. mask: [B or 1, 1, T or 1, S], added to the scores (0, or very low); None hides nothing.

    causal: token t sees the keys 0 to t, which costs no mask; then mask is None.
    """

    mask: Tensor | None
    causal: bool


class LentKeys:
    """Keys and values of layers that later ones read: layer -> both, [B, K, S, E]. (FSDP copies plain containers.)"""

    def __init__(self) -> None:
        self.of: dict[int, tuple[Tensor, Tensor]] = {}


class Shared(NamedTuple):
    """What all layers of one forward pass share.

    near, near_rotation: of the layers with a sliding window. query_gain: [..., T, 1, 1], by position. real_BT: False =
    padding; None where there is none. segments_BT: int64, whose tokens do not see those of others; None = one of each.
    lent: what some layers read of others. inputs_BTLP: what each layer reads of the tokens, P numbers for each of L.
    """

    full: View
    near: View
    rotation: Rotation | None = None
    near_rotation: Rotation | None = None
    query_gain: Tensor | None = None
    real_BT: Tensor | None = None
    segments_BT: Tensor | None = None
    lent: LentKeys | None = None
    inputs_BTLP: Tensor | None = None


class AttentionCore(nn.Module):
    """softmax(scale * q k^T + mask) v, without parameters (Vaswani et al. 2017, section 3.2.1).

    cap: scores are cap tanh(score / cap) before the mask; 0 = as they are (Gemma Team 2024, arXiv:2408.00118).
    """

    def __init__(self, scale: float, cap: float = 0.0) -> None:
        super().__init__()
        self.scale, self.cap = scale, cap

    @property
    def sinks(self) -> Tensor | None:
        """A score of each head, [H], that takes part in the softmax and has no value; None where there is none."""
        return None

    def forward(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The mixed values, [B, H, T, E]. H is a multiple of K: each key head serves H/K query heads (GQA)."""
        B, H, T, E = q_BHTE.shape
        K = k_BKSE.shape[1]
        if mask is not None and mask.dtype != q_BHTE.dtype:
            mask = mask.to(q_BHTE.dtype)
        if self.cap or self.sinks is not None:
            return capped_attention(q_BHTE, k_BKSE, v_BKSE, mask, causal, self.scale, self.cap, self.sinks)
        if T == 1 and H != K:
            # one token: the heads that share a key are stacked along time, and no key is repeated
            folded = F.scaled_dot_product_attention(
                q_BHTE.reshape(B, K, H // K, E), k_BKSE, v_BKSE, attn_mask=mask, scale=self.scale
            )
            return folded.reshape(B, H, 1, E)
        if prefers_dense(q_BHTE, k_BKSE.shape[2]):
            return dense_attention(q_BHTE, k_BKSE, v_BKSE, mask, causal, self.scale)
        if prefers_blocks(q_BHTE, k_BKSE, v_BKSE):
            return blocked_attention(q_BHTE, k_BKSE, v_BKSE, mask, causal, self.scale)
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=H != K
        )

    def scores(self, q_BHTE: Tensor, k_BKSE: Tensor) -> Tensor:
        """scale * q k^T, capped, before any mask, [B, H, T, S] float32; for looking, not for speed."""
        G = q_BHTE.shape[1] // k_BKSE.shape[1]
        return capped(q_BHTE.float() @ k_BKSE.float().repeat_interleave(G, 1).transpose(-1, -2) * self.scale, self.cap)

    def weights(self, q_BHTE: Tensor, k_BKSE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The attention weights that `forward` does not keep, [B, H, T, S] float32; for looking, not for speed."""
        scores, T, S = self.scores(q_BHTE, k_BKSE), q_BHTE.shape[2], k_BKSE.shape[2]
        if causal:
            scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(), -torch.inf)
        if mask is not None:
            scores = scores + mask.float()
        return softmax_beside(scores, None if self.sinks is None else self.sinks.float())


class Attention(nn.Module):
    """Queries, keys and values of a sequence, mixed by the core and projected back. norm: makes q_norm and k_norm."""

    def __init__(self, config: ModelConfig, layer: int, norm: Callable[[ModelConfig, int], Norm] = make_norm) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.near, self.turns = config.windowed(layer), layer not in config.nope_layers
        self.normed_whole = config.qk_norm_over == "all"
        self.turns_halves = config.rope.share == 1 and not config.rope.neighbors
        bias, out_bias = config.bias in ("qkv", "attention", "all"), config.bias in ("attention", "all")
        inner, inner_kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, inner, bias=bias)
        self.k = nn.Linear(config.dim, inner_kv, bias=bias)
        self.v = nn.Linear(config.dim, inner_kv, bias=bias)
        self.o = nn.Linear(inner, config.dim, bias=out_bias)
        widths = (inner, inner_kv) if self.normed_whole else (config.head_dim, config.head_dim)
        self.q_norm, self.k_norm = (norm(config, width) if config.qk_norm else None for width in widths)
        self.core = AttentionCore(config.attention_scale, config.attention_cap)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, E], keys and values [B, T, K, E], neither normed nor turned."""
        B, T, _ = x_BTD.shape
        q, k, v = (linear(x_BTD).view(B, T, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHE, k_BTKE, v_BTKE = self.project(x_BTD)
        if self.q_norm is not None and self.k_norm is not None:
            if self.normed_whole:
                q_BTHE = self.q_norm(q_BTHE.flatten(2)).view(B, T, -1, self.head_dim)
                k_BTKE = self.k_norm(k_BTKE.flatten(2)).view(B, T, -1, self.head_dim)
            else:
                q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        rotation = shared.near_rotation if self.near else shared.rotation
        if rotation is not None and self.turns:
            q_BTHE, k_BTKE = rotate(q_BTHE, rotation), rotate(k_BTKE, rotation)
        if shared.query_gain is not None:
            q_BTHE = q_BTHE * shared.query_gain
        q_BHTE, k_BKSE, v_BKSE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
        if cache is not None:
            k_BKSE, v_BKSE = cache.update(self.layer, k_BKSE, v_BKSE)
        mask, causal = shared.near if self.near else shared.full
        mixed_BHTE = self.core(q_BHTE, k_BKSE, v_BKSE, mask, causal)
        out_BTD: Tensor = self.o(self.gated(mixed_BHTE.transpose(1, 2).reshape(B, T, -1), x_BTD))
        return out_BTD

    def gated(self, mixed_BTX: Tensor, x_BTD: Tensor) -> Tensor:
        """What is projected back, [B, T, H E]; most families gate nothing."""
        return mixed_BTX


def capped(scores: Tensor, cap: float) -> Tensor:
    """cap tanh(scores / cap); the scores themselves where the cap is 0."""
    return cap * torch.tanh(scores / cap) if cap else scores


def capped_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool, scale: float, cap: float,
    sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(cap tanh(scale * q k^T / cap) + mask) v; QUERIES queries of a row at a time, softmax in float32.

    Args:
        q_BHTE: Queries; the arguments are those of `dense_attention`.
        k_BKSE: Keys.
        v_BKSE: Values.
        mask: Added to the scores, [1 or B, 1, 1 or T, S]; None hides nothing.
        causal: A token's later keys are hidden, and there is no mask.
        scale: Factor on the scores.
        cap: Above 0; 0 = scores as they are.
        sinks_H: As AttentionCore.sinks.
    """
    T, S, G = q_BHTE.shape[2], k_BKSE.shape[2], q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHES, v_BHSE = k_BKSE.repeat_interleave(G, 1).transpose(-1, -2), v_BKSE.repeat_interleave(G, 1)
    mixed = []
    for first in range(0, T, QUERIES):
        last = min(first + QUERIES, T)
        keys = last if causal else S
        scores = capped(q_BHTE[:, :, first:last] @ k_BHES[..., :keys] * scale, cap)
        if causal:
            scores = scores + triangle(last, scores.dtype, scores.device)[first:]
        elif mask is not None:
            scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, first:last])
        weights = softmax_beside(scores, sinks_H).to(v_BHSE.dtype)
        mixed.append(weights @ v_BHSE[:, :, :keys])
    return torch.cat(mixed, 2)


def softmax_beside(scores: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Weights over the keys, float32; they sum to less than 1 where a sink takes its share.

    Args:
        scores: [B, H, T, S].
        sinks_H: One more score of each head; None = none.
    """
    if sinks_H is None:
        return scores.softmax(-1, dtype=torch.float32)
    sinks = sinks_H.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), -1).softmax(-1, dtype=torch.float32)[..., :-1]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers to add to the scores.

    Args:
        seen: True = sees.
        dtype: Of the scores.

    Returns:
        0, or the lowest finite number, not -inf, so that a row that sees nothing (padding) stays finite.
    """
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


MOST_SCORES = 1 << 24  # that one layer keeps for the backward pass; beyond it SDPA needs less memory and is as fast


def prefers_dense(q_BHTE: Tensor, keys: int) -> bool:
    """Whether this training step's attention is faster with its scores written out."""
    if not (q_BHTE.requires_grad and q_BHTE.dtype == torch.bfloat16 and q_BHTE.device.type == "cpu"):
        return False
    B, H, T, _ = q_BHTE.shape
    return T > 1 and B * H * T * keys <= MOST_SCORES


def dense_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """softmax(scale * q k^T + mask) v with its scores written out; they are rounded to the input's dtype.

    Two batched products and a softmax, with the backward pass that follows from them. On a CPU with products in
    bfloat16 this takes a third to a half of the time of torch's fused attention, and a mask costs nothing more, at the
    price of keeping one weight for each pair of tokens.

    Args:
        q_BHTE: Queries; the legend of the letters is at the top.
        k_BKSE: Keys.
        v_BKSE: Values.
        mask: Added to the scores, [1 or B, 1, 1 or T, S]; None hides nothing.
        causal: A token's later keys are hidden, and there is no mask.
        scale: Factor on the scores.

    Returns:
        [B, H, T, E], in the dtype of the queries.
    """
    if causal:
        make = triangle if torch.compiler.is_compiling() else _cached_triangle
        mask = make(q_BHTE.shape[2], q_BHTE.dtype)
    out: Tensor = _DenseAttention.apply(q_BHTE, k_BKSE, v_BKSE, mask, scale)  # type: ignore[no-untyped-call]
    return out


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        B, H, T, E = q_BHTE.shape
        K, S = k_BKSE.shape[1:3]
        with torch.autocast("cpu", enabled=False):
            q = (q_BHTE * scale).reshape(B * K, -1, E)  # the heads that share a key, one after another
            k, v = k_BKSE.reshape(B * K, S, E), v_BKSE.reshape(B * K, S, E)
            scores = torch.bmm(q, k.transpose(1, 2))
            if mask is not None:
                scores.view(B, H, T, S).add_(mask)
            weights = torch.softmax(scores, -1)
            out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return out.view(B, H, T, E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        B, H, T, E = grads[0].shape
        S = k.shape[1]
        grad = grads[0].reshape(q.shape)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return grad_q.view(B, H, T, E), grad_k.view(B, -1, S, E), grad_v.view(B, -1, S, E), None, None


def triangle(size: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """[T, T]: 0 where a token sees a key, very low above the diagonal."""
    return torch.full((size, size), torch.finfo(dtype).min, dtype=dtype, device=device).triu_(1)


_cached_triangle = lru_cache(maxsize=4)(triangle)


QUERIES = 64  # of a row at a time, and
BLOCK_SCORES = 1 << 19  # scores at a time, which stay in the processor's cache


def prefers_blocks(*qkv: Tensor) -> bool:
    """Whether a pass without gradients is faster with its scores written out, some queries at a time."""
    q_BHTE = qkv[0]
    if q_BHTE.device.type != "cpu" or q_BHTE.dtype != torch.bfloat16 or q_BHTE.shape[2] == 1:
        return False
    return not any(tensor.requires_grad for tensor in qkv) and not torch.compiler.is_compiling()


def blocked_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """softmax(scale * q k^T + mask) v for bfloat16 on a CPU; scores are rounded to bfloat16, as in `dense_attention`.

    A token's later keys are left out where `causal`. At 512 tokens this takes 0.4 of the time of torch's fused
    attention: 6.2 and 15.9 ms for 1,024 tokens of SmolLM2-135M, on one core of an EPYC with avx512_bf16.

    Args:
        q_BHTE: Queries, bfloat16, as all else; the arguments are those of `dense_attention`.
        k_BKSE: Keys.
        v_BKSE: Values.
        mask: Added to the scores, [1 or B, 1, 1 or T, S]; None hides nothing.
        causal: A token's later keys are hidden, and there is no mask.
        scale: Factor on the scores.
    """
    B, H, T, E = q_BHTE.shape
    K, S = k_BKSE.shape[1:3]
    q_BHTE = q_BHTE * scale
    out_BTHE = q_BHTE.new_empty(B, T, H, E)
    rows = max(1, BLOCK_SCORES // (H * min(QUERIES, T) * S))
    for row in range(0, B, rows):
        some = slice(row, min(row + rows, B))
        n = some.stop - row
        k_NES, v_NSE = k_BKSE[some].reshape(n * K, S, E).transpose(1, 2), v_BKSE[some].reshape(n * K, S, E)
        for first in range(0, T, QUERIES):
            t = min(QUERIES, T - first)
            keys = first + t if causal else S
            q_NRE = q_BHTE[some, :, first : first + t].reshape(n * K, -1, E)  # the heads that share a key, in turn
            scores = torch.bmm(q_NRE, k_NES[:, :, :keys])
            if causal:
                scores.view(n, H, t, keys)[..., first:].add_(_block_triangle(t, scores.dtype))
            elif mask is not None:
                part = mask if len(mask) == 1 else mask[some]
                scores.view(n, H, t, keys).add_(part if part.shape[2] == 1 else part[:, :, first : first + t])
            mixed = torch.bmm(torch.softmax(scores, -1), v_NSE[:, :keys])
            out_BTHE[some, first : first + t] = mixed.view(n, H, t, E).transpose(1, 2)
    return out_BTHE.transpose(1, 2)


_block_triangle = lru_cache(maxsize=2 * QUERIES)(triangle)
