"""Bits per byte on held-out text: comparable over tokenizers, since bytes do not depend on them.

Every token of every document is scored exactly once. A document begins after the token that documents begin with in
training, and a long one is read in windows that overlap by half, so that a token is predicted from at least half a
context. Leaves out the end-of-text token, which is no text.
"""

import math
from collections.abc import Iterable
from typing import Any

from lapis.errors import DataError
from lapis.model.reading.readable import ReadableModel
from lapis.model.scoring import Precision, Progress, ScoredSequence, nll
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer


def score_text(
    model: ReadableModel,
    tokenizer: Tokenizer,
    documents: Iterable[str | Document],
    context: int | None = None,
    *,
    max_bytes: int | None = None,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """{bits_per_byte, nll (nats per token), tokens, bytes, documents}.

    context: tokens of a window, the model's own by default. max_bytes: stop after the document with which the text has
    so many. Raises DataError where there is no text.
    """
    context = min(context or model.config.context, model.config.context)
    windows: list[ScoredSequence] = []
    lead = tokenizer.document_lead
    if lead is None:
        raise DataError(f"{tokenizer.source}: has no token that a document begins with (eos_token or bos_token)")
    size = count = 0
    for document in documents:
        text = document if isinstance(document, str) else document.text
        if not text:
            continue
        size, count = size + len(text.encode()), count + 1
        windows += windows_of([lead, *tokenizer.encode(text)], context)
        if max_bytes is not None and size >= max_bytes:
            break
    if size == 0:
        raise DataError("eval: there is no text to score")
    nats = math.fsum(nll(model, windows, precision=precision, progress=progress))
    tokens = sum(sum(window.scored) for window in windows)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nll": nats / max(tokens, 1),
        "tokens": tokens,
        "bytes": size,
        "documents": count,
    }


def windows_of(ids: list[int], context: int) -> list[ScoredSequence]:
    """Windows of at most context + 1 ids that score each id but the first once.

    The model reads all but the last id of a window, which is `context` of them.
    """
    windows, scored = [], 1
    while scored < len(ids):
        first = 0 if scored == 1 else scored - max(1, context // 2)
        last = min(len(ids), first + context + 1)
        windows.append(ScoredSequence(ids[first:last], [place >= scored for place in range(first, last)]))
        scored = last
    return windows
