"""float32 differences in, a few bits for each out, and back.

Blocks: BLOCK numbers share a factor (bfloat16), and each is a whole number of 4 or 8 bits times it. The factor is the
number of largest magnitude over -2^(bits-1), so that this one is met best. Signs: each row has one factor (float32),
the mean magnitude of its numbers, which is the best for +-1, and each number is a bit (Liu et al. 2024, BitDelta,
arXiv:2402.10193, section 3.1, with one factor for a row instead of one for a matrix).

Shapes: N numbers, B blocks, R rows, C columns.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 64


def block_bytes(count: int, bits: int) -> int:
    """How many bytes hold `count` numbers."""
    return -(-count * bits // 8)


def to_blocks(values_N: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and factors of a vector.

    Args:
        values_N: float32; its last block may be short.
        bits: 4 or 8.

    Returns:
        Codes as uint8 bytes, two numbers in a byte where bits is 4 (the first in the low half); factors [B], bfloat16.
    """
    count, limit = len(values_N), 2 ** (bits - 1)
    blocks_BN = torch.nn.functional.pad(values_N, (0, -count % BLOCK)).view(-1, BLOCK)
    top_B = blocks_BN.gather(1, blocks_BN.abs().argmax(1, keepdim=True)).squeeze(1)
    factors_B = (top_B / -limit).bfloat16()
    inverse_B = torch.where(factors_B == 0, 0.0, 1 / factors_B.float())
    inverse_B = inverse_B.nan_to_num_(0.0, 0.0, 0.0)  # a subnormal factor, whose inverse no float32 holds
    codes_BN = (blocks_BN * inverse_B[:, None]).round_().clamp_(-limit, limit - 1).to(torch.int8)
    codes = codes_BN.view(-1)[:count]
    if bits == 8:
        return codes.view(torch.uint8), factors_B
    halves = (torch.nn.functional.pad(codes, (0, count % 2)) + limit).view(torch.uint8).view(-1, 2)
    return halves[:, 0] | (halves[:, 1] << 4), factors_B


def from_blocks(codes: Tensor, factors_B: Tensor, count: int, bits: int) -> Tensor:
    """The numbers of some whole blocks (the last may be short): float32 [count]."""
    if bits == 8:
        values_N = codes.view(torch.int8).float()
    else:
        values_N = torch.stack((codes & 15, codes >> 4), 1).view(-1)[:count].float().sub_(8)
    padded = torch.nn.functional.pad(values_N, (0, -count % BLOCK)).view(-1, BLOCK)
    return (padded * factors_B.float()[:, None]).view(-1)[:count]


def to_signs(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of rows, [R, ceil(C / 8)] uint8 with the first column in the lowest bit, and factors [R], float32."""
    bits = np.packbits((values_RC >= 0).numpy(), axis=1, bitorder="little")
    factors_R = values_RC.abs().mean(1, dtype=torch.float64).float() if values_RC.shape[1] else values_RC.new_zeros(0)
    return torch.from_numpy(bits), factors_R


def from_signs(bits: Tensor, factors_R: Tensor, columns: int) -> Tensor:
    """The numbers of whole rows: float32 [R, C]."""
    plain = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=columns, bitorder="little"))
    return plain.float().mul_(2).sub_(1).mul_(factors_R[:, None])
