"""A model made ready to generate: weights packed once into the order in which the processor reads them.

One token at a time, a model is as fast as its weights can be read. oneDNN reads a packed weight at the memory's full
speed and the usual layout at two thirds of it (benchmarks/results/), with the same sums. A packed model generates and
can be looked into; it has no weights left to train or save. Leaves out quantization; GPUs, where nothing needs packing.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.errors import ConfigError
from lapis.generation.options import Runtime
from lapis.model.adapter import fold
from lapis.model.blocks.standard import Mlp
from lapis.model.heads import LanguageHead
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer


class PackedLinear(nn.Module):
    """A linear layer, y = x W^T + b, whose weight lies in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = None if bias is None else bias.detach()

    @property
    def matrix(self) -> Tensor:
        """The weight in its usual layout, [out, in]; unpacked anew at every call."""
        matrix: Tensor = self._packed.to_dense()
        return matrix

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """activation: "none", or "swish", applied before the sum is rounded."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, activation, [], "")
        return y

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """y * other, multiplied before it is rounded."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, "mul")
        return y


class PackedSwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) in three products; what lies between them takes no pass of its own."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down(self.up.times(x_BTD, self.gate(x_BTD, "swish")))
        return out


def open_ready(folder: str | Path, runtime: Runtime = Runtime()) -> tuple[Transformer, Tokenizer]:  # noqa: B008
    """A folder's model, packed, and its tokenizer, which is opened while the weights are read.

    Args:
        folder: A folder, or a model of the hub.
        runtime: Device and precision.

    Raises:
        CheckpointError: For what is damaged, and for a tokenizer with more tokens than the embedding has rows.
        ConfigError: For a device that is not there.
    """
    device = choose_device(runtime.device)
    checkpoint = open_checkpoint(folder, adapters=True)
    dtype, note = choose_dtype(checkpoint, runtime.dtype, device)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(_tokenizer, checkpoint)
        adapted = checkpoint.adapter is not None
        model = load(checkpoint, dtype, device, placed=None if adapted else _pack)
        model = ready(fold(model) if adapted else model)
        tokenizer = opening.result()
    tokenizer.check_rows(model.config.vocab)
    model.notes = [*model.notes, *([note] if note else [])]
    return model, tokenizer


def choose_device(name: str | None) -> torch.device:
    """The device of that name; by default a GPU where there is one. Raises ConfigError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(
            f'device is "{name}"; this machine has {"cpu, cuda" if torch.cuda.is_available() else "cpu"}'
        ) from None
    return device


def choose_dtype(checkpoint: Checkpoint, name: str | None, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The precision of weights and arithmetic, and a note where it is not what the folder holds.

    Args:
        checkpoint: Opened.
        name: Is what is computed. None is the folder's own, except on a processor without bfloat16 instructions: there
            float32 is faster than either half precision, which it would only imitate.
        device: Where the model runs.

    Returns:
        None for the folder's own precision; and the note, or "".
    """
    if name is not None:
        dtype: torch.dtype = getattr(torch, name)
        return dtype, ""
    held = Counter[str]()
    for info in checkpoint.index.values():
        held[info.dtype] += info.elements
    stored = held.most_common(1)[0][0] if held else "F32"
    if device.type != "cpu" or stored not in ("BF16", "F16") or has_bfloat16():
        return None, ""
    kind = {"BF16": "bfloat16", "F16": "float16"}[stored]
    return torch.float32, (
        f"the weights are {kind} and this processor has no bfloat16 instructions: computed in float32, which is faster "
        f"here and takes twice the memory"
    )


@cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by instructions of its own."""
    try:
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & _processor_flags())
    except OSError:
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(supported and supported())


def _processor_flags() -> set[str]:
    """What /proc/cpuinfo says that the processor can do; x86 calls it flags, ARM Features."""
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(words.split())
    return set()


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = Tokenizer.open(checkpoint)
    _ = tokenizer.end_ids  # asks the chat template, in a process that takes a moment to start
    return tokenizer


@torch.inference_mode()
def ready(model: Transformer) -> Transformer:
    """Packs a model in place and puts it into evaluating mode. Does nothing more where packing does not apply.

    Each weight is dropped as soon as it is packed, so the peak is one weight more. A tied embedding stays beside the
    packed head, since its rows are looked up.

    Args:
        model: Is returned.
    """
    for name in [name for name, _ in model.named_modules()]:  # names only: a list of modules would keep their weights
        _pack(model, name)
    for name, mlp in [(name, module) for name, module in model.named_modules() if isinstance(module, Mlp)]:
        layers: list[nn.Module | None] = [mlp.gate, mlp.up, mlp.down]
        packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
        if len(packed) == 3 and mlp.activation is F.silu:
            model.set_submodule(name, PackedSwiGLU(*packed))
    head = model.head
    if type(head) is LanguageHead and head.matrix.device.type == "cpu" and _packs(head.matrix.dtype):
        model.head = PackedLinear(head.matrix, head.bias)
    return model.eval()


def _pack(model: nn.Module, name: str) -> None:
    """Puts a packed layer in the place of the linear layer of that name, if it is one."""
    module = model.get_submodule(name)
    if type(module) is nn.Linear and module.weight.device.type == "cpu" and _packs(module.weight.dtype):
        model.set_submodule(name, PackedLinear(module.weight, module.bias))


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, has packed linear layers that give the usual results."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    try:
        weight, x = torch.eye(8, dtype=dtype), torch.arange(8, dtype=dtype)[None]
        return torch.equal(PackedLinear(weight, None)(x), x)
    except (AttributeError, RuntimeError):
        return False
