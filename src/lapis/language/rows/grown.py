"""A model that reads new tokens before it is written: an embedding with more rows.

Shapes: B rows of text, T places, D model dim, N new tokens.
"""

import torch
from torch import Tensor, nn

from lapis.model.transformer import Embed


class GrownEmbed(nn.Module):
    """An embedding with rows for new ids from `first` on, which alone are trained."""

    def __init__(self, inner: Embed, rows_ND: Tensor, first: int) -> None:
        super().__init__()
        self.inner, self.first = inner, first
        self.rows = nn.Parameter(rows_ND.clone())

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    @property
    def layers(self) -> nn.Module | None:
        return self.inner.layers

    def forward(self, ids_BT: Tensor, positions: Tensor, types_BT: Tensor | None) -> Tensor:
        new_BT = ids_BT >= self.first
        # the old row of a new token is id 0's, and is replaced below; what is added to a row stays
        x_BTD: Tensor = self.inner(torch.where(new_BT, 0, ids_BT), positions, types_BT)
        own_BTD = nn.functional.embedding((ids_BT - self.first).clamp_min(0), self.rows).to(x_BTD.dtype)
        difference_BTD = (own_BTD - self.inner.weight[0]) * self.inner.scale
        return torch.where(new_BT[..., None], x_BTD + difference_BTD, x_BTD)
