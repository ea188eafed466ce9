"""What two tensors differ by, as sums that add up: over tiles, over tensors, over rows.

With d = b - a: direction is the cosine of a and b, magnitude is |d| / |a| (Frobenius). 1 - cosine is computed from |d|,
which is exact where a and b are nearly parallel and the dot product is not. The rounding floor is the |d| / |a| that
noise of up to half an ulp in every stored element would give: sqrt(sum (ulp / 2)^2 / 3) / |a|; a difference below it
says nothing. Leaves out: reading (tiles.py) and tables (diff.py).
"""

from dataclasses import dataclass, fields
from math import acos, asin, degrees, inf, sqrt
from typing import Any

import numpy as np
import torch

from lapis.weights.engine.tiles import Tile, dot

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


def mantissa(*dtypes: torch.dtype) -> int:
    """Bits of precision of the coarsest dtype."""
    return min(_MANTISSA[dtype] for dtype in dtypes)


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
