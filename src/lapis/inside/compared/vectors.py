"""Mean differences of activations as a file, and one of them added to a model while it runs.

The file is safetensors: `differences` [P, L, D] and `norms` [P, L], float32, with the models' names and fingerprints in
its header; the states are the embedding and the end of each layer. Steering adds a vector to the state after one layer,
at every place (Turner et al. 2023, arXiv:2308.10248).

Shapes: P places, L states of each (layers + 1), D model dim.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.tensor_file import read_header, read_tensors, write_tensors
from lapis.errors import CheckpointError, ConfigError, LapisError
from lapis.inside.lens.tuned import fingerprint
from lapis.inside.trace import Anatomy, anatomy
from lapis.parsing import ParseError, parse_json
from lapis.wording import format_count

KEY = "lapis_activation_differences"  # in the header


@dataclass(frozen=True)
class DifferenceVectors:
    """differences_PLD: mean state of b less that of a. norms_PL: mean length of a's states. Both float32.

    info: `a`, `b` (names), `fingerprints` (of both), `texts` (how many). source: the file, for messages.
    """

    differences_PLD: Tensor
    norms_PL: Tensor
    info: dict[str, Any]
    source: str = "these vectors"

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Writes the file, whole or not at all."""
        tensors = {"differences": self.differences_PLD, "norms": self.norms_PL}
        with commit_file(path, overwrite=overwrite) as temporary:
            write_tensors(temporary, tensors, {KEY: json.dumps(self.info)})

    @classmethod
    def open(cls, path: Path | str) -> "DifferenceVectors":
        """Raises CheckpointError for a file that holds something else, or is damaged."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file; make one with lapis diff --activations --vectors")
        header = read_header(path)
        shapes = {name: info.shape for name, info in header.tensors.items()}
        try:
            info = parse_json(header.metadata[KEY])
            names, texts = [str(info[name]) for name in "ab"], int(info["texts"])
            fingerprints = [str(value) for value in info["fingerprints"]]
            P, L, _ = shapes["differences"]
            fits = shapes["norms"] == (P, L) and len(shapes) == 2 and P >= 1 and L >= 2
        except (KeyError, ValueError, TypeError, ParseError):
            fits = False
        if not fits:
            raise CheckpointError(f"{path}: holds no differences of activations; make one with lapis diff --vectors")
        tensors = {name: tensor.float() for name, tensor in read_tensors(path).items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise CheckpointError(f"{path}: holds NaN or Inf; make it again")
        facts = {"a": names[0], "b": names[1], "texts": texts, "fingerprints": fingerprints}
        return cls(tensors["differences"], tensors["norms"], facts, str(path))

    def check(self, parts: Anatomy) -> None:
        """Raises LapisError where the model is neither of the two that were compared."""
        layers, dim = self.differences_PLD.shape[1] - 1, self.differences_PLD.shape[2]
        if (layers, dim) != (parts.layers, parts.matrix.shape[1]):
            raise LapisError(
                f"{self.source}: is of models with {format_count(layers, 'layer')} of width {dim}; {parts.name} "
                f"has {parts.layers} of {parts.matrix.shape[1]}"
            )
        if fingerprint(parts) not in self.info["fingerprints"]:
            raise LapisError(
                f"{self.source}: was made of {self.info['a']} and {self.info['b']}, and {parts.name} is neither; make "
                "vectors for it"
            )

    def vector(self, layer: int, place: int | None = None) -> Tensor:
        """The difference after a layer, [D], at one place or as the mean over all. ConfigError for one out of range."""
        places, layers = self.differences_PLD.shape[0], self.differences_PLD.shape[1] - 1
        if not 0 <= layer < layers:
            raise ConfigError(f"steer: layer is {layer}; {self.source} has layers 0 to {layers - 1}")
        if place is not None and not 0 <= place < places:
            raise ConfigError(f"steer: place is {place}; {self.source} has places 0 to {places - 1}")
        of_layer_PD = self.differences_PLD[:, layer + 1]
        return of_layer_PD.mean(0) if place is None else of_layer_PD[place]


@contextmanager
def steer(
    model: nn.Module,
    vectors: DifferenceVectors | Path | str,
    layer: int | None = None,
    strength: float = 1.0,
    place: int | None = None,
) -> Iterator[str]:
    """While the block runs, a vector is added to what leaves one layer, at every place of every row.

    Args:
        model: One of the two models that the vectors are of: lapis' own, or a causal one of transformers.
        vectors: Of `activation_difference`, or their file.
        layer: After which one; default: the middle one.
        strength: What the vector is multiplied by; 1 is the difference as it was measured.
        place: Whose vector; default: the mean over all places.

    Yields:
        One line on what is added.

    Raises:
        ConfigError: There is no such layer or place.
        LapisError: The vectors are of other models.
        CheckpointError: The file holds something else.
    """
    vectors = vectors if isinstance(vectors, DifferenceVectors) else DifferenceVectors.open(vectors)
    parts = anatomy(model)
    vectors.check(parts)
    layer = parts.layers // 2 if layer is None else layer
    added_D = vectors.vector(layer, place) * strength

    def add(_module: nn.Module, _args: Any, out: Any) -> Any:
        x_BTD = out[0] if isinstance(out, tuple) else out
        moved_BTD = x_BTD + added_D.to(x_BTD)
        return (moved_BTD, *out[1:]) if isinstance(out, tuple) else moved_BTD

    handle = parts.blocks[layer].register_forward_hook(add)
    try:
        where = "the mean over all places" if place is None else f"place {place}"
        yield (
            f"steered: {strength:g} times the difference of {vectors.info['b']} from {vectors.info['a']} ({where}) is "
            f"added after layer {layer}"
        )
    finally:
        handle.remove()
