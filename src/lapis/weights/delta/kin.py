"""Which base a delta is of: a digest of the base's values, and a sample by which its descendants are known."""

import hashlib
from collections.abc import Mapping
from math import isfinite
from statistics import median

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.tensor_file import dtype_name
from lapis.weights.checks import FAR, UNRELATED
from lapis.weights.delta.file import SAMPLE, DeltaFile
from lapis.weights.engine.sources import Stored, as_bytes
from lapis.weights.engine.tiles import Reader, each, spans
from lapis.weights.matching import counterparts, is_vocabulary

MATRICES, ELEMENTS = 12, 1 << 12


def digest_of(sources: Mapping[str, Stored], sha256: Mapping[str, str]) -> str:
    """One sha256 for the weights of a model that are no rows of tokens.

    Args:
        sources: The tensors, by the names that the delta has for them.
        sha256: Of the bytes of each, in its own dtype.
    """
    lines = (f"{name} {dtype_name(sources[name].dtype)} {list(sources[name].shape)} {sha256[name]}" for name in sources)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def weights_sha256(model: Checkpoint, names: Mapping[str, str]) -> str:
    """The same from the model itself, which is read.

    Args:
        model: Any model.
        names: The delta's name of each tensor -> the model's.
    """
    sources = {name: Stored("", model, other) for name, other in names.items()}
    sha256: dict[str, str] = {}

    def read(_reader: Reader, name: str) -> None:
        running, source = hashlib.sha256(), sources[name]
        for first, last in spans(source.shape):
            values = torch.empty(last - first, dtype=source.dtype)
            source.read(first, last, as_bytes(values))
            running.update(as_bytes(values))
        sha256[name] = running.hexdigest()

    each(list(sources), read, reads=lambda name: [(sources[name], *span) for span in spans(sources[name].shape)])
    return digest_of(sources, sha256)


def take_sample(sources: Mapping[str, Stored]) -> tuple[list[str], torch.Tensor]:
    """Names of a few matrices of blocks, and their first numbers, float32 [names, numbers].

    Args:
        sources: The base's matrices.
    """
    names = list(sources)[:: -(-len(sources) // MATRICES) or 1]
    size = min([ELEMENTS, *(_count(sources[name]) for name in names)])
    return names, torch.stack([_first(sources[name], size) for name in names]) if names else torch.empty(0, size)


def check_descent(file: DeltaFile, role: str, onto: Checkpoint, allow_unrelated: bool) -> tuple[list[str], list[str]]:
    """Problems and notes where a model does not descend from the base of a delta; the sample tells.

    Args:
        file: The delta.
        role: What it is called.
        onto: The model that it is to be added to.
        allow_unrelated: Go on, with a note.
    """
    names: list[str] = list(file.description["sample"])
    sample = file.weights.read(SAMPLE)
    there = {stored: name for name, stored in counterparts(onto, file.model).items()}
    cosines, count = [], 0
    for name, theirs in zip(names, sample.double(), strict=True):
        source = Stored("", onto, there[name]) if name in there else None
        if source is None or _count(source) < len(theirs):
            continue
        ours = _first(source, len(theirs)).double()
        cosines.append(float(ours @ theirs / ((ours @ ours) * (theirs @ theirs)).sqrt()))
        count += len(theirs)
    cosines = [cosine for cosine in cosines if isfinite(cosine)]
    if not cosines or median(cosines) >= FAR:
        return [], []
    cosine = median(cosines)
    if cosine >= max(UNRELATED, 3 / count**0.5):
        return [], [f"{role}'s base and onto are far apart: the cosine of their weights is {cosine:.2f}"]
    named = {stored: there[stored] for stored in digested(file) if stored in there}
    line = (
        f"onto is no continuation of {role}'s base: the cosine of their weights is {cosine:.2f}; {role} is of "
        f"{file.description['base']['source']} ({file.base_sha256[:16]}), onto's weights are "
        f"{weights_sha256(onto, named)[:16]}"
    )
    if allow_unrelated:
        return [], [f"{line}; it was added all the same (--allow-unrelated)"]
    return [f"{line}; give a continuation of that base, or --allow-unrelated"], []


def digested(file: DeltaFile) -> list[str]:
    """The tensors whose values in the base make its digest."""
    return [name for name in file.tensors if not is_vocabulary(file.model.part(name))]


def _count(source: Stored) -> int:
    return int(torch.Size(source.shape).numel())


def _first(source: Stored, count: int) -> torch.Tensor:
    values = torch.empty(count, dtype=source.dtype)
    source.read(0, count, as_bytes(values))
    return values.float()
