"""From folders to traces: what config and tokenizer can refuse is refused before a weight is read.

Leaves out: what is shown of a trace (cli/, page.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import open_checkpoint
from lapis.errors import LapisError
from lapis.inside.anatomy import refuse
from lapis.inside.lens.words import as_words
from lapis.inside.prompts import Prompt, check_length, encode
from lapis.model.check import read_config
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """A model that was loaded to be looked into, its tokenizer, and what the user called it."""

    model: Transformer
    tokenizer: Tokenizer
    name: str


def open_models(
    sources: Sequence[str | Path], prompt: Prompt, track: str = "", *, device: Any = "cpu",
    dtype: torch.dtype | None = None,
) -> list[Opened]:  # fmt: skip
    """Loads the models that a prompt is to be traced in. dtype: None keeps that of each folder.

    Raises, before any weight is read, LapisError for an encoder, DataError for a prompt that does not fit into the
    context, and ConfigError for a word that a tokenizer cannot express.
    """
    checked = []
    for source in sources:
        checkpoint = open_checkpoint(source, adapters=True)
        if checkpoint.family is None:
            kind = checkpoint.config.get("model_type", "unknown")
            raise LapisError(
                f'lens: {source}: lapis runs no model of the type "{kind}"; load it with transformers and give it to '
                "lapis.lens(model, tokenizer, ...) in Python: pip install 'lapis[hf]'"
            )
        config = read_config(checkpoint)
        refuse(str(source), config.family, config.causal, config.head)
        tokenizer = Tokenizer.open(checkpoint)
        tokenizer.check_rows(config.vocab)
        words = as_words(track, tokenizer, config.vocab)
        longest = max((len(s.ids) - 1 for w in words for s in w.spellings), default=0)
        check_length(encode(tokenizer, prompt, config.vocab, str(source)), longest, config.context, str(source))
        checked.append((checkpoint, tokenizer, str(source)))
    return [Opened(load(checkpoint, dtype, device), tokenizer, name) for checkpoint, tokenizer, name in checked]
