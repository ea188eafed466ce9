"""Rows that make new tokens as likely as they are, before anything is trained: `--init calibrated`.

A mean of old rows makes a new token about as likely as never: where a syllable begins, a model that spelled it in bytes
expects its first byte, and most of the mean are rows of bytes that never begin one. So the model reads a little text in
its new tokens, and each row is moved along one direction until its token is, on average, as likely as it is frequent
(iterative scaling, Darroch and Ratcliff 1972). It is the shortest along which last hidden states of the language lie at
1 and those of replay text at 0. Hidden states have a large part in common, so a small move is enough, and the other
side of a tied row hardly feels it. Where it does, and text became less likely, or where a model does not tell the
languages apart, and replay text did, rows stay means; that is judged on documents by which no row was moved. Rows of
old tokens are not touched.

After a training the same is done once more (`calibrate_again`): rows that were hardly read stayed where they were while
the hidden states that they score moved. After a long one there is little of that left to mend, and rows often stay.

Shapes: R places, S places of replay text, D model dim, N new tokens, V old tokens.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.errors import DataError
from lapis.language.rows.grown import GrownEmbed
from lapis.language.texts import first_bytes
from lapis.model.blocks.attention import capped
from lapis.model.heads import LanguageHead
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.extend import ExtendableTokenizer, Extension
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.rows import token_tables, write_grown

PLACES = 1024  # tokens of text that the model reads
LENGTH = 256  # tokens of a text at most
COUNTED = 2_000_000  # bytes of text in which tokens are counted
COST = 0.01  # by which replay text may become harder
ROUNDS, STRIDE = 20, 0.8  # of scaling, and the share of each correction that is made
LABEL = "reading text in new tokens"
_AT_ONCE = 64  # places whose old logits exist at once

Report = Callable[[float, float | None, str], None]


def calibrate(
    checkpoint: Checkpoint,
    base: ExtendableTokenizer,
    gained: Extension,
    texts: Sequence[str],
    embed_ND: Tensor,
    score_ND: Tensor,
    *,
    tied: bool,
    replay: Sequence[str] = (),
    trusted: bool = False,
    seed: int = 0,
    progress: Report = lambda done, total, label: None,
) -> Tensor:
    """Moves the rows that score new tokens.

    Args:
        checkpoint: The model, with its old vocabulary or with rows for new tokens, which do not count.
        base: Its tokenizer.
        gained: What the tokenizer gains.
        texts: Text that holds the new tokens.
        embed_ND: The embedding's rows of new tokens, float32.
        score_ND: The rows that score them, float32; the same where the head is tied.
        tied: Whether it is.
        replay: Text in which new tokens are to be as unlikely as they were.
        trusted: Whether special tokens that the replay text spells are tokens, as in chats that a model drew.
        seed: Of the choice of text that is read.
        progress: Called with texts read and in all, over all that the model reads.

    Returns:
        The rows that score new tokens, float32, [N, D].

    Raises:
        DataError: Where the text holds none of the new tokens.
    """
    model = load(checkpoint, torch.float32)
    first, (written, judged) = gained.first, _rows(base, gained, texts, seed, PLACES)
    if not any(i >= first for ids in written for i in ids):
        raise DataError("extend: the text holds none of the new tokens, so there is nothing to calibrate their rows by")
    known, judged_known = _rows(base, gained, replay, seed, PLACES // 4, trusted)
    total = sum(map(len, (written, known, *(1 + tied) * (judged, judged_known))))
    numbers = iter(range(total))

    def read(rows: list[list[int]], new_ND: Tensor) -> Places:
        return _read(model, rows, new_ND, first, lambda: progress(next(numbers), total, LABEL))

    with torch.no_grad():
        language, others = (read(rows, embed_ND) for rows in (written, known))
        along_D = direction(language.hidden_RD, others.hidden_RD)
        shares_N = token_shares(base, gained, texts)
        cap = cast(LanguageHead, model.head).cap
        moved_ND = scaled_rows(language.hidden_RD, language.old_R, score_ND, shares_N, along_D, cap)
        unread = [read(rows, embed_ND) for rows in (judged, judged_known)]
        before = [places.nats(model, score_ND, first) for places in unread]
        if tied:
            unread = [read(rows, moved_ND) for rows in (judged, judged_known)]
        after = [places.nats(model, moved_ND, first) for places in unread]
    return moved_ND if after[0] < before[0] and after[1] <= (1 + COST) * before[1] else score_ND


def calibrate_again(
    checkpoint: Checkpoint,
    base: ExtendableTokenizer,
    gained: Extension,
    texts: Sequence[str],
    out: str | os.PathLike[str],
    *,
    replay: Sequence[str] = (),
    trusted: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Report = lambda done, total, label: None,
) -> bool:
    """Writes a model that was trained with its new tokens, each of which is as likely again as it is frequent.

    Args:
        checkpoint: The model, with rows for new tokens.
        base: The tokenizer with its old vocabulary.
        gained: What it gained.
        texts: Text of the language.
        out: A new folder.
        replay: Text that is to become no harder.
        trusted: Whether special tokens that the replay text spells are tokens.
        seed: Of the choice of text that is read.
        overwrite: Swap an existing folder for the new one, whole.
        progress: Called with what is done, what there is to do, and what it is.

    Returns:
        Whether rows were moved; they stay where text or replay text would become less likely.

    Raises:
        DataError: Where the text holds none of the new tokens.
        OutputError: Where `out` cannot be written.
    """
    tables, count = token_tables(checkpoint), len(gained.tokens)
    scored = tables.embed if tables.tied else tables.head[0]
    rows = {}
    for name in {tables.embed, scored}:
        width = checkpoint.info(name).shape[1]
        span = (gained.first * width, (gained.first + count) * width)
        rows[name] = checkpoint.read_range(name, *span).view(count, width).float()
    moved_ND = calibrate(
        checkpoint, base, gained, texts, rows[tables.embed], rows[scored], tied=tables.tied, replay=replay,
        trusted=trusted, seed=seed, progress=progress,
    )  # fmt: skip
    write_grown(
        checkpoint, out, tables, dict.fromkeys((scored, *tables.copies), moved_ND), gained.first, lambda folder: [],
        {"calibrated": "again", "seed": seed}, overwrite=overwrite,
        progress=lambda done, total: progress(done, total, "writing"),
    )  # fmt: skip
    return moved_ND is not rows[scored]


@dataclass(frozen=True)
class Places:
    """What a model made of text in new tokens. hidden_RD: Last hidden states. old_R: The logarithm of the summed
    exponentials of old tokens' logits. followed_R: The id that follows."""

    hidden_RD: Tensor
    old_R: Tensor
    followed_R: Tensor

    def nats(self, model: Transformer, rows_ND: Tensor, first: int) -> float:
        """Of what followed, summed, where new tokens have these rows."""
        head = cast(LanguageHead, model.head)
        logits_RN = capped(self.hidden_RD @ rows_ND.T, head.cap)
        total_R = torch.logaddexp(logits_RN.logsumexp(1), self.old_R)
        new_R = self.followed_R >= first
        own = logits_RN[new_R].gather(1, self.followed_R[new_R, None] - first).sum()
        old_Q = (self.hidden_RD[~new_R] * F.embedding(self.followed_R[~new_R], head.matrix)).sum(1)
        return float(total_R.sum() - own - capped(old_Q, head.cap).sum())


