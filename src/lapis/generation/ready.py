"""A model made ready to generate: few calls for each token, and weights as they are read fastest.

One token at a time, a model is as fast as its weights can be read, so all that is not reading is taken out: the parts
of a block are exchanged for ones that do the same in fewer calls (kernels/). A model that is ready generates and can
be looked into; it has no layers left to train or save. Leaves out GPUs, where nothing is exchanged.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.checkpoint.tensor_file import torch_dtype
from lapis.errors import ConfigError
from lapis.generation.kernels.build import has_bfloat16
from lapis.generation.kernels.layers import ready_attention, ready_mlp, ready_norm
from lapis.generation.kernels.linear import WeightLayout, lay_out
from lapis.generation.options import DecodingRuntime
from lapis.model.adapter import fold
from lapis.model.blocks.attention import Attention
from lapis.model.blocks.norm import Norm
from lapis.model.blocks.standard import Mlp, TransformerBlock
from lapis.model.heads import LanguageHead
from lapis.model.load import load
from lapis.model.reading.load import load_readable, outline_of
from lapis.model.reading.readable import ReadableModel
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer

INT8_NOTE = (
    "int8: each row of a weight is rounded to 255 steps, so numbers and texts differ from those of the folder's own "
    "weights; lapis eval --weights int8 --text FILE says what that costs"
)


def open_ready(
    folder: str | Path | Checkpoint,
    runtime: DecodingRuntime = DecodingRuntime(),  # noqa: B008
) -> tuple[ReadableModel, Tokenizer]:
    """A folder's model, ready to generate, and its tokenizer, which is opened while the weights are read.

    A model of a family that lapis does not run comes as transformers has it, with nothing laid out.

    Args:
        folder: A folder, a model of the hub, or one that was opened (with adapters).
        runtime: Device, precision, and how weights are held.

    Raises:
        CheckpointError: For what is damaged, and for a tokenizer with more tokens than the embedding has rows.
        ConfigError: For a device that is not there, and for int8 where it does not apply.
    """
    device = choose_device(runtime.device)
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder, adapters=True)
    dtype, note = choose_dtype(checkpoint, runtime.dtype, device)
    if runtime.weights == "int8":
        check_int8(dtype or torch.float32, device, checkpoint)
    if checkpoint.runs is None:
        tokenizer = _tokenizer(checkpoint)
        tokenizer.check_rows(outline_of(checkpoint).vocab)
        outside = load_readable(checkpoint, dtype, device)
        outside.notes += [note] if note else []
        return outside, tokenizer
    stored = _stored(checkpoint)
    layout = partial(WeightLayout.of, device=device, int8=runtime.weights == "int8", stored=stored)
    with ThreadPoolExecutor(2) as pool:
        opening = pool.submit(_tokenizer, checkpoint)
        compiling = pool.submit(layout, dtype or stored)
        adapted = checkpoint.adapter is not None
        placed = partial(_placed, layout=layout, compiling=compiling)
        model = load(checkpoint, dtype, device, placed=None if adapted else placed)
        model = ready(fold(model) if adapted else model, weights=runtime.weights, stored=stored)
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
        f"here"
    )


def choose_common_dtype(
    sources: Sequence[str | Path], name: str | None, device: torch.device
) -> tuple[torch.dtype | None, list[str]]:  # fmt: skip
    """`choose_dtype` for models that are to stand side by side: one precision for all, and the notes.

    Args:
        sources: Folders, or models of the hub.
        name: Is what is computed.
        device: Where the models run.
    """
    choices = [choose_dtype(open_checkpoint(source, adapters=True), name, device) for source in sources]
    dtype = next((dtype for dtype, _ in choices if dtype is not None), None)
    return dtype, list(dict.fromkeys(note for _, note in choices if note))


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = Tokenizer.open(checkpoint)
    _ = tokenizer.end_ids  # asks the chat template, in a process that takes a moment to start
    return tokenizer


@torch.inference_mode()
def ready(
    model: Transformer, *, weights: Literal["int8"] | None = None, stored: torch.dtype | None = None,
    compile: bool = True,
) -> Transformer:  # fmt: skip
    """Lays a model's weights out, in place, and puts it into evaluating mode; where that does not apply, nothing more.

    Each block's weights are dropped as soon as they are laid out, so the peak is one block more. The compiled kernels
    read a weight as it is, so a tied embedding serves as the head's too.

    Args:
        model: Is returned.
        weights: "int8" rounds every matrix but the embedding's, row by row; `model.notes` says so.
        stored: The dtype that most weights have in their folder: what is stored in bfloat16 and computed in float32 is
            held in bfloat16, whose numbers float32 has, too.
        compile: Whether kernels are compiled for this processor, where it has a compiler.

    Raises:
        ConfigError: For int8 where the model does not run on a CPU in float32 or bfloat16.
    """
    norm_weight = next(model.norm.parameters())
    dtype, device = norm_weight.dtype, norm_weight.device
    if weights == "int8":
        check_int8(dtype, device)
        model.notes.append(INT8_NOTE)
    layout = WeightLayout.of(dtype, device, int8=weights == "int8", stored=stored, compile=compile)
    for block in model.blocks:
        _ready_block(cast(TransformerBlock, block), layout)
    for name, norm in list(model.norm.named_children()):
        setattr(model.norm, name, ready_norm(cast(Norm, norm), dtype, layout))
    if type(model.head) is LanguageHead and not model.head.cap:
        model.head = lay_out(model.head.matrix, model.head.bias, layout) or model.head
    return model.eval()


def check_int8(dtype: torch.dtype, device: torch.device, checkpoint: Checkpoint | None = None) -> None:
    """Raises ConfigError where weights of eight bits are not computed with.

    Args:
        dtype: Of the weights.
        device: Where they are.
        checkpoint: What they are read from, where it is known.
    """
    if checkpoint is not None and checkpoint.runs is None:
        raise ConfigError(f"weights int8 is for models that lapis runs itself; {checkpoint.source} is none")
    if device.type != "cpu":
        raise ConfigError(f"weights int8 is for a CPU, and the model is on {device.type}; give --device cpu")
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"weights int8 computes in float32 or bfloat16, not {name}; give another precision")


def _stored(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of a folder's numbers, of which a model is likely to be."""
    largest = max(checkpoint.index.values(), key=lambda info: info.elements, default=None)
    return (None if largest is None else torch_dtype(largest.dtype)) or torch.float32


