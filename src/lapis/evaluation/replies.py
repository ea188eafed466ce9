"""Replies as one batch, and what a model makes of each: its log-probability, or its reward.

Chosen and rejected replies share one forward pass. Replies are as long as they are: where padding would cost more than
a quarter of the work, several share a row, kept apart by segments; the numbers are the same. Leaves out: losses
(training/objectives/preference/pair_losses.py), figures (preference.py).

Shapes: S replies, B rows, T places, R scored places, D model dim.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lapis.model.scoring import (
    Precision,
    Progress,
    ScoredBatch,
    ScoredSequence,
    batches_by_length,
    evaluating,
    hidden_states,
    lay_out,
    nll,
    scored_states,
    token_log_probabilities,
    tokens_at_once,
)
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import EncodedReply


@dataclass(frozen=True)
class ReplyBatch(ScoredBatch):
    """Replies in rows; a reply's owner_R is its number.

    spoken_R: bool, whether the target is the reply's own (prompts may be scored too). sizes_S: tokens of each reply,
    float32.
    """

    spoken_R: Tensor
    sizes_S: Tensor


def collate(replies: Sequence[EncodedReply], whole: int = 0) -> ReplyBatch:
    """Replies as one batch. whole: of so many replies, the first ones, the prompt is scored as well."""
    sequences = [_scored(reply, 1 if i < whole else reply.first) for i, reply in enumerate(replies)]
    batch = lay_out(sequences, share=True)
    firsts_S = torch.tensor([reply.first for reply in replies])
    lengths_S = torch.tensor([len(reply.ids) for reply in replies])
    # the place of a target within its own sequence: a row may hold several
    starts_S = batch.ends_S[1] - lengths_S + 1
    spoken_R = batch.places_R + 1 - starts_S[batch.owner_R] >= firsts_S[batch.owner_R]
    sizes_S = torch.tensor([len(reply) for reply in replies], dtype=torch.float32)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return ReplyBatch(**fields, spoken_R=spoken_R, sizes_S=sizes_S)


def log_probabilities(model: Transformer, batch: ReplyBatch) -> tuple[Tensor, Tensor]:
    """Of each reply, [S], and of each scored token, [R]; nats, float32."""
    token_R = token_log_probabilities(model, scored_states(batch, hidden_states(model, batch)), batch.targets_R)
    own_R = token_R if bool(batch.spoken_R.all()) else token_R * batch.spoken_R
    return torch.zeros_like(batch.sizes_S).index_add(0, batch.owner_R, own_R), token_R


def reply_log_probabilities(
    model: Transformer,
    replies: Sequence[EncodedReply],
    *,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Nats of each reply and its end token, given its prompt: summed, 0 or less."""
    sequences = [_scored(reply.spoken, reply.first) for reply in replies]
    return -np.asarray(nll(model, sequences, precision=precision, progress=progress))


def rewards(model: Transformer, batch: ReplyBatch) -> Tensor:
    """The reward of each chat, [S] float32: the scalar head at its last token, which transformers takes to be the last
    that is not config.json's pad_token_id (a chat may end with that token, where it ends documents too)."""
    hidden_BTD = hidden_states(model, batch)
    rows_S, places_S = batch.ends_S
    pad = model.config.extra.get("pad_token_id")
    if pad is not None:
        padding_BT = batch.ids_BT == int(pad)
        for _ in range(4):  # no template ends with more of them
            places_S = places_S - padding_BT[rows_S, places_S].long()
    reward_S1: Tensor = model.head(hidden_BTD[rows_S, places_S])
    return reward_S1[:, 0].float()


def reply_rewards(
    model: Transformer,
    replies: Sequence[EncodedReply],
    *,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """The reward of each whole chat, in order, computed batch_tokens places at a time."""
    result = [0.0] * len(replies)
    device = next(model.parameters()).device
    lengths = [len(reply.ids) for reply in replies]
    done, total = 0, sum(lengths)
    with evaluating(model):
        for numbers in batches_by_length(lengths, batch_tokens or tokens_at_once(device)):
            batch = collate([replies[i] for i in numbers]).to(device)
            for i, reward in zip(numbers, rewards(model, batch).tolist(), strict=True):
                result[i] = reward
            done += sum(lengths[i] for i in numbers)
            if progress:
                progress(done, total)
    return result


def _scored(reply: EncodedReply, first: int) -> ScoredSequence:
    """The chat with the reply scored, from the id `first` on."""
    scored = np.zeros(len(reply.ids), bool)
    scored[first : reply.last] = True
    return ScoredSequence(reply.ids, scored)
