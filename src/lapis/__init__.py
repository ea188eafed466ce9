"""lapis: see inside, train and graft language models, layer by layer.

The public API. Everything here is imported when it is first used, so that `import lapis` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import torch

    from lapis.model import Transformer
    from lapis.text.tokenizer import Tokenizer

__version__ = "0.1.0"

_PUBLIC = {
    "Causal": "lapis.train.objectives",
    "Chat": "lapis.train.objectives",
    "Checkpoint": "lapis.checkpoint",
    "Classify": "lapis.train.objectives",
    "LapisError": "lapis.errors",
    "Masked": "lapis.train.objectives",
    "ModelConfig": "lapis.model",
    "Sampling": "lapis.generate",
    "Tokenizer": "lapis.text.tokenizer",
    "TrainConfig": "lapis.train",
    "Transformer": "lapis.model",
    "diff": "lapis.weights.diff",
    "graft": "lapis.weights.graft",
    "merge": "lapis.weights.merge",
    "open": "lapis.checkpoint:open_checkpoint",
}
_ROOMS = ("generate", "lens", "plan", "train")  # packages that are called as functions

__all__ = sorted(["__version__", "load", *_PUBLIC, *_ROOMS])


def load(
    source: "str | os.PathLike[str]", dtype: "torch.dtype | None" = None, device: str = "cpu"
) -> "tuple[Transformer, Tokenizer]":
    """The model and the tokenizer of a folder, to run, train or look into. dtype: None keeps that of the folder.

    A folder that holds an adapter (PEFT's format) gives the model that it belongs to with the adapter on it.

    Raises CheckpointError, before anything is allocated, for whatever files, config or tokenizer do not agree on.
    """
    from lapis.checkpoint import open_checkpoint
    from lapis.model.load import load as load_model
    from lapis.text.tokenizer import Tokenizer

    checkpoint = open_checkpoint(source, adapters=True)
    tokenizer = Tokenizer.open(checkpoint)
    model = load_model(checkpoint, dtype, device)
    tokenizer.check_rows(model.config.vocab)
    return model, tokenizer


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"lapis.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lapis' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
