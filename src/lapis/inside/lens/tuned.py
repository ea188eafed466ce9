"""The tuned lens: one affine map per layer that puts its states into the terms of the last one.

A layer's states lie in a space that is turned and shifted against the last layer's, so the plain lens reads early ones
badly. Each map is the ridge regression of the last state on the layer's (Din et al. 2023, arXiv:2303.09435), and it is
kept where it lowers the KL to the final distribution on held-out text, the measure of Belrose et al. 2023
(arXiv:2303.08112); so a tuned lens is nowhere worse than the plain one. Solved in closed form, in about a minute for
half a billion parameters, with 16 D^2 bytes of memory per layer. Leaves out: gradient steps on the KL itself.

Shapes: N tokens, L layers (maps: of the embedding and all layers but the last), D model dim.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lapis.checkpoint.commit import commit
from lapis.checkpoint.files import contained, read_json
from lapis.checkpoint.tensor_file import read_header, read_tensors, write_tensors
from lapis.errors import CheckpointError, DataError, LapisError
from lapis.inside.lens.readout import read
from lapis.inside.prompt import as_tokenizer
from lapis.inside.trace import Anatomy, anatomy, trace
from lapis.text.corpus.corpus import Source, documents
from lapis.text.tokenizer.tokenizer import Tokenizer

WEIGHTS, INFO = "tuned_lens.safetensors", "tuned_lens.json"
RIDGES = (0.001, 0.01, 0.1, 1.0)  # in units of the features' variance
JUDGES = 96  # held-out tokens on which the KL is measured


@dataclass
class TunedLens:
    """maps_LDD, shifts_LD: state -> state + state @ map + shift; float32. info: where they come from, and the KLs."""

    maps_LDD: Tensor
    shifts_LD: Tensor
    info: dict[str, Any]
    source: str = "tuned"

    def translate(self, states_PND: Tensor) -> Tensor:
        """States of P places, [P, L + 1, D], from the embedding on; the last ones stay as they are."""
        wide_PLD = states_PND[:, :-1].float()
        maps_LDD, shifts_LD = self.maps_LDD.to(wide_PLD.device), self.shifts_LD.to(wide_PLD.device)
        moved_PLD = wide_PLD + torch.einsum("pld,lde->ple", wide_PLD, maps_LDD) + shifts_LD
        return torch.cat((moved_PLD.to(states_PND.dtype), states_PND[:, -1:]), 1)

    def check(self, parts: Anatomy) -> None:
        """Raises LapisError where these maps were made for another model."""
        if self.info["fingerprint"] != fingerprint(parts):
            raise LapisError(f"lens: {self.source} was made for another model than {parts.name}; make one for this")

    def save(self, out: Path | str, *, overwrite: bool = False) -> None:
        """A folder of safetensors and JSON, committed whole."""
        with commit(out, kind="tuned lens", overwrite=overwrite) as staging:
            write_tensors(staging.path / WEIGHTS, {"maps": self.maps_LDD, "shifts": self.shifts_LD})
            (staging.path / INFO).write_text(json.dumps(self.info, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: Path | str) -> "TunedLens":
        """Raises CheckpointError for a folder that does not hold a tuned lens, or a damaged one."""
        root = Path(folder)
        if not (root / INFO).exists():
            what = f"holds no {INFO}" if root.is_dir() else "is a file" if root.exists() else "there is no such folder"
            raise CheckpointError(f"{folder}: {what}; make a tuned lens with --tune FILES")
        info, path = read_json(contained(root, INFO)), contained(root, WEIGHTS)
        shapes = {name: tensor.shape for name, tensor in read_header(path).tensors.items()}
        try:
            L, D, _ = int(info["layers"]), int(info["dim"]), str(info["fingerprint"])
        except (TypeError, KeyError, ValueError):
            raise CheckpointError(
                f"{root / INFO}: layers, dim and fingerprint are missing; make the lens again"
            ) from None
        if shapes != {"maps": (L, D, D), "shifts": (L, D)}:
            raise CheckpointError(f"{path}: holds {shapes}, not {L} maps of {D}x{D}; make the lens again")
        tensors = read_tensors(path)
        return cls(tensors["maps"], tensors["shifts"], info, str(folder))


@torch.no_grad()
def tune(
    model: nn.Module,
    tokenizer: Any,
    files: Source | Sequence[Source],
    *,
    tokens: int = 6144,
    length: int = 256,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> TunedLens:
    """Fits a tuned lens on the first `tokens` tokens of text files; the next ones, a tenth as many, judge it.

    Args:
        model: lapis' own, or a causal one of transformers.
        tokenizer: The model's.
        files: Text.
        tokens: To fit the maps on.
        length: Tokens of a row.
        name: What the model is called.
        progress: Is called with (tokens done, tokens in all).

    Raises:
        DataError: There is too little text.
    """
    parts, words = anatomy(model, name), as_tokenizer(tokenizer)
    length = min(length, parts.context)
    judged = max(tokens // 10, JUDGES)
    moments = [_Moments(parts.matrix.shape[1]) for _ in range(parts.layers)]
    held_out: list[Tensor] = []
    done = 0
    for ids in _rows(words, files, length, tokens + judged):
        places = torch.arange(len(ids), device=parts.matrix.device)
        run = trace(parts, torch.tensor([ids], device=places.device), (torch.zeros_like(places), places))
        states_LND = torch.stack([run.embed_PD, *run.after_LPD]).float()
        if done < tokens:
            for layer, moment in enumerate(moments):
                moment.add(states_LND[layer], states_LND[-1])
        else:
            held_out.append(states_LND.cpu())
        done += len(ids)
        if progress:
            progress(done, tokens + judged)
    if not held_out:
        raise DataError(f"lens: {done:,} tokens of text; a tuned lens needs {tokens + judged:,}, give more text")
    held_LND = torch.cat(held_out, 1)
    held_LND = held_LND[:, :: max(1, held_LND.shape[1] // JUDGES)][:, :JUDGES].to(parts.matrix.device)
    before = best = _kl(parts, held_LND)
    D = held_LND.shape[2]
    maps_LDD, shifts_LD = torch.zeros(parts.layers, D, D), torch.zeros(parts.layers, D)
    ridges: list[float | None] = [None] * parts.layers
    for ridge in RIDGES:
        solved = [moment.solve(ridge) for moment in moments]
        moved = [h + h @ m.to(h) + s.to(h) for h, (m, s) in zip(held_LND[:-1], solved, strict=True)]
        reached = _kl(parts, torch.stack([*moved, held_LND[-1]]))
        for layer in range(parts.layers):
            if reached[layer] < best[layer]:
                maps_LDD[layer], shifts_LD[layer] = solved[layer]
                ridges[layer] = ridge
        best = [min(pair) for pair in zip(best, reached, strict=True)]
    info = {
        "layers": parts.layers, "dim": D, "tokens": done, "fingerprint": fingerprint(parts), "ridge": ridges,
        "kl_before": before, "kl_after": best,
    }  # fmt: skip
    return TunedLens(maps_LDD, shifts_LD, info)


def fingerprint(parts: Anatomy) -> str:
    """sha256 of the final norm and of some rows of the head, rounded to bfloat16: enough to tell models apart, whatever
    their names and their precision."""
    total = hashlib.sha256(f"{parts.layers} {tuple(parts.matrix.shape)}".encode())
    for tensor in (*parts.norm.parameters(), parts.matrix[:: max(1, len(parts.matrix) // 64)]):
        total.update(tensor.detach().bfloat16().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class _Moments:
    """First and second moments of one layer's states and of their products with the last ones, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sums = torch.zeros(2, dim, dtype=torch.float64)
        self.own, self.cross = (torch.zeros(dim, dim, dtype=torch.float64) for _ in "ab")

    def add(self, states_ND: Tensor, last_ND: Tensor) -> None:
        self.count += len(states_ND)
        self.sums += torch.stack((states_ND, last_ND)).double().sum(1).cpu()
        self.own += (states_ND.T @ states_ND).cpu()
        self.cross += (states_ND.T @ (last_ND - states_ND)).cpu()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The map and the shift of the ridge regression of (last - state) on the state, features scaled to one."""
        mean, last = self.sums / self.count
        own = self.own / self.count - torch.outer(mean, mean)
        cross = self.cross / self.count - torch.outer(mean, last - mean)
        spread = own.diagonal().clamp(min=1e-12).sqrt()
        scaled = own / torch.outer(spread, spread) + ridge * torch.eye(len(mean), dtype=torch.float64)
        map_DD = torch.linalg.solve(scaled, cross / spread[:, None]) / spread[:, None]
        return map_DD.float(), (last - mean - mean @ map_DD).float()


def _kl(parts: Anatomy, states_LND: Tensor) -> list[float]:
    """Mean KL(final || layer) over the tokens, in nats, for the embedding and each layer but the last."""
    states_NLD = states_LND.transpose(0, 1).to(parts.matrix.dtype)
    readout = read(parts.norm(states_NLD), parts.matrix, parts.bias, top=1, cap=parts.cap)
    means: list[float] = readout.kl_PN.mean(0)[:-1].tolist()
    return means


def _rows(tokenizer: Tokenizer, files: Source | Sequence[Source], length: int, tokens: int) -> Iterator[list[int]]:
    """Rows of `length` tokens, document after document, until there are enough."""
    row: list[int] = []
    for document in documents(files):
        row += tokenizer.encode(document.text)
        while len(row) >= length:
            yield row[:length]
            row, tokens = row[length:], tokens - length
            if tokens <= 0:
                return
    if row:
        yield row
