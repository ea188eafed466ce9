"""The spectrum of a matrix and of its change: how many directions carry it, and how much stands out from noise.

stable rank: |D|_F^2 / s_1^2. rank_90: how many singular values hold 90 % of the energy |D|_F^2. SNR as in Spectrum
(Hartford et al. 2024, 2406.06623): the sum of singular values above the Marchenko-Pastur edge over the sum of those
below, the noise estimated from the interquartile range, divided by the largest. Matrices whose smaller side is at most
EXACT are decomposed exactly; larger ones by a randomized range finder with one power iteration (Halko et al. 2011,
algorithm 4.4), read in tiles; these give no SNR. Leaves out: tables (diff.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lapis.weights.engine.sources import Source
from lapis.weights.engine.tiles import Reader, spans

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
    for start, end, one, two in _tiles(a, b):
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
        for start, end, one, two in _tiles(a, b):
            delta = two.sub_(one).view(-1, columns)
            piece = image[start // columns : end // columns]
            torch.mm(delta, basis, out=piece)
            back += delta.T @ piece  # D^T D basis, the power iteration, on the way
            energy += float((delta.double() ** 2).sum()) if sweep == 0 else 0.0
        basis = torch.linalg.qr(back)[0] if sweep == 0 else basis
    frame = torch.linalg.qr(image)[0]
    small = torch.zeros(DIRECTIONS, columns)
    for start, end, one, two in _tiles(a, b):
        small += frame[start // columns : end // columns].T @ two.sub_(one).view(-1, columns)
    return torch.linalg.svdvals(small.double()), energy


def _tiles(a: Source, b: Source) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """(first, last, a, b) for tiles of whole rows."""
    reader, sources = Reader(), (a, b)
    shape: Sequence[int] = a.shape
    for first, last in spans(shape, rows=True):
        tile = reader.read(a.name, sources, first, last, shape)
        yield first, last, tile.inputs[0], tile.inputs[1]
