"""The live lens: what every layer would have said at one place of a reply, which one decided, and what did most for it.

The reading itself is that of `lapis.lens`. Here it is made to share a machine with replies that are under way: what
stands before the place is read in pieces between their steps, and kept, so that the next place of the same reply costs
one token.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch

from lapis.errors import DataError
from lapis.generation.generate import Memory
from lapis.inside.lens.logit_lens import Seen, best_anywhere, look, see
from lapis.inside.lens.table import Reading
from lapis.inside.prompt import token_word
from lapis.inside.trace import anatomy
from lapis.model.cache import Cache
from lapis.model.reading.readable import TokenCache
from lapis.serving.engine.engine import Engine
from lapis.serving.engine.served import ServedModel

TOP = 5  # tokens named for each layer
PARTS = 3  # heads and MLPs that are named


class LensReader:
    """The lens of all models of an engine, one place at a time for each of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memories: dict[str, Memory] = defaultdict(Memory)
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def read(
        self, served: ServedModel, prompt: Sequence[int], reply: Sequence[int], place: int
    ) -> dict[str, Any]:
        """What every layer would have said where a token of a reply stands.

        Args:
            served: The model.
            prompt: Ids of what it replied to.
            reply: Ids of the reply.
            place: Of a token in it, from 0; the number of tokens is the place behind the last.

        Returns:
            `token` (token, id, bytes, probability, rank) and `at_end`, whether it is what would come next and none of
            the reply's; `decided`, the layer from which on the last layer's choice leads; `embedding` and `layers`
            (layer, top, entropy, kl_to_final, probability and rank of the token); `parts` (part, layer, head, logit),
            those that added most to the token's logit.

        Raises:
            DataError: For a place that is not in the reply, an id that is no token, more tokens than the context.
            QueueFull: Where as much waits as may.
        """
        ids = checked(served, prompt, reply, place)
        token = reply[place] if place < len(reply) else None
        async with self._turns[served.name]:
            memory = self._memories[served.name]
            cache = memory.recall(ids)
            if cache is None:
                cache = served.model.new_cache(1, len(ids))
            while (done := cache.length) < len(ids) - 1:
                piece = ids[done : min(done + self._engine.piece(served.name), len(ids) - 1)]
                await self._engine.compute(served.name, partial(_read, piece=piece, cache=cast(Cache, cache)))
            result = await self._engine.compute(served.name, partial(look_inside, ids=ids, token=token, cache=cache))
            memory.keep(cache, ids)
        return {"object": "lapis.lens", "model": served.name, "place": place, "at_end": token is None} | result


def checked(served: ServedModel, prompt: Sequence[int], reply: Sequence[int], place: int) -> list[int]:
    """The ids before a place of a reply. Raises DataError for a place or an id that there is not, and for too many."""
    vocab = served.model.config.vocab
    if not 0 <= place <= len(reply):
        raise DataError(f"place is {place} and the reply has {len(reply):,} tokens; give 0 to {len(reply):,}")
    if reply and not 0 <= min(reply) <= max(reply) < vocab:
        bad = min(reply) if min(reply) < 0 else max(reply)
        raise DataError(f"reply: {bad} is no token of {served.name}; ids go from 0 to {vocab - 1:,}")
    ids = [*prompt, *reply[:place]]
    if len(ids) > served.context:
        raise DataError(f"there are {len(ids):,} tokens before this place, and the context is {served.context:,}")
    return ids


@torch.inference_mode()
def _read(served: ServedModel, piece: list[int], cache: Cache) -> None:
    """Reads a piece of what stands before the place."""
    served.model.hidden(torch.tensor([piece], device=served.model.embed.weight.device), cache=cache)


def look_inside(
    served: ServedModel, ids: list[int], token: int | None, cache: TokenCache | None = None
) -> dict[str, Any]:
    """The layers at the end of some ids.

    Args:
        served: The model.
        ids: All that it has read there.
        token: The one that followed; None for what would follow.
        cache: Of the ids but the last, or of some of them; is appended to.
    """
    words = [] if token is None else [token_word(token, served.tokenizer)]
    seen: Seen = see(anatomy(served.model, served.name), served.tokenizer, ids, words, cache=cache)
    words = words or best_anywhere(seen)[:1]
    trace = look(seen, words, True, top=TOP, halves=False)
    rows = [_row(served, reading, words[0].text) for reading in (trace.readings[0], *trace.layers)]
    parts = [c for c in trace.contributions if c.part != "rounding" and c.logit > 0]
    parts.sort(key=lambda c: -c.logit)
    chosen = served.token(words[0].spellings[0].ids[0])
    return {
        "token": {**chosen, "probability": rows[-1]["probability"], "rank": rows[-1]["rank"]},
        "decided": trace.decided,
        "embedding": rows[0],
        "layers": rows[1:],
        "parts": [{"part": c.part, "layer": c.layer, "head": c.head, "logit": c.logit} for c in parts[:PARTS]],
    }


def _row(served: ServedModel, reading: Reading, text: str) -> dict[str, Any]:
    """A state's best tokens, and where the token with this text stands in it."""
    logprob = reading.logprobs[text]
    assert logprob is not None  # a single token's is measured in every layer
    top = [{**served.token(index), "probability": share} for _, index, share in reading.top]
    return {
        "layer": reading.layer, "top": top, "entropy": reading.entropy, "kl_to_final": reading.kl_to_final,
        "probability": math.exp(logprob), "rank": reading.ranks[text],
    }  # fmt: skip
