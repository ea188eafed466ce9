"""LoRA in a run: `lora: {rank: 8}` in the settings, an adapter folder as the result.

    lora.wrap(model, LoraConfig(rank=8, targets=("attn.q", "attn.v")))
    with lora.off(model): ...                                  # the base's function

What is computed is in model/lora.py, the files are model/adapter.py's; this file joins them to a run's settings.
"""

from pathlib import Path

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
    of,
    off,
    put_rows,
    restore_whole,
    row_matrices,
    token_rows,
    whole_parameters,
    wrap,
)
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Adapted", "LoraConfig", "LoraLinear", "fold", "hold", "of", "off", "put_rows", "restore", "row_matrices", "save",
    "token_ids", "token_rows", "wrap",
]  # fmt: skip


def save(model: Transformer, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """What was trained: an adapter folder, or the model where it has no adapter. dtype: of a model's weights."""
    if of(model) is None:
        save_model(model, folder, dtype=dtype, state=whole_parameters(model))
    else:
        write_adapter(model, folder)


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
