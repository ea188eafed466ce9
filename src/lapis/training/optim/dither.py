"""Dither: in bfloat16, products see updates that are smaller than a step between two bfloat16 numbers.

Training in bfloat16 rounds the float32 weights for each product, and two bfloat16 numbers lie 1/256 to 1/128 of their
size apart. The weights of a public model are such numbers. Until a weight has moved half the way to the next one, its
update changes no product: the gradient stays that of the start, every step goes the same way, and weights go too far
before any of it is seen. Weights that many steps have moved lie anywhere between two numbers, and new models begin so:
a small update then takes a small share of them over an edge, and is seen as large as it is.

So while a gradient is computed, each weight is off by an amount within half a step, always the same and spread evenly
(dither: Roberts 1962). Before the first update every product is what it was. Afterwards the weights are put back, to
the bit: updates, checkpoints, evaluations and the result know nothing of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from lapis.training.distributed.pieces import is_piece, own, piece_like

_CUT = 16  # low bits of a float32 number, which bfloat16 does not have
_LENGTH = 65_521  # of the pattern; a prime, so that no two rows of a matrix have it at the same place
_APART = 7_919  # places of the pattern between the beginnings of two matrices
_SIZE, _LEAST = 0x7FFFFFFF, 0x00800000  # a number without its sign; the smallest that has all its bits
_AT_ONCE = {"cpu": 1, "cuda": 256}  # lengths of the pattern: what a core's cache holds, and what a GPU needs to be busy
_LOOKED_AT = 1 << 16  # numbers of a matrix that say whether it holds bfloat16


class Dither:
    """What a run's matrices are off by while gradients are computed.

    Args:
        matrices: Float32; none for a run that needs no dither.
    """

    def __init__(self, matrices: Sequence[nn.Parameter] = ()) -> None:
        self.places = [(matrix, (number * _APART + _begin(matrix)) % _LENGTH) for number, matrix in enumerate(matrices)]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While inside, the matrices are off. Zeros stay zero. They must not be changed inside."""
        self._move(1)
        try:
            yield
        finally:
            self._move(-1)

    @torch.no_grad()
    def _move(self, sign: int) -> None:
        for matrix, begin in self.places:
            bits = own(matrix.detach()).view(torch.int32).view(-1)
            pattern = _pattern(bits.device)[begin : begin + _LENGTH]
            for part in torch.split(bits, _LENGTH * _AT_ONCE.get(bits.device.type, 1)):
                whole = len(part) // _LENGTH * _LENGTH
                _shift(part[:whole].view(-1, _LENGTH), pattern, sign)
                _shift(part[whole:], pattern[: len(part) - whole], sign)


def _shift(bits: Tensor, low: Tensor, sign: int) -> None:
    """Adds to the bits of float32 numbers, which moves each by so many of its own last bits."""
    bits.add_(low * (bits.bitwise_and(_SIZE) >= _LEAST), alpha=sign)


def multiplied(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices in float32 that are rounded for products; rows of the embedding are read as they are."""
    return [
        p for name, p in model.named_parameters()
        if p.requires_grad and p.ndim >= 2 and p.dtype == torch.float32 and own(p).is_contiguous()
        and name.split(".")[0] != "embed"
    ]  # fmt: skip


def hold_bfloat16(matrices: Iterable[Tensor]) -> bool:
    """Whether some lie on bfloat16 numbers, by their first ones: such a model needs dither. Zeros say nothing."""
    firsts = (own(matrix.detach()).view(torch.int32).view(-1)[:_LOOKED_AT] for matrix in matrices)
    return any(bool(first.any()) and not bool(first.bitwise_and((1 << _CUT) - 1).any()) for first in firsts)


def _begin(matrix: Tensor) -> int:
    """The number of a piece's first element in the whole, so that the dither does not depend on how it is cut."""
    if not is_piece(matrix):
        return 0
    rows = own(piece_like(torch.arange(len(matrix)), matrix))
    return int(rows[0]) * (matrix.numel() // len(matrix)) if len(rows) else 0


@lru_cache(maxsize=8)
def _pattern(device: torch.device) -> Tensor:
    """Nearly each amount once, in units of a float32 number's last bit, in random order; twice one after the other."""
    most = (1 << _CUT - 1) - 1
    order = torch.randperm(2 * most + 1, generator=torch.Generator().manual_seed(0))[:_LENGTH] - most
    return order.int().repeat(2).to(device)
