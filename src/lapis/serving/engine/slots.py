"""Keys and values of several sequences, each in a slot of its own, which sequences enter and leave.

A slot keeps what it has read after its sequence has left, so that a later prompt which begins alike needs to read only
the rest. The first slots are those that are decoded together: their tokens are padded on the right, and a mask hides
what lies behind each sequence's end. Memory is reserved for the whole context and taken page by page as it is written
to. Leaves out who is in which slot, and when: batch.py.

Shapes: B slots decoded together, R slots, T new tokens, S tokens, K heads of keys, E head dim.
"""

import math
import mmap
from itertools import takewhile

import torch
from torch import Tensor

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.model.cache import Cache, Place


def slot_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes."""
    return sum(2 * own.kv_heads * own.head_dim * dtype.itemsize for own in map(config.at, _with_keys(config)))


def _with_keys(config: ModelConfig) -> list[int]:
    """The layers that have keys of their own."""
    return [layer for layer in range(config.layers) if not config.borrows(layer)]


class Slots:
    """rows: slots in all. room: tokens in each. held: the tokens whose keys and values each slot has, in order."""

    def __init__(self, config: ModelConfig, rows: int, room: int, dtype: torch.dtype, device: torch.device) -> None:
        if config.delta is not None:
            raise ConfigError(f"serve: {config.family} keeps states, which slots do not hold; use lapis chat")
        self.config, self.rows, self.room = config, rows, room
        shapes = [(rows, own.kv_heads, room, own.head_dim) for own in map(config.at, _with_keys(config))]
        self.keys = [_reserve(shape, dtype, device) for shape in shapes]
        self.values = [_reserve(shape, dtype, device) for shape in shapes]
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self.used = [0] * rows  # when each was last written to, by a clock of its own
        self._clock = 0

    def one(self, slot: int) -> "SlotCache":
        """The cache of one slot, which goes on where the slot ends."""
        return SlotCache(self, slot)

    def first(self, count: int) -> "BatchCache":
        """The cache of the first `count` slots, for one more token in each."""
        return BatchCache(self, count)

    def append(self, slot: int, tokens: list[int]) -> None:
        """Takes note of what a pass has written."""
        self._clock += 1
        self.held[slot] += tokens
        self.used[slot] = self._clock

    def cut(self, slot: int, length: int) -> None:
        """Forgets all but the first tokens of a slot."""
        del self.held[slot][length:]

    def clear(self, slot: int) -> None:
        """Forgets a slot and what is written in it: a number that is none would spoil whoever comes next."""
        for store in (*self.keys, *self.values):
            store[slot, :, : len(self.held[slot]) + 1] = 0
        self.cut(slot, 0)

    def shared(self, slot: int, tokens: list[int]) -> int:
        """Tokens at the start of a prompt that a slot has, short of the last, which has to be read."""
        pairs = zip(self.held[slot], tokens[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def swap(self, a: int, b: int) -> None:
        """Exchanges two slots."""
        if a == b:
            return
        length = max(len(self.held[a]), len(self.held[b]))
        for store in (*self.keys, *self.values):
            before = store[a, :, :length].clone()
            store[a, :, :length] = store[b, :, :length]
            store[b, :, :length] = before
        self.held[a], self.held[b] = self.held[b], self.held[a]
        self.used[a], self.used[b] = self.used[b], self.used[a]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of a slot into another."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]
        self.held[target] = self.held[source][:length]


class SlotCache(Cache):
    """One sequence in its slot; to the model a cache like any other. A layer with a window sees no further back."""

    def __init__(self, slots: Slots, slot: int) -> None:
        self.config, self.batch, self.length = slots.config, 1, len(slots.held[slot])
        self.real_BS = self.positions_BS = None
        self._slots, self._slot = slots, slot
        self._sights: dict[bool, Tensor] = {}  # of this step, the slots that layers with and without a window see
        self.in_sight = min(self.length, (slots.config.window or 1) - 1)

    def update(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """As in Cache."""
        first, T = self.length, k_BKTE.shape[2]
        begin = first - self.in_sight if self.config.windowed(layer) else 0
        stores = self._slots.keys[layer][self._slot][None], self._slots.values[layer][self._slot][None]
        for store, new in zip(stores, (k_BKTE, v_BKTE), strict=True):
            store[:, :, first : first + T] = new
        keys, values = (store[:, :, begin : first + T] for store in stores)
        return keys, values

    def place(self, layer: int) -> Place:
        """As in Cache."""
        windowed = self.config.windowed(layer)
        if windowed not in self._sights:
            begin = self.length - self.in_sight if windowed else 0
            self._sights[windowed] = torch.tensor([[begin], [self.length]], device=self._slots.keys[0].device)
        first_B, last_B = self._sights[windowed]
        keys, values = (store[layer][self._slot][None] for store in (self._slots.keys, self._slots.values))
        return Place(keys, values, first_B, last_B, masked=False)

    def advance(self, tokens: int) -> None:
        """As in Cache."""
        self._sights.clear()
        self.length += tokens
        self.in_sight = min(self.length, (self.config.window or 1) - 1)


class BatchCache(Cache):
    """The first slots together, for one more token in each. positions_B1: where that stands in its sequence."""

    def __init__(self, slots: Slots, count: int) -> None:
        self.config, self.batch = slots.config, count
        device = slots.keys[0].device
        lengths_B = torch.tensor([len(held) for held in slots.held[:count]], device=device)
        self.length = max(len(held) for held in slots.held[:count])  # and the new tokens make one more
        places_S = torch.arange(self.length + 1, device=device)
        self.positions_B1 = lengths_B[:, None]
        self.real_BS = places_S <= self.positions_B1
        self.positions_BS = places_S.expand(count, -1)
        self.in_sight = self.length  # whatever the window; the mask hides what is too far back
        self._firsts: dict[bool, Tensor] = {}  # the first slots in sight of layers with and without a window
        self._places = torch.arange(count, device=device), lengths_B
        self._slots = slots

    def update(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """As in Cache."""
        keys, values = self._slots.keys[layer][: self.batch], self._slots.values[layer][: self.batch]
        rows_B, places_B = self._places
        keys[rows_B, :, places_B] = k_BKTE[:, :, 0]  # (scatter_ would copy the whole of what it writes into)
        values[rows_B, :, places_B] = v_BKTE[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def place(self, layer: int) -> Place:
        """As in Cache. Each row ends where it ends, and sees no further back than its window; no mask is needed."""
        windowed = self.config.windowed(layer)
        if windowed not in self._firsts:
            lengths_B = self.positions_B1[:, 0]
            back = self.config.window if windowed and self.config.window is not None else self.length + 1
            self._firsts[windowed] = (lengths_B - back + 1).clamp_(min=0)
        keys, values = self._slots.keys[layer][: self.batch], self._slots.values[layer][: self.batch]
        return Place(keys, values, self._firsts[windowed], self.positions_B1, masked=False)

    def remember(self, positions_BT: Tensor, mask_BT: Tensor | None) -> None:
        """Nothing: positions and what is real are known from the start."""

    def advance(self, tokens: int) -> None:
        """Nothing: a cache of this kind is for one step."""


def _reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU without a page of memory until something is written there."""
    count = math.prod(shape)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype, count=count).view(shape)
