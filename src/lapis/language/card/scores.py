"""What a model can do in each language, with intervals: a folder, held-out texts and chats in, scores out.

Every figure is {"value", "interval", "n"}: the value over all documents (or chats), the bounds between which it lies in
95 % of bootstrap samples of them (Efron 1979; 1,000 samples, drawn with a fixed seed), and how many there were. Bits
and tokens are for a byte of text, so that models with different tokenizers compare.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lapis.evaluation.chats import answer, prompt_of, score_chats
from lapis.evaluation.text import windows_of
from lapis.generation.options import Runtime
from lapis.generation.ready import open_ready
from lapis.language.fertility import CONTEXT, tokens_per_second
from lapis.model.scoring import ScoredSequence, nll
from lapis.model.threads import settle_threads
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import ChatRecord
from lapis.text.tokenizer.tokenizer import Tokenizer

Report = Callable[[float, float | None, str], None]
SAMPLES = 1000  # of the bootstrap
PROMPTS = 10  # whose replies are shown
REPLY = 64  # tokens at most
TIMED = 4  # texts behind which generation is timed
Figure = dict[str, Any]


@dataclass(frozen=True)
class HeldOutText:
    """What a language is measured on. texts: Documents. chats: With the replies that were given."""

    texts: Sequence[str]
    chats: Sequence[ChatRecord] = ()


def score_model(
    folder: str | Path, languages: Mapping[str, HeldOutText], progress: Report = lambda done, total, label: None
) -> tuple[dict[str, dict[str, Figure]], dict[str, list[str]]]:
    """Scores a model.

    Args:
        folder: The model.
        languages: Name -> what it is measured on.
        progress: Called with what is done, what there is to do, and what it is.

    Returns:
        Language -> `bits_per_byte`, `tokens_per_byte`, `characters_per_second`, and where there are chats
        `response_nll` and `stop_rate`; language -> replies to its first PROMPTS chats.
    """
    model, tokenizer = open_ready(str(folder), Runtime())
    settle_threads(next(model.parameters()).device)
    scores: dict[str, dict[str, Figure]] = {}
    replies: dict[str, list[str]] = {}
    for name, held in languages.items():
        scores[name] = _text_scores(model, tokenizer, held.texts, partial(_relabel, progress, name))
        if held.chats and tokenizer.chat_template is not None:
            more, replies[name] = _chat_scores(model, tokenizer, held.chats)
            scores[name] |= more
    return scores, replies


def ratio(numbers: Sequence[float], sizes: Sequence[float]) -> Figure:
    """sum(numbers) / sum(sizes) over documents, with its interval.

    Args:
        numbers: Of each document what is counted.
        sizes: Of each document what it is counted for.
    """
    top, bottom = np.array(numbers, float), np.array(sizes, float)
    count = len(top)
    drawn = np.random.default_rng(0).integers(0, count, (SAMPLES, count))
    totals = bottom[drawn].sum(1)
    sampled = top[drawn].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(sampled, (0.025, 0.975)) if len(sampled) else (math.nan, math.nan)
    return {"value": float(top.sum() / bottom.sum()), "interval": [float(low), float(high)], "n": count}


def _relabel(progress: Report, name: str, done: float, total: float | None) -> None:
    progress(done, total, f"bits per byte, {name}")


def _text_scores(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], progress: Callable[[int, int], None]
) -> dict[str, Figure]:
    lead = tokenizer.bos_id if tokenizer.adds_bos or tokenizer.eos_id is None else tokenizer.eos_id
    windows: list[ScoredSequence] = []
    owner: list[int] = []
    tokens, sizes = [], [len(text.encode()) for text in texts]
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        tokens.append(len(ids))
        document = windows_of([0 if lead is None else lead, *ids], min(CONTEXT, model.config.context))
        windows += document
        owner += [number] * len(document)
    bits = np.zeros(len(texts))
    np.add.at(bits, owner, np.array(nll(model, windows, progress=progress)) / math.log(2))
    speeds = [tokens_per_second(model, tokenizer, text[:200]) for text in texts[:TIMED]]
    characters = sum(map(len, texts)) / sum(tokens)
    return {
        "bits_per_byte": ratio(list(bits), sizes),
        "tokens_per_byte": ratio(tokens, sizes),
        "characters_per_second": ratio([speed * characters for speed in speeds], [1.0] * len(speeds)),
    }


def _chat_scores(
    model: Transformer, tokenizer: Tokenizer, chats: Sequence[ChatRecord]
) -> tuple[dict[str, Figure], list[str]]:
    nats, tokens = [], []
    for chat in chats:
        score = score_chats(model, tokenizer, [chat], replies=[None])
        nats.append(float(score["response_nll"]) * int(score["tokens"]))
        tokens.append(float(score["tokens"]))
    given = answer(model, tokenizer, chats, max_tokens=REPLY)
    ended = [float(reply.stop_reason == "end") for reply in given if reply is not None]
    figures = {"response_nll": ratio(nats, tokens)}
    if ended:
        figures["stop_rate"] = ratio(ended, [1.0] * len(ended))
    return figures, [reply.text if reply else "" for reply in given[:PROMPTS]]


def prompts_of(chats: Sequence[ChatRecord]) -> list[str]:
    """What the user said last in the chats whose replies are shown."""
    return [str(prompt_of(chat.messages)[-1]["content"]) for chat in chats[:PROMPTS]]
