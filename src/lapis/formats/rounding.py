"""What a type costs: a model and a text in, bits per byte before and after the weights were rounded to it out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lapis.checkpoint import Checkpoint
from lapis.errors import ConfigError
from lapis.evaluation.text import score_text
from lapis.families import Family, ModelConfig
from lapis.formats.gguf.header import GgufFile, read_gguf
from lapis.formats.gguf.tensors import PlacedTensor, rows_of_file
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import documents
from lapis.text.tokenizer.tokenizer import Tokenizer

Tell = Callable[[float, float | None, str], None]


def check_text(config: ModelConfig) -> None:
    """Raises ConfigError where a model has no bits per byte: it reads both ways."""
    if not config.causal:
        raise ConfigError("--text: an encoder does not continue text, so it has no bits per byte")


def measure_rounding(
    checkpoint: Checkpoint, file: Path | str, placed: Sequence[PlacedTensor], text: Path | str, tell: Tell | None = None
) -> dict[str, float]:
    """Bits per byte of the model in float32, and with the weights that the file holds.

    Args:
        checkpoint: The model.
        file: What was made of it.
        placed: Its tensors.
        text: A file of text, or a folder of such.
        tell: Called with what is done, what there is to do, and what it is.
    """
    texts = list(documents(text))
    size = sum(len(document.text.encode()) for document in texts)
    if tell:
        tell(0, None, "reading the model, to measure what rounding costs")
    model = load(checkpoint, torch.float32)
    check_text(model.config)
    tokenizer = Tokenizer.open(checkpoint)
    result: dict[str, float] = {}
    for name in ("before", "after"):
        if name == "after":
            _take_weights(model, checkpoint, read_gguf(file), placed)

        def progress(done: int, total: int, name: str = name) -> None:
            if tell:
                tell(size * done / max(total, 1), size, f"bits per byte {name} rounding")

        result[name] = float(score_text(model, tokenizer, texts, progress=progress)["bits_per_byte"])
    return result


@torch.no_grad()
def _take_weights(model: Transformer, checkpoint: Checkpoint, file: GgufFile, placed: Sequence[PlacedTensor]) -> None:
    """Puts the file's weights into the model, tensor by tensor."""
    family = checkpoint.runs
    assert family is not None
    for tensor in placed:
        rows = [torch.from_numpy(rows_of_file(file, tensor, first, last).copy()) for first, last in tensor.pieces()]
        whole = torch.cat(rows).view(tensor.shape)
        if tensor.stacked[0] or tensor.parameter is not None:
            _take_part(model, family, tensor, whole)
            continue
        for name, part in zip(tensor.names, whole if len(tensor.names) > 1 else [whole], strict=True):
            _take(model, family, name, part.t() if tensor.transposed else part)


def _take(model: Transformer, family: Family, name: str, on_disk: torch.Tensor) -> None:
    match = family.match(name)
    assert match is not None
    rule, layer = match
    targets = [model.get_parameter(name.replace("{layer}", str(layer))) for name in rule.names]
    for target, piece in zip(targets, rule.transform.apply(on_disk, [tuple(t.shape) for t in targets]), strict=True):
        target.copy_(piece.view(target.shape))


def _take_part(model: Transformer, family: Family, tensor: PlacedTensor, whole: torch.Tensor) -> None:
    """One of the matrices that are interleaved in a parameter, or one of the parameters that a tensor holds."""
    match = family.match(tensor.name)
    assert match is not None
    rule, layer = match
    if tensor.parameter is not None:
        model.get_parameter(rule.names[tensor.parameter].replace("{layer}", str(layer))).copy_(whole)
        return
    _, which, step = tensor.stacked
    target = model.get_parameter(rule.names[0].replace("{layer}", str(layer)))
    target[..., which::step].copy_(whole.transpose(1, 2) if whole.dim() == 3 else whole)
