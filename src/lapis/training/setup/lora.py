"""LoRA in a run: `lora: {rank: 8}` in the settings, an adapter folder as the result.

    lora.wrap(model, LoraConfig(rank=8, targets=("attn.q", "attn.v")))
    with lora.off(model): ...                                  # the base's function

What is computed is in model/lora.py, the files are model/adapter.py's; this file joins them to a run's settings.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lapis.config import nearest
from lapis.errors import ConfigError
from lapis.model.adapter import fold, restore_adapter, write_adapter
from lapis.model.blocks.nf4 import quantize
from lapis.model.load import load as load_model
from lapis.model.load import save as save_model
from lapis.model.lora import (
    Adapted,
    LoraConfig,
    LoraLinear,
    adapters,
    of,
    off,
    restore_whole,
    row_matrices,
    stacked_adapters,
    token_rows,
    train_rows,
    whole_parameters,
    wrap,
)
from lapis.model.transformer import Transformer
from lapis.parsing import quoted
from lapis.text.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Adapted", "LoraConfig", "LoraLinear", "adapters", "fold", "hold", "of", "off", "read_names",
    "restore", "row_matrices", "save", "stacked_adapters", "token_ids", "token_rows", "train_rows",
    "wrap",
]  # fmt: skip


_FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}
_PEFT = {  # PEFT's names -> those here
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_rslora": "rslora",
    "use_dora": "dora", "modules_to_save": "whole", "trainable_token_indices": "tokens",
}  # fmt: skip
_ONLY = {"peft_type": ("lora",), "bias": ("none",), "init_lora_weights": ("true",)}
_LAYERS = "name layers in targets, as layers.0-5.attn"
_INSTEAD = {
    "layers_to_transform": _LAYERS,
    "layers_pattern": _LAYERS,
    "exclude_modules": "name in targets what is adapted",
    "rank_pattern": "one rank is for all targets",
    "alpha_pattern": "one alpha is for all targets",
    "target_parameters": "name components in targets",
    "ensure_weight_tying": "tied matrices stay tied",
}


def read_names(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of `lora` by the names of LoraConfig; PEFT's are understood.

    Args:
        settings: As they stand in a file.
        where: What an error begins with.

    Raises:
        ConfigError: For both names of one setting, or a setting of PEFT that has no like here, with the remedy.
    """
    result: dict[str, Any] = {}
    for key, value in settings.items():
        name = _PEFT.get(key, key)
        if name in result or (name != key and name in settings):
            raise ConfigError(f"{where}: lora: {key} and {name} are one setting; give one of them")
        if key in _ONLY:
            if value is not None and str(value).lower() not in _ONLY[key]:
                raise ConfigError(f"{where}: lora: {key} is {quoted(value)}; it can be {' or '.join(_ONLY[key])}")
        elif key in _INSTEAD and key not in _FIELDS:
            raise ConfigError(f"{where}: lora: {key} is PEFT's and has no like here; {_INSTEAD[key]}")
        elif key != "task_type":  # which the objective says
            result[name] = value
    return result


def save(model: Transformer, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """What was trained: an adapter folder, or the model where it has no adapter. dtype: of what is written."""
    if of(model) is None:
        save_model(model, folder, dtype=dtype, state=whole_parameters(model))
    else:
        write_adapter(model, folder, dtype)


def restore(model: Transformer, folder: Path | str) -> None:
    """The values that `save` wrote, put back into the same model."""
    if of(model) is None:
        restore_whole(model, load_model(folder).state_dict())
    else:
        restore_adapter(model, folder)


def hold(model: Transformer, config: LoraConfig, device: torch.device) -> None:
    """Puts the weights that will be frozen into config.base, in place.

    Raises ConfigError for nf4 without a CUDA GPU, or bfloat16 under parts that are trained whole, MissingExtra.
    """
    if config.base == "nf4":
        quantize(model.blocks, device)
    elif config.base == "bfloat16":
        if config.whole or (config.whole is None and (model.fresh or model.config.head in ("classes", "scalar"))):
            raise ConfigError("lora: base bfloat16 does not go with parts that are trained whole; use base: float32")
        model.bfloat16()


def token_ids(tokens: tuple[int | str, ...], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids of tokens that are given by id or by text, each once. Raises ConfigError for a text that is no token."""
    ids = []
    for token in tokens:
        number = tokenizer.id(token) if isinstance(token, str) and tokenizer is not None else token
        if not isinstance(number, int):
            known = [] if tokenizer is None else list(tokenizer.special)
            raise ConfigError(f'tokens: "{token}" is no token; {nearest(str(token), known)}')
        ids.append(number)
    return tuple(dict.fromkeys(ids))
