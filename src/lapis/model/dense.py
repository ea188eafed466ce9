"""Attention with its scores written out, for training in bfloat16 on a CPU.

Two batched matrix products and a softmax, with the backward pass that follows from them. On CPUs with bfloat16
products this takes a third to a half of the time of torch's fused attention, and a mask costs nothing more, at the
price of keeping one weight per pair of tokens. Leaves out: everything else; SDPA does that (attention.py).

Shapes: B batch, T time, S time of keys, H heads, K heads of keys, G = H / K, E head dim.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LARGEST = 1 << 24  # scores kept for the backward pass by one layer; beyond it SDPA needs less memory and is as fast


def prefers_dense(q_BHTE: Tensor, keys: int) -> bool:
    """Whether this training step's attention is faster with its scores written out."""
    if not (q_BHTE.requires_grad and q_BHTE.dtype == torch.bfloat16 and q_BHTE.device.type == "cpu"):
        return False
    B, H, T, _ = q_BHTE.shape
    return T > 1 and B * H * T * keys <= LARGEST


def dense_attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v; scores are rounded to the input's dtype."""
    if causal:
        make = triangle if torch.compiler.is_compiling() else _cached_triangle
        mask = make(q_BHTE.shape[2], q_BHTE.dtype)
    out: Tensor = _DenseAttention.apply(q_BHTE, k_BKSE, v_BKSE, mask)  # type: ignore[no-untyped-call]
    return out


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None) -> Tensor:
        B, H, T, E = q_BHTE.shape
        K, S = k_BKSE.shape[1:3]
        with torch.autocast("cpu", enabled=False):
            q = (q_BHTE * E**-0.5).reshape(B * K, -1, E)  # the heads that share a key, one after another
            k, v = k_BKSE.reshape(B * K, S, E), v_BKSE.reshape(B * K, S, E)
            scores = torch.bmm(q, k.transpose(1, 2))
            if mask is not None:
                scores.view(B, H, T, S).add_(mask)
            weights = torch.softmax(scores, -1)
            out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights)
        return out.view(B, H, T, E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        B, H, T, E = grads[0].shape
        S = k.shape[1]
        grad = grads[0].reshape(q.shape)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(E**-0.5)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return grad_q.view(B, H, T, E), grad_k.view(B, -1, S, E), grad_v.view(B, -1, S, E), None


def triangle(size: int, dtype: torch.dtype) -> Tensor:
    """[T, T]: 0 where a token sees a key, very low above the diagonal."""
    return torch.full((size, size), torch.finfo(dtype).min, dtype=dtype).triu_(1)


_cached_triangle = lru_cache(maxsize=4)(triangle)
