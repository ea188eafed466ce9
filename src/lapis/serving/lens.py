"""The live lens: what every layer would have said at one place of a reply, which one decided, and what did most for it.

The reading itself is that of `lapis.lens`. Here a chat, a reply and a place become its prompt, and its trace becomes the
object that the page shows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lapis.errors import DataError
from lapis.inside.lens.logit_lens import lens
from lapis.inside.lens.options import LensOptions
from lapis.inside.lens.table import LensTrace, Reading
from lapis.inside.prompt import token_text, token_word
from lapis.model.transformer import Transformer
from lapis.text.chat.chat import encode_prompt
from lapis.text.tokenizer.tokenizer import Tokenizer

OPTIONS = LensOptions(top=5)
PARTS = 3  # heads and MLPs that are named


def read_lens(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    reply: str | Sequence[int],
    place: int,
    *,
    context: int,
    name: str = "",
) -> dict[str, Any]:
    """What every layer would have said where a token of a reply stands.

    Args:
        model: As it is served, packed or not.
        tokenizer: The model's.
        messages: What the model replied to.
        reply: Its tokens, or their text, which may be cut into other tokens than those that were said.
        place: Of a token in the reply, from 0; the number of tokens is the place behind the last.
        context: Tokens that prompt and reply may have together.
        name: What the model is called.

    Returns:
        `token` (token, id, probability, rank) and `at_end`, whether it is what would come next and not one of the
        reply; `decided`, the layer from which on the last layer's choice leads; `embedding` and `layers` (layer, top,
        entropy, kl_to_final, probability and rank of the token); `parts` (part, layer, head, logit), those that added
        most to the token's logit.

    Raises:
        DataError: For a place that is not in the reply, an id that is no token, or more tokens than the context.
    """
    said = tokenizer.encode(reply) if isinstance(reply, str) else list(reply)
    if not 0 <= place <= len(said):
        raise DataError(f"lens: place {place} is not in a reply of {len(said)} tokens; give 0 to {len(said)}")
    if said and not 0 <= min(said) <= max(said) < model.config.vocab:
        bad = min(said) if min(said) < 0 else max(said)
        raise DataError(f"lens: {bad} is no token of this model, which has {model.config.vocab:,}")
    prompt = encode_prompt(tokenizer, messages) + said[:place]
    if len(prompt) > context:
        raise DataError(f"lens: up to this place there are {len(prompt):,} tokens; the context is {context:,}")
    words = [token_word(said[place], tokenizer)] if place < len(said) else []
    trace = lens(model, tokenizer, prompt, words, OPTIONS, name=name)
    index = said[place] if place < len(said) else trace.readings[-1].top[0][1]
    return {"object": "lapis.lens", "model": name, "place": place, "at_end": place == len(said)} | _shown(
        trace, index, token_text(index, tokenizer)
    )


def _shown(trace: LensTrace, index: int, text: str) -> dict[str, Any]:
    """The figures of one token in a trace."""
    rows = [_row(reading, text) for reading in (trace.readings[0], *trace.layers)]
    parts = [c for c in trace.contributions if c.token == index and c.part != "rounding" and c.logit > 0]
    parts.sort(key=lambda c: -c.logit)
    return {
        "token": {"token": text, "id": index, "probability": rows[-1]["probability"], "rank": rows[-1]["rank"]},
        "decided": trace.decided,
        "embedding": rows[0],
        "layers": rows[1:],
        "parts": [{"part": c.part, "layer": c.layer, "head": c.head, "logit": c.logit} for c in parts[:PARTS]],
    }


def _row(reading: Reading, text: str) -> dict[str, Any]:
    """A state's best tokens, and where the token with this text stands in it."""
    logprob = reading.logprobs[text]
    assert logprob is not None  # a single token's is measured in every layer
    top = [{"token": token, "id": index, "probability": share} for token, index, share in reading.top]
    return {
        "layer": reading.layer, "top": top, "entropy": reading.entropy, "kl_to_final": reading.kl_to_final,
        "probability": math.exp(logprob), "rank": reading.ranks[text],
    }  # fmt: skip