def direction(hidden_RD: Tensor, replay_SD: Tensor) -> Tensor:
    """The shortest vector, [D], along which hidden states of a language lie at 1 on average, and replay text at 0.

    Args:
        hidden_RD: Last hidden states of the language.
        replay_SD: Last hidden states of replay text; there may be none.
    """
    mean_D = hidden_RD.mean(0)
    if len(replay_SD):
        known_D = replay_SD.mean(0)
        mean_D = mean_D - (mean_D @ known_D) / (known_D @ known_D) * known_D
    return mean_D / mean_D.square().sum().clamp_min(1e-12)


def scaled_rows(
    hidden_RD: Tensor, others_R: Tensor, begin_ND: Tensor, shares_N: Tensor, along_D: Tensor, cap: float = 0.0
) -> Tensor:
    """Rows under which new tokens have given chances, on average over hidden states.

    Args:
        hidden_RD: Last hidden states.
        others_R: The logarithm of the summed exponentials of the logits of old tokens at each.
        begin_ND: Where the rows begin.
        shares_N: The chance that each new token is to have.
        along_D: The direction in which rows are moved.
        cap: Of the logits (model/heads.py); 0 = none.
    """
    logits_RN, step_R = hidden_RD @ begin_ND.T, hidden_RD @ along_D  # what a row gets for each unit that it moves
    moved_N = torch.zeros(len(begin_ND))
    for _ in range(ROUNDS):
        now_RN = capped(logits_RN + step_R[:, None] * moved_N, cap)
        total_R = torch.logaddexp(now_RN.logsumexp(1), others_R)
        chances_N = (now_RN - total_R[:, None]).exp().mean(0)
        moved_N += STRIDE * (shares_N / chances_N.clamp_min(1e-12)).log()
    return begin_ND + moved_N[:, None] * along_D


