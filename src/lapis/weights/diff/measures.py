"""What two tensors differ by: sums that add up over tiles, tensors and rows, and the spectrum of the difference.

With d = b - a: direction is the cosine of a and b, magnitude is |d| / |a| (Frobenius). 1 - cosine is computed from |d|,
which is exact where a and b are nearly parallel and the dot product is not. The rounding floor is the |d| / |a| that
rounding every element to b's dtype would give, noise of up to half an ulp: sqrt(sum (ulp / 2)^2 / 3) / |a|; a
difference below it says nothing.

The spectrum says how many directions carry a matrix and its change, and how much stands out from noise. stable rank:
|D|_F^2 / s_1^2. rank_90: how many singular values hold 90 % of the energy |D|_F^2. SNR as in Spectrum (Hartford et al.
2024, 2406.06623): the sum of singular values above the Marchenko-Pastur edge over the sum of those below, the noise
estimated from the interquartile range, divided by the largest. Matrices whose smaller side is at most EXACT are
decomposed exactly; larger ones by a randomized range finder with one power iteration (Halko et al. 2011, algorithm
4.4), read in tiles; these give no SNR. Leaves out: tables (diff.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import acos, asin, degrees, inf, sqrt
from typing import Any

import numpy as np
import torch

from lapis.weights.engine.sources import Source
from lapis.weights.engine.tiles import Reader, Tile, dot, spans

_MANTISSA = {
    torch.bfloat16: 8,
    torch.float16: 11,
    torch.float32: 24,
    torch.float64: 24,
}  # bits, the leading one counted


@dataclass
class Sums:
    """elements: how many; aa, bb, dd: sums of squares; da: sum of |d|; most: max |d|; same: equal elements; ulp: sum of
    (half an ulp)^2 / 3."""

    elements: int = 0
    aa: float = 0.0
    bb: float = 0.0
    dd: float = 0.0
    da: float = 0.0
    most: float = 0.0
    same: int = 0
    ulp: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        added = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Sums(**(added | {"most": max(self.most, other.most)}))

    def figures(self) -> dict[str, Any]:
        """cosine, angle (degrees), relative_norm, mean_abs, max_abs, identical (share), rounding_floor."""
        cosine, angle = direction(self.aa, self.bb, self.dd)
        return {
            "cosine": cosine,
            "angle": angle,
            "relative_norm": ratio(self.dd, self.aa),
            "mean_abs": self.da / self.elements if self.elements else 0.0,
            "max_abs": self.most,
            "identical": self.same / self.elements if self.elements else 1.0,
            "rounding_floor": ratio(self.ulp, self.aa),
        }


def ratio(part_sq: float, whole_sq: float) -> float:
    """sqrt(part / whole); 0 where both are 0."""
    return sqrt(part_sq / whole_sq) if whole_sq else (0.0 if not part_sq else inf)


def direction(aa: float, bb: float, dd: float) -> tuple[float, float]:
    """Cosine and angle (degrees) of a and b from the squared lengths of a, b and b - a."""
    if not aa or not bb:
        return (1.0, 0.0) if aa == bb else (0.0, 90.0)
    a, b = sqrt(aa), sqrt(bb)
    apart = min(max((dd - (a - b) ** 2) / (2 * a * b), 0.0), 2.0)  # 1 - cosine
    angle = 2 * asin(sqrt(apart / 2)) if apart < 1 else acos(1 - apart)
    return 1 - apart, degrees(angle)


def mantissa(dtype: torch.dtype) -> int:
    """Bits of precision."""
    return _MANTISSA[dtype]


def measure(tile: Tile, bits: int) -> Sums:
    """The sums of one tile of (a, b). Overwrites both."""
    a, b = tile.inputs
    aa, bb, d = dot(a, a), dot(b, b), b.sub_(a)
    dd = dot(d, d)
    d.abs_()
    values = d.numpy()  # numpy counts and finds the largest several times faster
    same = d.numel() - int(np.count_nonzero(values != 0))
    da, most = float(d.sum()), float(values.max())
    return Sums(d.numel(), aa, bb, dd, da, most, same, _half_ulps(a, bits))


def measure_rows(tile: Tile) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """For every row of the tile the sums of squares (a, b, b - a): float64 [rows, 3]. Keeps the tile as it is."""
    a, b = (x.view(-1, tile.columns).double() for x in tile.inputs)
    columns = [(x * x).sum(1) for x in (a, b, b - a)]
    return torch.stack(columns, 1).numpy()


def _half_ulps(a: torch.Tensor, bits: int) -> float:
    """Sum of (half an ulp)^2 / 3 over a float32 vector whose elements were stored with `bits` bits of precision."""
    a.view(torch.int32).bitwise_and_(0x7F800000)  # what is left of the number is 2^exponent
    return dot(a, a) * 4.0**-bits / 3


EXACT = 2048
DIRECTIONS = 192


def spectra(a: Source, b: Source) -> dict[str, Any]:
    """Figures of the matrix a and of b - a: stable_rank, rank_90, snr (delta) and weight_snr (a).

    Also `singular_values` of the difference: the largest, at most DIRECTIONS. None for what could not be had.
    """
    rows, columns = a.shape
    if min(rows, columns) > EXACT:
        values, energy = _largest(a, b, rows, columns)
        return _figures(values, energy, rows, columns, exact=False) | {"weight_snr": None}
    whole = torch.empty(rows, columns), torch.empty(rows, columns)
    for start, end, one, two in tiles_of(a, b):
        whole[0].view(-1)[start:end], whole[1].view(-1)[start:end] = one, two.sub_(one)
    weight, delta = (_singular_values(matrix) for matrix in whole)
    figures = _figures(delta, float((delta**2).sum()), rows, columns, exact=True)
    return figures | {"weight_snr": snr(weight, rows, columns)}


def snr(values: torch.Tensor, rows: int, columns: int) -> float | None:
    """Spectrum's signal-to-noise ratio of a matrix from all its singular values; None for a matrix of zeros."""
    if not len(values) or float(values[0]) == 0:
        return None
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype))
    sigma = float(quartiles[1] - quartiles[0]) / 1.349
    beta = min(rows, columns) / max(rows, columns)
    edge = sigma * (1 + beta**0.5)
    signal, noise = float(values[values > edge].sum()), float(values[values <= edge].sum())
    return signal / max(noise, 1e-30) / float(values[0])