def _placed(
    model: nn.Module, name: str, *, layout: Callable[[torch.dtype], WeightLayout], compiling: Future[WeightLayout]
) -> None:
    """Lays out a block as soon as the last of its weights is there. compiling: what makes kernels meanwhile."""
    place, _, rest = name.partition(".")
    if place != "blocks":
        return
    block = cast(Transformer, model).blocks[int(rest.partition(".")[0])]
    if not any(parameter.is_meta for parameter in block.parameters()):
        compiling.result()  # so that nothing is compiled twice
        _ready_block(cast(TransformerBlock, block), layout(next(block.parameters()).dtype))


def _ready_block(block: TransformerBlock, layout: WeightLayout) -> None:
    """Lays out a block whose weights are there; what is laid out already stays."""
    dtype = next(block.norm.parameters()).dtype
    mixer = block.mixer
    if type(mixer) is Attention and all(type(mixer.get_submodule(name)) is nn.Linear for name in "qkvo"):
        block.attn = ready_attention(mixer, layout)  # type: ignore[assignment]
    for name, mlp in [(name, module) for name, module in block.named_modules() if isinstance(module, Mlp)]:
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, ready_mlp(mlp, layout))  # of each expert, where there are several
    for name, norm in list(block.norm.named_children()):
        setattr(block.norm, name, ready_norm(cast(Norm, norm), dtype, layout))
