"""The parts of a block, each in fewer calls: one product for queries, keys and values, one for gate and up.

Each takes the place of the part that it is made from, and gives what that gives, within rounding; the block that calls
them is the usual one. Where a step brings one token for each row, the compiled kernels do all that lies between two
products. Rows may differ in length: each sees its own slots of the cache (`Cache.place`), and its numbers do not depend
on the rows beside it.

Shapes: B batch, T time, D model dim, H heads, K heads of keys, E head dim, F inner dim of the MLP.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lapis.generation.kernels.build import Kernels
from lapis.generation.kernels.linear import WeightLayout, joined, lay_out
from lapis.model.blocks.attention import Attention, Shared
from lapis.model.blocks.norm import Norm, RMSNorm
from lapis.model.blocks.standard import Mlp
from lapis.model.cache import Cache, Place

LANES = 16  # numbers that the kernels take at once


class ReadyAttention(Attention):
    """As Attention, with one product for queries, keys and values."""

    def __init__(self, attention: Attention, qkv: nn.Module, o: nn.Module, kernels: Kernels | None) -> None:
        nn.Module.__init__(self)
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.near, self.turns, self.normed_whole = attention.near, attention.turns, attention.normed_whole
        self.heads, self.kv_heads, self.turns_halves = attention.heads, attention.kv_heads, attention.turns_halves
        self.qkv, self.core = qkv, attention.core
        self.o = o  # type: ignore[assignment]
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self._eps = 0.0
        self._gains: tuple[Tensor, ...] = ()
        self._gain_pointers: tuple[int | None, int | None] = (None, None)
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            self._eps, self._gains = self.q_norm.eps, (wide_gain(self.q_norm), wide_gain(self.k_norm))
            self._gain_pointers = self._gains[0].data_ptr(), self._gains[1].data_ptr()
        plain = isinstance(self.q_norm, RMSNorm | None) and not self.normed_whole and not self.core.cap
        fits = plain and self.turns_halves and self.head_dim % LANES == 0
        self._attend = kernels.attend if kernels is not None and fits else None

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads_BTHE = self.qkv(x_BTD).view(*x_BTD.shape[:2], -1, self.head_dim)
        q_BTHE, k_BTKE, v_BTKE = heads_BTHE.split((self.heads, self.kv_heads, self.kv_heads), 2)
        return q_BTHE, k_BTKE, v_BTKE

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None) -> Tensor:
        single = x_BTD.shape[1] == 1 and shared.query_gain is None
        if self._attend is not None and cache is not None and single:
            out_B1D: Tensor = self.o(self._step(self.qkv(x_BTD), shared, cache.place(self.layer)))
            return out_B1D
        return super().forward(x_BTD, shared, cache)

    def _step(self, qkv_B1N: Tensor, shared: Shared, place: Place) -> Tensor:
        """What `project`, the norms, the turning, the cache and the core do, for one token of each row."""
        B, E = len(qkv_B1N), self.head_dim
        mixed_B1D = qkv_B1N.new_empty(B, 1, self.heads * E)
        cos = sin = mask = None
        turn = hidden = 0
        rotation = shared.near_rotation if self.near else shared.rotation
        if rotation is not None and self.turns:
            cos, sin, turn = rotation[0].data_ptr(), rotation[1].data_ptr(), E if rotation[0].numel() > E else 0
        view = (shared.near if self.near else shared.full).mask if place.masked else None
        if view is not None:
            mask, hidden = view.data_ptr(), view.shape[-1] if len(view) > 1 else 0
        assert self._attend is not None
        if self._attend(
            qkv_B1N.data_ptr(), *self._gain_pointers, self._eps, cos, sin, turn, place.keys.data_ptr(),
            place.values.data_ptr(), place.keys.shape[2], place.first_B.data_ptr(), place.last_B.data_ptr(), mask,
            hidden, self.core.scale, mixed_B1D.data_ptr(), B, self.heads, self.kv_heads, E, torch.get_num_threads(),
        ):  # fmt: skip
            raise MemoryError
        return mixed_B1D


class ReadyMlp(nn.Module):
    """As Mlp, with one product for gate and up."""

    def __init__(self, mlp: Mlp, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down, self.act, self.gated = gate_up, down, mlp.act, mlp.gate is not None
        self.biased = mlp.down.bias is not None

    def forward(self, x_BTD: Tensor, weights: Tensor | None = None) -> Tensor:
        inner_BTF: Tensor = self.gate_up(x_BTD)
        if self.gated:
            gate_BTF, up_BTF = inner_BTF.chunk(2, -1)
            inner_BTF = self.act(gate_BTF).mul_(up_BTF)
        else:
            inner_BTF = self.act(inner_BTF)
        if weights is not None and not self.biased:
            inner_BTF, weights = inner_BTF.mul_(weights), None
        out_BTD: Tensor = self.down(inner_BTF)
        return out_BTD if weights is None else out_BTD * weights


class ReadyNorm(nn.Module):
    """As RMSNorm, in one call."""

    def __init__(self, norm: RMSNorm, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self._gain = wide_gain(norm)
        self._dim = len(self._gain)
        self._gain_pointer, self._rms_norm = self._gain.data_ptr(), kernels.rms_norm

    @property
    def gain(self) -> Tensor:
        """What the normed values are multiplied by, [D] float32."""
        return self._gain

    def forward(self, x: Tensor) -> Tensor:
        x, y = x.contiguous(), torch.empty_like(x)
        if self._rms_norm(x.data_ptr(), self._gain_pointer, self.eps, y.data_ptr(), x.numel() // self._dim, self._dim):
            raise MemoryError
        return y


def wide_gain(norm: RMSNorm) -> Tensor:
    """What a norm multiplies by, in float32."""
    return norm.gain.detach().float().contiguous()


def ready_attention(attention: Attention, layout: WeightLayout) -> nn.Module:
    """The attention, in fewer calls where its weights can be laid out.

    Args:
        attention: Of a block whose weights are there.
        layout: For the weights' dtype.
    """
    qkv = lay_out(*joined([attention.q, attention.k, attention.v]), layout)
    o = lay_out(attention.o.weight, attention.o.bias, layout)
    return attention if qkv is None or o is None else ReadyAttention(attention, qkv, o, layout.kernels)


def ready_mlp(mlp: Mlp, layout: WeightLayout) -> nn.Module:
    """The MLP, in fewer calls where its weights can be laid out; the arguments are those of `ready_attention`."""
    gate_up = lay_out(*joined([mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]), layout)
    down = lay_out(mlp.down.weight, mlp.down.bias, layout)
    return mlp if gate_up is None or down is None else ReadyMlp(mlp, gate_up, down)


def ready_norm(norm: Norm, dtype: torch.dtype, layout: WeightLayout) -> nn.Module:
    """The norm in one call where it is an RMSNorm on a CPU, in the weights' dtype."""
    fits = isinstance(norm, RMSNorm) and norm.weight.device.type == "cpu" and norm.weight.dtype == dtype
    if layout.kernels is None or not fits or len(norm.weight) % LANES:
        return norm
    return ReadyNorm(cast(RMSNorm, norm), layout.kernels)
