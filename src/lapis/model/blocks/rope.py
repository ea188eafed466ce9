"""Rotary positions: the angles of one forward pass, and turning queries and keys by them.

The angles are computed once per forward in float32, and shared by all layers. Pairs are (i, i + R/2), as in most
published weights, or (2i, 2i + 1), as in the paper. Leaves out: long-rope's tables.

Shapes: B batch, T time, H heads, E head dim, R numbers of a head that turn.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lapis.families.config import ModelConfig, Rope


class Rotation(NamedTuple):
    """cos and signed sin, [..., T, 1, R]. neighbors: the pairs are (2i, 2i + 1)."""

    cos: Tensor
    sin: Tensor
    neighbors: bool = False


def rope_tables(rope: Rope, config: ModelConfig, positions: Tensor, dtype: torch.dtype, length: int) -> Rotation:
    """cos and signed sin for positions, to be used by `rotate`.

    Args:
        rope: Base and kind of the scaling.
        config: Of the model, for the size of a head and the context.
        positions: int64 [T] or [B, T].
        dtype: Of the tables; they are computed in float32.
        length: One more than the largest position; only the "dynamic" kind looks at it.

    Returns:
        Both as [..., T, 1, R].
    """
    inverse, scale = inverse_frequencies(rope, config, length, positions.device)
    angles = positions[..., None, None].float() * inverse
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    if rope.neighbors:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        return Rotation(cos.to(dtype), sin.to(dtype), True)
    return Rotation(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def query_gain(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What queries are multiplied by, [..., T, 1, 1]; None where the model multiplies them by nothing."""
    if (beta := config.rope.query_growth) is None:
        return None
    original = config.rope.original_context or config.context
    return (1 + beta * torch.log1p(positions.div(original, rounding_mode="floor"))).to(dtype)[..., None, None]


def rotate(x_BTHE: Tensor, rotation: Rotation) -> Tensor:
    """Each head's pairs turned by their angle: (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin, neighbors = rotation
    width = cos.shape[-1]
    x_BTHR = x_BTHE if width == x_BTHE.shape[-1] else x_BTHE[..., :width]
    partners = x_BTHR.view(*x_BTHR.shape[:-1], -1, 2).flip(-1).flatten(-2) if neighbors else x_BTHR.roll(width // 2, -1)
    turned = (x_BTHR * cos).addcmul_(partners, sin)
    return turned if x_BTHR is x_BTHE else torch.cat((turned, x_BTHE[..., width:]), -1)


def inverse_frequencies(rope: Rope, config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position for each pair of a head, [R/2] float32, and what cos and sin are multiplied by."""
    dim = rope.width(config.head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    factor = rope.factor or 1.0
    if rope.kind == "dynamic":
        theta = rope.theta
        if length > config.context and dim > 2:
            theta *= ((factor * length / config.context) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / theta**exponents, 1.0
    inverse = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return inverse / factor, 1.0
    if rope.kind == "proportional":
        turning = int(rope.share * dim // 2)
        return torch.cat((inverse[:turning], torch.zeros_like(inverse[turning:]))) / factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inverse, rope.original_context or config.context), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse, dim, rope.original_context or config.context)
    return inverse, 1.0


def _llama3(rope: Rope, inverse: Tensor, original: int) -> Tensor:
    """Slow waves are stretched by the factor, fast ones kept, those between blended (Llama 3.1's own code)."""
    factor, low, high = rope.factor or 1.0, rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
    turns = original * inverse / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


def _yarn(rope: Rope, inverse: Tensor, dim: int, original: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, sections 3.2 to 3.4): "NTK by parts", and a temperature on the attention."""
    factor = rope.factor or 1.0

    def pair_that_turns(times: float) -> float:
        return (dim * math.log(original / (times * 2 * math.pi))) / (2 * math.log(rope.theta))

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    low, high = pair_that_turns(rope.beta_fast or 32), pair_that_turns(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=inverse.device)
    stretched = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
    if rope.attention_factor is not None:
        scale = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        scale = temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    else:
        scale = temperature(1.0)
    return inverse / factor * stretched + inverse * (1 - stretched), scale