def _rows(
    base: ExtendableTokenizer, gained: Extension, texts: Sequence[str], seed: int, places: int, trusted: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """The beginnings of documents in new tokens, in a random order, so many tokens in all; and as many of others by
    which a result is judged: the same where all were needed. trusted: Special tokens that they spell are tokens."""
    backend, begin = base.extended(gained), Tokenizer.open(base.source).document_lead
    lead = [] if begin is None else [begin]
    backend.encode_special_tokens = not trusted
    order = iter(Random(seed).sample(range(len(texts)), len(texts)))

    def drawn() -> list[list[int]]:
        rows: list[list[int]] = []
        left = places
        while left > 0 and (number := next(order, None)) is not None:
            ids = backend.encode(texts[number], add_special_tokens=False).ids
            ids = (ids if lead and ids[:1] == lead else lead + ids)[: len(lead) + min(LENGTH, left)]
            if len(ids) > 1:
                rows.append(ids)
                left -= len(ids) - 1
        return rows

    written = drawn()
    return written, drawn() or written


def _read(model: Transformer, rows: list[list[int]], embed_ND: Tensor, first: int, heard: Callable[[], None]) -> Places:
    """All places but the last of each row. The model may have rows for new tokens already, which do not count.

    heard: Called before each row.
    """
    inner = model.embed
    setattr(model, "embed", GrownEmbed(inner, embed_ND, first))  # noqa: B010  (stands in for another module)
    hidden = [torch.zeros(0, embed_ND.shape[1])]
    for ids in rows:
        heard()
        hidden.append(model.hidden(torch.tensor([ids[:-1]]))[0])
    model.embed = inner
    hidden_RD = torch.cat(hidden)
    new = slice(first, first + len(embed_ND))
    old_R = torch.cat([_without(model.head(part), new).logsumexp(1) for part in torch.split(hidden_RD, _AT_ONCE)])
    return Places(hidden_RD, old_R, torch.tensor([i for ids in rows for i in ids[1:]], dtype=torch.int64))


def _without(logits_RV: Tensor, some: slice) -> Tensor:
    logits_RV[:, some] = -torch.inf
    return logits_RV


def token_shares(base: ExtendableTokenizer, gained: Extension, texts: Iterable[str]) -> Tensor:
    """How often each new token occurs in text, as a share of all tokens; one that does not, as half a time."""
    counts = base.extended(gained)
    counted, total = torch.zeros(len(gained.tokens)), 0
    listed = list(texts)
    for text in first_bytes(Random(0).sample(listed, len(listed)), COUNTED):  # files differ in what they say
        ids = torch.tensor(counts.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
        counted += torch.bincount(ids[ids >= gained.first] - gained.first, minlength=len(counted))
        total += len(ids)
    return counted.clamp_min(0.5) / max(1, total)
