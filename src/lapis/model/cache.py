"""The keys and values of the tokens seen so far, passed to the model as an argument.

A layer with a sliding window keeps only what its window can still see, in the order of the tokens. Padding may stand
anywhere: the cache remembers which of its slots hold real tokens. Leaves out: pages shared between sequences.

Shapes: B batch, T new tokens, S all tokens, K heads of keys, E head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lapis.families.config import ModelConfig


class Place(NamedTuple):
    """Where one layer's keys and values of one new token for each row go, and what of the cache each row sees.

    keys, values: buffers [B, K, slots, E]. first_B, last_B: int64; a row sees its slots first to last, and its new
    token goes to the last. masked: of those, the mask of the forward pass hides some.
    """

    keys: Tensor
    values: Tensor
    first_B: Tensor
    last_B: Tensor
    masked: bool


class Cache:
    """`cache = Cache(model.config, batch=1)`; `model(ids_BT, cache=cache)` appends to it, in place.

    length: tokens appended so far, padding included. capacity: room to start with; it grows by itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int = 256,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.batch, self.length = config, batch, 0
        self.real_BS: Tensor | None = None  # None while every slot holds a real token
        self.positions_BS: Tensor | None = None  # None while positions are 0, 1, 2, ...
        self.in_sight = 0  # of the slots, how many a layer with a window still keeps
        self._slack = 0  # how many of a row's slots hold padding, at most: they take no place in a window
        keyless = {i for i in range(config.layers) if config.mixes_by_state(i) or config.borrows(i)}
        windows = [config.window if config.windowed(layer) else None for layer in range(config.layers)]
        self._layers = [
            _Layer(config.at(layer), batch, 0 if layer in keyless else capacity, window, dtype, device)
            for layer, window in enumerate(windows)
        ]
        self._states: dict[int, tuple[Tensor, Tensor]] = {}
        self._ends: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # first_B and last_B of the layers of this step

    def update(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values; all that this layer's new tokens can see, [B, K, S, E]."""
        return self._layers[layer].append(k_BKTE, v_BKTE, self.in_sight)

    def state(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What `keep` was given last for a layer; twice None before."""
        return self._states.get(layer, (None, None))

    def keep(self, layer: int, recent: Tensor, state: Tensor) -> None:
        """Keeps what a layer without keys knows of the past: its last inputs, and a state; both begin with rows."""
        self._states[layer] = recent, state

    def place(self, layer: int) -> Place:
        """Room for one more token of each row in one layer, for a caller that writes it there; else as `update`.

        A cache that keeps rows of unequal lengths in another way than by padding says so here, row by row.

        Args:
            layer: Its number.
        """
        held = self._layers[layer]
        held.claim(1, self.in_sight)
        ends = held.start, held.end - 1
        if ends not in self._ends:
            if len(self._ends) > 1:  # a step has two kinds of layers at most
                self._ends.clear()
            device = held.keys.device
            first_B, last_B = (torch.full((self.batch,), end, device=device) for end in ends)
            self._ends[ends] = first_B, last_B
        return Place(held.keys, held.values, *self._ends[ends], masked=True)

    def remember(self, positions_BT: Tensor, mask_BT: Tensor | None) -> None:
        """From the first padding (or given position) on, keeps each new slot's position and whether it is real."""
        if self.positions_BS is None or self.real_BS is None:
            before = torch.arange(self.length, device=positions_BT.device).expand(self.batch, -1)
            self.positions_BS, self.real_BS = before, torch.ones_like(before, dtype=torch.bool)
        real_BT = torch.ones_like(positions_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        self.positions_BS = torch.cat((self.positions_BS, positions_BT), 1)
        self.real_BS = torch.cat((self.real_BS, real_BT), 1)
        if self.config.window is not None and mask_BT is not None:
            self._slack = int((~self.real_BS).sum(1).max())

    def advance(self, tokens: int) -> None:
        """The model calls this once per forward, after all layers appended."""
        self.length += tokens
        if self.config.window is not None:
            self.in_sight = min(self.in_sight + tokens, self.config.window - 1 + self._slack)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. Raises ValueError where a window or a state cannot go back."""
        if self._states and length < self.length:
            raise ValueError("a state holds all tokens that it has seen; start with a new cache")
        dropped = self.length - length
        if dropped < 0:
            raise ValueError(f"the cache holds {self.length} tokens; it cannot be cut to {length}")
        in_sight = min(length, (self.config.window or 1) - 1 + self._slack)
        for layer in self._layers:
            layer.drop(dropped, in_sight)
        self.length, self.in_sight = length, in_sight
        self.real_BS = None if self.real_BS is None else self.real_BS[:, :length]
        self.positions_BS = None if self.positions_BS is None else self.positions_BS[:, :length]

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences of the batch, in this order (beams, or rows that are not finished); int64 [B']."""
        self.batch = len(rows)
        self._ends.clear()
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self._states = {layer: (recent[rows], state[rows]) for layer, (recent, state) in self._states.items()}
        self.real_BS = None if self.real_BS is None else self.real_BS[rows]
        self.positions_BS = None if self.positions_BS is None else self.positions_BS[rows]

    @property
    def nbytes(self) -> int:
        states = sum(recent.nbytes + state.nbytes for recent, state in self._states.values())
        return states + sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)


class _Layer:
    """One layer's keys and values: a buffer whose slots [start, end) are filled, in the order of the tokens."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, window: int | None, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.window, self.start, self.end = window, 0, 0
        # capacity 0: a layer that keeps no keys
        self.room = capacity if window is None else min(capacity, window + max(window // 4, 16))
        shape = (batch, config.kv_heads, max(self.room, 1) if capacity else 0, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def append(self, k_BKTE: Tensor, v_BKTE: Tensor, in_sight: int) -> tuple[Tensor, Tensor]:
        first = self.claim(k_BKTE.shape[2], in_sight)
        self.keys[:, :, first : self.end] = k_BKTE
        self.values[:, :, first : self.end] = v_BKTE
        return self.keys[:, :, self.start : self.end], self.values[:, :, self.start : self.end]

    def claim(self, T: int, in_sight: int) -> int:
        """Makes room for T new tokens; the slot of the first of them."""
        if self.window is not None:
            self.start = self.end - in_sight  # older ones are out of sight for ever
        size = self.keys.shape[2]
        if self.end + T > size or (self.window is not None and size > self.room >= self.end - self.start + T):
            self._make_room(T)
        self.end += T
        return self.end - T

    def drop(self, count: int, in_sight: int) -> None:
        if self.window is not None and self.end - count - self.start < in_sight:
            raise ValueError("a sliding window has dropped what would come into sight again; start with a new cache")
        self.end -= count

    def _make_room(self, T: int) -> None:
        """Moves what is in sight to the front of a buffer with room for T more, and no larger than it needs to be."""
        filled = self.end - self.start
        if self.window is None:
            self.room = max(2 * self.room, filled + T)
        else:
            self.room = max(self.room, min(filled + T, self.window + max(self.window // 4, 16)))
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], max(self.room, filled + T), old.shape[3])
            new[:, :, :filled] = old[:, :, self.start : self.end]
            setattr(self, name, new)
        self.start, self.end = 0, filled
