"""Matrices in MXFP4, read as bfloat16: 16 numbers of four bits, and a power of two for each 32 of them.

`NAME_blocks` [X, R, G, 16] holds two numbers in a byte, the lower half first, and `NAME_scales` [X, R, G] exponents
plus 127 (OCP Microscaling Formats 1.0, section 5). Here they are one tensor NAME, [X, 32 G, R]: of each expert X the
transpose, as such models hold it in memory. Leaves out writing MXFP4.
"""

from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING

from lapis.checkpoint.store import Checkpoint
from lapis.checkpoint.tensor_file import TensorInfo
from lapis.errors import CheckpointError
from lapis.wording import format_count

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the three lower bits; the fourth is the sign
BIAS = 127
WIDTH = 2  # bytes of a bfloat16


@dataclass
class Unpacked:
    """What `Checkpoint.computed` is for such a folder. The expert that was read last is kept: it is read in pieces."""

    stored: Checkpoint
    packed: dict[str, TensorInfo]
    digest: str = "mxfp4"
    _last: tuple[str, int, "Tensor"] | None = None
    _lock: Lock = field(default_factory=Lock, repr=False)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """As `Checkpoint.read_into`."""
        if name not in self.packed:
            self.stored.read_into(name, offset, buffer)
            return
        import torch

        _, columns, rows = self.packed[name].shape
        size = columns * rows * WIDTH
        done = 0
        while done < len(buffer):
            expert, begin = divmod(offset + done, size)
            raw = self._expert(name, expert).view(torch.uint8).flatten().numpy().data
            part = raw[begin : begin + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _expert(self, name: str, expert: int) -> "Tensor":
        with self._lock:
            if self._last is None or self._last[:2] != (name, expert):
                blocks, scales = (self.stored.read_rows(name + end, expert, expert + 1)[0] for end in (BLOCKS, SCALES))
                self._last = name, expert, dequantize(blocks, scales).t().contiguous()
            return self._last[2]


def dequantize(blocks_RGB: "Tensor", scales_RG: "Tensor") -> "Tensor":
    """The numbers of one matrix, bfloat16 [R, 32 G]; a power of two leaves all their bits as they are.

    Args:
        blocks_RGB: uint8 [R, G, 16].
        scales_RG: uint8 [R, G].
    """
    import torch

    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16)
    halves = torch.stack((blocks_RGB & 15, blocks_RGB >> 4), -1).flatten(-2)
    numbers = table[halves.int()]
    return torch.ldexp(numbers, scales_RG.int()[..., None] - BIAS).to(torch.bfloat16).flatten(-2)


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The same folder with bfloat16 in the place of its MXFP4 tensors; itself where it has none.

    Raises:
        CheckpointError: Blocks have no scales beside them, or scales of another shape.
    """
    index, packed = {}, {}
    for name, info in checkpoint.index.items():
        if name.endswith(BLOCKS) and info.dtype == "U8":
            plain, scales = name.removesuffix(BLOCKS), checkpoint.index.get(name.removesuffix(BLOCKS) + SCALES)
            if scales is None:
                raise CheckpointError(
                    f"{checkpoint.source}: {name} has no {plain.rpartition('.')[2] + SCALES} beside it; fetch the "
                    "model again"
                )
            if len(info.shape) != 4 or info.shape[3] != 16 or (scales.dtype, scales.shape) != ("U8", info.shape[:3]):
                raise CheckpointError(
                    f"{checkpoint.source}: {name} is {list(info.shape)} and its scales are {list(scales.shape)}; "
                    "expected [experts, rows, groups, 16] and the same without the 16"
                )
            count, rows, groups, _ = info.shape
            shape = (count, 32 * groups, rows)
            packed[plain] = TensorInfo(info.file, "BF16", shape, 0, count * 32 * groups * rows * WIDTH)
            index[plain] = packed[plain]
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in checkpoint.index):
            index[name] = info
    if not packed:
        return checkpoint
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    note = format_count(len(packed), "tensor in MXFP4 is", "tensors in MXFP4 are")
    note += " read as bfloat16; what is written of them is bfloat16, too"
    headers = {
        file: replace(header, tensors={name: index[name] for name in map(_plain, header.tensors) if name in index})
        for file, header in checkpoint.headers.items()
    }
    return replace(
        checkpoint, config=config, index=index, headers=headers, notes=[*checkpoint.notes, note],
        computed=Unpacked(checkpoint, packed),
    )  # fmt: skip


def _plain(name: str) -> str:
    return name.removesuffix(BLOCKS)
