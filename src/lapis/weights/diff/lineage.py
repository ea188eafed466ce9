"""Who descends from whom: the cosines between what several models changed of one base.

With d_i = model_i - base, independent fine-tunes have nearly orthogonal differences; a model that was made from another
contains its difference whole (d_i . d_j = |d_i|^2); a base that is not the parent lends every difference the same way
back to the real one. All follows from one matrix of dot products, read in one sweep. Leaves out: rows and spectra.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.weights.checks import UNRELATED, kinship, missing_tensors
from lapis.weights.diff.measures import ratio
from lapis.weights.engine.fp8 import is_number
from lapis.weights.engine.sources import Stored
from lapis.weights.engine.tiles import Reader, dot, each, spans
from lapis.weights.matching import Model, counterparts, format_problems, open_models
from lapis.wording import format_count

ALIKE, CONTAINED = 0.2, (0.8, 1.25)


@dataclass
class Lineage:
    """base and models: sources. relative_norms: |d_i| / |base|. cosines: between d_i and d_j. notes: what it means."""

    base: str
    models: list[str]
    relative_norms: list[float]
    cosines: list[list[float]]
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def lineage(base: Model, models: Sequence[Model], *, progress: Callable[[int, int], None] | None = None) -> Lineage:
    """Compares what each of two or more models changed of `base`, over the tensors that all have in the same shape.

    Raises CheckpointError where they have none in common, and for NaN or Inf.
    """
    opened = open_models({str(i): model for i, model in enumerate((base, *models))}, "diff")
    if problems := missing_tensors({checkpoint.source: checkpoint for checkpoint in opened.values()}):
        raise CheckpointError(format_problems("diff", problems))
    first, *others = opened.values()
    names = [counterparts(first, other) for other in others]
    shared, skipped = [], 0
    for name in first.names:
        pairs = [(other, table.get(name)) for other, table in zip(others, names, strict=True)]
        same = all(n is not None and other.info(n).shape == first.info(name).shape for other, n in pairs)
        if same and is_number(first, name) and all(is_number(other, n) for other, n in pairs if n):
            shared.append([Stored("base", first, name)] + [Stored(o.source, o, n) for o, n in pairs if n])
        else:
            skipped += 1
    if not shared:
        raise CheckpointError(f"diff: {first.source} and the others have no tensor of the same shape in common")
    count = len(others)
    grams = np.zeros((len(shared), count + 1, count))  # the last row: |base|^2
    lock = threading.Lock()

    def work(reader: Reader, task: tuple[int, int, int]) -> None:
        number, start, end = task
        tile = reader.read(shared[number][0].name, shared[number], start, end, shared[number][0].shape)
        origin, *rest = tile.inputs
        deltas = [vector.sub_(origin) for vector in rest]
        gram = np.zeros((count + 1, count))
        for i in range(count):
            for j in range(i, count):
                gram[i, j] = gram[j, i] = dot(deltas[i], deltas[j])
        gram[count] = dot(origin, origin)
        with lock:
            grams[number] += gram

    read = [(i, a, b) for i, sources in enumerate(shared) for a, b in spans(sources[0].shape)]
    each(read, work, progress, lambda task: [(source, *task[1:]) for source in shared[task[0]]])
    if not np.isfinite(grams).all():
        raise CheckpointError(f"{shared[int(np.argwhere(~np.isfinite(grams))[0][0])][0].name}: NaN or Inf in a model")
    total = grams.sum(0)
    result = Lineage(
        first.source,
        [other.source for other in others],
        [ratio(float(total[i, i]), float(total[count, 0])) for i in range(count)],
        _cosines(total[:count]),
        _by_layer(first, [sources[0].name for sources in shared], grams),
    )
    result.notes = _meaning(result, total[:count])
    for other in others:
        cosine, _ = kinship(first, other)
        if cosine is not None and cosine < UNRELATED:
            result.notes.insert(
                0, f"{other.source} is no fine-tune of {first.source}: the cosine of their weights is {cosine:.2f}"
            )
    if skipped:
        what = format_count(skipped, f"tensor of {first.source} is", f"tensors of {first.source} are")
        result.notes.append(f"{what} not in all of the others in the same shape")
    return result


def _cosines(gram: Any) -> list[list[float]]:
    length = np.sqrt(np.diag(gram))
    scale = np.where(length > 0, length, 1.0)
    return [[float(x) for x in row] for row in gram / scale[:, None] / scale]


def _by_layer(base: Checkpoint, names: list[str], grams: Any) -> list[dict[str, Any]]:
    """The cosines within each layer."""
    layers: dict[int | None, Any] = {}
    for name, gram in zip(names, grams, strict=True):
        layer = base.part(name).layer
        layers[layer] = layers.get(layer, 0) + gram
    order = sorted(layers, key=lambda layer: (layer is not None, layer or 0))
    return [{"layer": layer, "cosines": _cosines(layers[layer][:-1])} for layer in order]


def _meaning(result: Lineage, gram: Any) -> list[str]:
    """What the cosines say of descent, in sentences."""
    notes = []
    for i, j in combinations(range(len(result.models)), 2):
        one, two = (i, j) if gram[i, i] <= gram[j, j] else (j, i)
        if not gram[one, one]:
            notes.append(f"{result.models[one]} equals {result.base}")
            continue
        contained = gram[one, two] / gram[one, one]
        if sqrt(gram[two, two]) == sqrt(gram[one, one]) and result.cosines[i][j] > 1 - 1e-9:
            notes.append(f"{result.models[i]} and {result.models[j]} are the same")
        elif CONTAINED[0] < contained < CONTAINED[1] and result.cosines[i][j] > ALIKE:
            notes.append(f"{result.models[two]} looks made from {result.models[one]}: it contains its difference")
        elif result.cosines[i][j] > ALIKE:
            notes.append(
                f"{result.models[i]} and {result.models[j]} went the same way (cosine {result.cosines[i][j]:.2f}): "
                f"alike training, or a common parent nearer than {result.base}"
            )
    if not notes:
        notes.append(f"the differences are independent: separate fine-tunes of {result.base}")
    return notes
