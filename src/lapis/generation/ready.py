"""A model made ready to generate: few calls for each token, and weights as they are read fastest.

One token at a time, a model is as fast as its weights can be read, so all that is not reading is taken out: the parts
of a block are exchanged for ones that do the same in fewer calls (kernels/). A model that is ready generates and can
be looked into; it has no layers left to train or save. Leaves out GPUs, where nothing is exchanged.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.errors import ConfigError
from lapis.generation.kernels.build import Kernels, compiled
from lapis.generation.kernels.layers import ready_attention, ready_mlp, ready_norm
from lapis.generation.kernels.linear import lay_out
from lapis.generation.options import Runtime
from lapis.model.adapter import fold
from lapis.model.blocks.attention import Attention
from lapis.model.blocks.norm import Norm
from lapis.model.blocks.standard import TransformerBlock
from lapis.model.heads import LanguageHead
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer


def open_ready(folder: str | Path, runtime: Runtime = Runtime()) -> tuple[Transformer, Tokenizer]:  # noqa: B008
    """A folder's model, ready to generate, and its tokenizer, which is opened while the weights are read.

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
        model = load(checkpoint, dtype, device, placed=None if adapted else _placed)
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
def ready(model: Transformer, *, compile: bool = True) -> Transformer:
    """Lays a model's weights out, in place, and puts it into evaluating mode; where that does not apply, nothing more.

    Each block's weights are dropped as soon as they are laid out, so the peak is one block more. The compiled kernels
    read a weight as it is, so a tied embedding serves as the head's too.

    Args:
        model: Is returned.
        compile: Whether kernels are compiled for this processor, where it has a compiler.
    """
    dtype = model.embed.weight.dtype if model.config.image is None else next(model.parameters()).dtype
    kernels = compiled(dtype, dtype) if compile and next(model.parameters()).device.type == "cpu" else None
    for number in range(len(model.blocks)):
        _ready_block(model, number, kernels)
    for name, norm in list(model.norm.named_children()):
        setattr(model.norm, name, ready_norm(cast(Norm, norm), dtype, kernels))
    if type(model.head) is LanguageHead:
        model.head = lay_out(model.head.matrix, model.head.bias, kernels) or model.head
    return model.eval()


def _placed(model: nn.Module, name: str) -> None:
    """Lays out a block as soon as the last of its weights is there."""
    place, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    if place == "blocks" and not any(p.is_meta for p in model.get_submodule(f"blocks.{number}").parameters()):
        weight = next(model.get_submodule(f"blocks.{number}").parameters())
        kernels = compiled(weight.dtype, weight.dtype) if weight.device.type == "cpu" else None
        _ready_block(cast(Transformer, model), int(number), kernels)


def _ready_block(model: Transformer, number: int, kernels: Kernels | None) -> None:
    """Lays out a block whose weights are there; one that is laid out already stays."""
    block = cast(TransformerBlock, model.blocks[number])
    dtype = next(block.norm.parameters()).dtype
    if type(block.attn) is Attention and all(type(block.attn.get_submodule(name)) is nn.Linear for name in "qkvo"):
        block.attn = ready_attention(block.attn, kernels)  # type: ignore[assignment]
    block.mlp = ready_mlp(block.mlp, kernels)
    for name, norm in list(block.norm.named_children()):
        setattr(block.norm, name, ready_norm(cast(Norm, norm), dtype, kernels))
