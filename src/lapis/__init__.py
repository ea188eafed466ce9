"""lapis: see inside, train and graft language models, layer by layer.

The public API. Everything here is imported when it is first used, so that `import lapis` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what _PUBLIC says, for editors and type checkers
    import os

    import torch

    from lapis.checkpoint.hub.push import push
    from lapis.checkpoint.opening import open_checkpoint as open
    from lapis.checkpoint.store import Checkpoint
    from lapis.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        LapisError,
        MissingExtra,
        OutputError,
        TemplateError,
        TrainingError,
    )
    from lapis.families.config import ModelConfig
    from lapis.formats.export import export_gguf
    from lapis.formats.importing import import_gguf
    from lapis.generation.generate import generate
    from lapis.generation.options import Sampling
    from lapis.inside.compared.difference import activation_difference
    from lapis.inside.compared.patching import patch
    from lapis.inside.compared.vectors import steer
    from lapis.inside.explain.explain import explain
    from lapis.inside.lens.logit_lens import lens
    from lapis.language.adapt import adapt
    from lapis.language.extend import extend
    from lapis.language.fertility import fertility
    from lapis.model.transformer import Transformer
    from lapis.planning.gather import prompt_states
    from lapis.planning.plan import plan
    from lapis.serving.serve import serve
    from lapis.text.tokenizer.tokenizer import Tokenizer
    from lapis.training.config import TrainConfig
    from lapis.training.loop.loop import train
    from lapis.training.objectives.objective import Objective
    from lapis.training.objectives.policy.policy import GRPO, PPO, RLOO
    from lapis.training.objectives.preference.preference import DPO, IPO, KTO, ORPO, Reward, SimPO
    from lapis.training.objectives.supervised.classify import Classify
    from lapis.training.objectives.supervised.masked import Masked
    from lapis.training.objectives.supervised.next_token import Causal, Chat
    from lapis.weights.delta.apply import delta_apply
    from lapis.weights.delta.extract import delta_extract
    from lapis.weights.delta.file import open_delta
    from lapis.weights.diff.diff import diff
    from lapis.weights.graft.graft import graft
    from lapis.weights.merge.merge import merge

__version__ = "0.1.0"

__all__ = [
    "DPO", "GRPO", "IPO", "KTO", "ORPO", "PPO", "RLOO", "Causal", "Chat", "Checkpoint", "CheckpointError", "Classify",
    "ConfigError", "DataError", "LapisError", "Masked", "MissingExtra", "ModelConfig", "Objective", "OutputError",
    "Reward", "Sampling", "SimPO", "TemplateError", "Tokenizer", "TrainConfig", "TrainingError", "Transformer",
    "__version__", "activation_difference", "adapt", "delta_apply", "delta_extract", "diff", "explain", "export_gguf",
    "extend", "fertility", "generate", "graft", "import_gguf", "lens", "load", "merge", "open", "open_delta", "patch",
    "plan", "prompt_states", "push", "serve", "steer", "train",
]  # fmt: skip

# module -> the public names that it defines; name=there where it has another name there
_PUBLIC = {
    "lapis.checkpoint.hub.push": "push",
    "lapis.checkpoint.opening": "open=open_checkpoint",
    "lapis.checkpoint.store": "Checkpoint",
    "lapis.errors": "CheckpointError ConfigError DataError LapisError MissingExtra OutputError TemplateError "
    "TrainingError",
    "lapis.families.config": "ModelConfig",
    "lapis.formats.export": "export_gguf",
    "lapis.formats.importing": "import_gguf",
    "lapis.generation.generate": "generate",
    "lapis.generation.options": "Sampling",
    "lapis.inside.compared.difference": "activation_difference",
    "lapis.inside.compared.patching": "patch",
    "lapis.inside.compared.vectors": "steer",
    "lapis.inside.explain.explain": "explain",
    "lapis.inside.lens.logit_lens": "lens",
    "lapis.language.adapt": "adapt",
    "lapis.language.extend": "extend",
    "lapis.language.fertility": "fertility",
    "lapis.model.transformer": "Transformer",
    "lapis.planning.gather": "prompt_states",
    "lapis.planning.plan": "plan",
    "lapis.serving.serve": "serve",
    "lapis.text.tokenizer.tokenizer": "Tokenizer",
    "lapis.training.config": "TrainConfig",
    "lapis.training.loop.loop": "train",
    "lapis.training.objectives.objective": "Objective",
    "lapis.training.objectives.policy.policy": "GRPO PPO RLOO",
    "lapis.training.objectives.preference.preference": "DPO IPO KTO ORPO Reward SimPO",
    "lapis.training.objectives.supervised.classify": "Classify",
    "lapis.training.objectives.supervised.masked": "Masked",
    "lapis.training.objectives.supervised.next_token": "Causal Chat",
    "lapis.weights.delta.apply": "delta_apply",
    "lapis.weights.delta.extract": "delta_extract",
    "lapis.weights.delta.file": "open_delta",
    "lapis.weights.diff.diff": "diff",
    "lapis.weights.graft.graft": "graft",
    "lapis.weights.merge.merge": "merge",
}


def load(
    source: "str | os.PathLike[str]", dtype: "torch.dtype | None" = None, device: str = "cpu"
) -> "tuple[Transformer, Tokenizer]":
    """The model and the tokenizer of a folder, to run, train or look into.

    A folder that holds an adapter (PEFT's format) gives the model that it belongs to with the adapter on it.

    Args:
        source: A folder, or `owner/name` or `owner/name@revision` of the hub.
        dtype: Of the weights in memory; None keeps the folder's.
        device: Where the weights go.

    Returns:
        The model, in evaluating mode, and its tokenizer.

    Raises:
        CheckpointError: Before anything is allocated, for whatever files, config or tokenizer do not agree on.
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
    for module, names in _PUBLIC.items():
        for entry in names.split():
            public, _, there = entry.partition("=")
            if public == name:
                return getattr(import_module(module), there or name)
    raise AttributeError(f"module 'lapis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