def _figures(values: torch.Tensor, energy: float, rows: int, columns: int, *, exact: bool) -> dict[str, Any]:
    squares = values.double() ** 2
    top = float(squares[0]) if len(squares) else 0.0
    enough = torch.nonzero(squares.cumsum(0) >= 0.9 * energy * (1 - 1e-9)).flatten().tolist() if top else []
    return {
        "stable_rank": energy / top if top else 0.0,
        "rank_90": enough[0] + 1 if enough else (0 if not top else None),
        "snr": snr(values, rows, columns) if exact else None,
        "singular_values": [float(v) for v in values[:DIRECTIONS]],
    }


def _singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values, float64, largest first: by the eigenvalues of the smaller Gram matrix."""
    wide = matrix.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values: torch.Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0).sqrt()


def _largest(a: Source, b: Source, rows: int, columns: int) -> tuple[torch.Tensor, float]:
    """The largest singular values of b - a, and its energy, in three sweeps of tiles."""
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(columns, DIRECTIONS, generator=random)
    energy = 0.0
    for sweep in range(2):
        image = torch.empty(rows, DIRECTIONS)
        back = torch.zeros(columns, DIRECTIONS)
        for start, end, one, two in tiles_of(a, b):
            delta = two.sub_(one).view(-1, columns)
            piece = image[start // columns : end // columns]
            torch.mm(delta, basis, out=piece)
            back += delta.T @ piece  # D^T D basis, the power iteration, on the way
            energy += float((delta.double() ** 2).sum()) if sweep == 0 else 0.0
        basis = torch.linalg.qr(back)[0] if sweep == 0 else basis
    frame = torch.linalg.qr(image)[0]
    small = torch.zeros(DIRECTIONS, columns)
    for start, end, one, two in tiles_of(a, b):
        small += frame[start // columns : end // columns].T @ two.sub_(one).view(-1, columns)
    return torch.linalg.svdvals(small.double()), energy


def tiles_of(a: Source, b: Source) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """(first, last, a, b) for tiles of whole rows."""
    reader, sources = Reader(), (a, b)
    shape: Sequence[int] = a.shape
    for first, last in spans(shape, rows=True):
        tile = reader.read(a.name, sources, first, last, shape)
        yield first, last, tile.inputs[0], tile.inputs[1]
