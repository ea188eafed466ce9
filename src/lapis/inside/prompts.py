"""What the lens is asked about: a prompt as token ids, and the tokenizer that goes with the model.

Leaves out: tracked words (words.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from lapis.errors import DataError, LapisError
from lapis.text.chat.chat import encode_prompt
from lapis.text.tokenizer.folder import NAMED_TOKENS
from lapis.text.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """lapis' own tokenizer, also around the fast one of transformers, which is left as it is."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise LapisError(
            f"lens: {type(tokenizer).__name__} is no tokenizer with a fast backend; give lapis' or a fast one"
        )
    special = getattr(tokenizer, "special_tokens_map", {})
    named = {name: str(special[name]) for name in NAMED_TOKENS if isinstance(special.get(name), str)}
    template = getattr(tokenizer, "chat_template", None)
    templates = {"default": template} if isinstance(template, str) else {}
    return Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), named, templates)


def encode(tokenizer: Tokenizer, prompt: Prompt, rows: int, name: str) -> list[int]:
    """Ids of a text (with what the tokenizer puts before one), of a chat up to the reply, or ids as they are.

    rows: of the head of the model `name`. Raises DataError where there are no ids, or one has no row.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special_tokens=True) if prompt else []
    elif prompt and isinstance(prompt[0], Mapping):
        ids = encode_prompt(tokenizer, prompt)  # type: ignore[arg-type]
    else:
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
    if not ids:
        raise DataError("lens: the prompt is empty; give a text, a chat or token ids")
    if not 0 <= min(ids) <= max(ids) < rows:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise DataError(f"lens: token {bad} has no row in {name}, which has {rows:,}; is the tokenizer its own?")
    return ids


def check_length(ids: Sequence[int], more: int, context: int, name: str) -> None:
    """Raises DataError where a prompt, and `more` tokens of a tracked word behind it, are longer than the context."""
    if len(ids) + more > context:
        what = f" and a tracked word {more} more" if more else ""
        raise DataError(
            f"lens: the prompt has {len(ids):,} tokens{what}, and the context of {name} is {context:,}; shorten it"
        )
