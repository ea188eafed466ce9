"""lapis: see inside, train and graft language models, layer by layer.

The public API. Everything here is imported when it is first used, so that `import lapis` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import torch

    from lapis.model.transformer import Transformer
    from lapis.text.tokenizer.tokenizer import Tokenizer

__version__ = "0.1.0"

# public name -> module that defines it, or module:name where the two differ
_PUBLIC = {
    "Causal": "lapis.training.objectives.supervised.next_token",
    "Chat": "lapis.training.objectives.supervised.next_token",
    "Checkpoint": "lapis.checkpoint.store",
    "Classify": "lapis.training.objectives.supervised.classify",
    "LapisError": "lapis.errors",
    "Masked": "lapis.training.objectives.supervised.masked",
    "ModelConfig": "lapis.families.config",
    "Sampling": "lapis.generation.options",
    "Tokenizer": "lapis.text.tokenizer.tokenizer",
    "TrainConfig": "lapis.training.config",
    "Transformer": "lapis.model.transformer",
    "diff": "lapis.weights.diff.diff",
    "generate": "lapis.generation.generate",
    "graft": "lapis.weights.graft.graft",
    "lens": "lapis.inside.lens.logit_lens",
    "merge": "lapis.weights.merge.merge",
    "open": "lapis.checkpoint.store:open_checkpoint",
    "plan": "lapis.planning.plan",
    "train": "lapis.training.loop.loop",
}

__all__ = sorted(["__version__", "load", *_PUBLIC])


def load(
    source: "str | os.PathLike[str]", dtype: "torch.dtype | None" = None, device: str = "cpu"
) -> "tuple[Transformer, Tokenizer]":
    """The model and the tokenizer of a folder, to run, train or look into. dtype: None keeps that of the folder.

    A folder that holds an adapter (PEFT's format) gives the model that it belongs to with the adapter on it.

    Raises CheckpointError, before anything is allocated, for whatever files, config or tokenizer do not agree on.
    """
    from lapis.checkpoint import open_checkpoint
    from lapis.model.load import load as load_model
    from lapis.text.tokenizer.tokenizer import Tokenizer

    checkpoint = open_checkpoint(source, adapters=True)
    tokenizer = Tokenizer.open(checkpoint)
    model = load_model(checkpoint, dtype, device)
    tokenizer.check_rows(model.config.vocab)
    return model, tokenizer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lapis' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
