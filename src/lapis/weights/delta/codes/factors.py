"""A matrix in, two thin ones out whose product is nearest to it: the truncated singular value decomposition.

Exact (float64, by the eigenvectors of the smaller Gram matrix) up to EXACT rows or columns. Beyond, a random projection
with power iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4): with OVER more columns than
the rank its error is at most sqrt(1 + rank / (OVER - 1)) times the best one in expectation (theorem 10.5), already
without the iterations, which bring it near 1. The random matrix is seeded by the tensor's name.

Shapes: O outputs (rows), I inputs (columns), K rank.
"""

import zlib

import torch
from torch import Tensor

EXACT = 1024
OVER = 64
_POWER = 6


def low_rank(matrix_OI: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """(left [O, K], right [K, I]), float32, with the root of each singular value in both.

    Args:
        matrix_OI: float32.
        rank: K; less where the matrix is smaller.
        name: What the random projection is seeded by.
    """
    if matrix_OI.shape[0] > matrix_OI.shape[1]:
        right, left = low_rank(matrix_OI.T, rank, name)
        return left.T.contiguous(), right.T.contiguous()
    rank = min(rank, matrix_OI.shape[0])
    if matrix_OI.shape[0] <= EXACT:
        wide = matrix_OI.double()
        basis_OK = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]
        inner_KI = basis_OK.T @ wide
    else:
        range_OP = _range(matrix_OI, min(rank + OVER, matrix_OI.shape[0]), zlib.crc32(name.encode()))
        small_PI = (range_OP.T @ matrix_OI).double()
        turn_PK = torch.linalg.eigh(small_PI @ small_PI.T)[1].flip(1)[:, :rank]
        basis_OK, inner_KI = range_OP.double() @ turn_PK, turn_PK.T @ small_PI
    roots_K = inner_KI.norm(dim=1).sqrt()
    inverse_K = torch.where(roots_K > 0, 1 / roots_K, 0.0)
    return (basis_OK * roots_K).float(), (inner_KI * inverse_K[:, None]).float()


def error_bound(shape: tuple[int, ...], rank: int) -> float:
    """By how much the error may exceed the best one of this rank, as a factor (1: exact)."""
    return 1.0 if min(shape) <= EXACT else (1 + rank / (OVER - 1)) ** 0.5


def _range(matrix_OI: Tensor, columns: int, seed: int) -> Tensor:
    """An orthonormal basis [O, columns] of what a matrix does to random vectors."""
    random = torch.Generator().manual_seed(seed)
    basis: Tensor
    basis = torch.linalg.qr(matrix_OI @ torch.randn(matrix_OI.shape[1], columns, generator=random))[0]
    for _ in range(_POWER):
        basis = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.T @ basis)[0])[0]
    return basis
