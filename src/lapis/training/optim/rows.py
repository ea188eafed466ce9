"""AdamW for rows of single tokens: a row moves as far as its token was met, and tokens learn from those they resemble.

A row that scores a token gets a gradient from every place, also where its token is not: a small one, always away from
what was read. AdamW divides by the size of the gradient, so that rows of rare tokens would move as fast as those of
frequent ones, and be pushed down between one time and the next. Here the step of a row is scaled by the typical size
of its gradient over that of all rows, where that is below 1. One row alone moves as AdamW would have it.

New words of a language share stems and endings, and most are read a few times. So a row may also be the sum of what its
features learned (`features_of`): which characters begin the token, end it and stand in it, its length, whether a space
precedes it. What a feature learns moves all rows that have it; it is kept in the rows, and nothing of it is left in the
model.

Shapes: N rows, F features, D model dim.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lapis.training.distributed.pieces import piece_like, whole

SHARED = 0.5  # rate of features, as a share of the rate of rows
LONG = 8  # characters, from which on tokens are equally long


class RowsAdamW(torch.optim.Optimizer):
    """AdamW without weight decay; parameters are [N, D].

    Args:
        params: As in torch, with the learning rate of each group.
        lr: The same.
        features: Of a parameter: sparse [N, F], by how much each feature counts in each row.
    """

    def __init__(self, params: Iterable[Any], lr: float, features: Mapping[Tensor, Tensor] | None = None) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8})
        self.features = dict(features or {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for rows_ND in group["params"]:
                if rows_ND.grad is None:
                    continue
                state = self.state[rows_ND]
                move_ND = _direction(state, "", rows_ND.grad, group)
                if rows_ND in self.features:
                    mix_NF, grad_ND = self.features[rows_ND], whole(rows_ND.grad)
                    learned_FD = _direction(state, "features_", torch.sparse.mm(mix_NF.t(), grad_ND), group)
                    move_ND += piece_like(SHARED * torch.sparse.mm(mix_NF, learned_FD), rows_ND)
                rows_ND.sub_(group["lr"] * move_ND)


def _direction(state: dict[str, Any], prefix: str, grad_ND: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A step of AdamW at a rate of 1, for each row as far as it was met; the moments are kept under `prefix`."""
    names = [prefix + name for name in ("step", "exp_avg", "exp_avg_sq")]
    if names[0] not in state:
        state[names[0]] = torch.zeros((), device=grad_ND.device)
        state[names[1]], state[names[2]] = torch.zeros_like(grad_ND), torch.zeros_like(grad_ND)
    count, mean_ND, square_ND = (state[name] for name in names)
    first, second = group["betas"]
    count += 1
    mean_ND.lerp_(grad_ND, 1 - first)
    square_ND.mul_(second).addcmul_(grad_ND, grad_ND, value=1 - second)
    of_row_N1 = square_ND.mean(1, keepdim=True)
    met_N1 = (of_row_N1 / of_row_N1.mean().clamp_min(1e-30)).sqrt().clamp_max(1.0)
    size_ND = (square_ND / (1 - second ** float(count))).sqrt_().add_(group["eps"])
    step_ND: Tensor = mean_ND / size_ND * (met_N1 / (1 - first ** float(count)))
    return step_ND


def features_of(texts: Sequence[str]) -> Tensor | None:
    """What tokens have in common: sparse [N, F], float32, or None where no two have anything.

    Args:
        texts: Of each token, as it reads.
    """
    counted = [_features(text) for text in texts]
    common = Counter(name for each in counted for name in each)
    places: dict[tuple[str, str], int] = {}
    rows, columns, values = list[int](), list[int](), list[float]()
    for row, each in enumerate(counted):
        for name, value in each.items():
            if common[name] > 1:
                rows.append(row)
                columns.append(places.setdefault(name, len(places)))
                values.append(value)
    if not places:
        return None
    shape = (len(texts), len(places))
    mix_NF = torch.sparse_coo_tensor(torch.tensor([rows, columns]), torch.tensor(values), shape, check_invariants=True)
    return mix_NF.coalesce()


def _features(text: str) -> dict[tuple[str, str], float]:
    bare = text.strip()
    shared: dict[tuple[str, str], float] = {("space", ""): 1.0} if text[:1].isspace() else {}
    shared["length", str(min(len(bare), LONG))] = 1.0
    for size, share in ((1, 1.0), (2, 0.7)):
        if len(bare) >= size:
            shared["first", bare[:size]] = shared["last", bare[-size:]] = share
    for character in bare:
        shared["holds", character] = shared.get(("holds", character), 0.0) + 1 / len(bare)
    return shared
