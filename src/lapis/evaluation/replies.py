"""Replies as one batch, and what a model says of each: its log-probability, or its reward.

Chosen and rejected replies share one forward pass. Replies are as long as they are: where padding would cost more than
a quarter of the work, several share a row, kept apart by segments; the numbers are the same. The head runs on scored
places only, in blocks that are computed again for the gradient, so the logits of a batch never exist at once.
Leaves out: losses (training/objectives/preference/pair_losses.py), figures (preference.py).

Shapes: S replies, B rows, T places, R scored places, D model dim, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lapis.model.transformer import Transformer
from lapis.text.rows.packing import best_fit
from lapis.text.rows.pair_rows import Reply

_LOGITS = {"cpu": 2**21, "cuda": 2**26}  # elements of logits at once


@dataclass(frozen=True)
class ReplyBatch:
    """ids_BT: int64. segments_BT, positions_BT: where rows are shared, else None. rows_R, places_R: the hidden states
    that tell targets_R, of reply owner_R; spoken_R: whether the target is the reply's own. ends_S: [2, S], row and
    place of each chat's last token. sizes_S: tokens of each reply, float32."""

    ids_BT: Tensor
    segments_BT: Tensor | None
    positions_BT: Tensor | None
    rows_R: Tensor
    places_R: Tensor
    targets_R: Tensor
    owner_R: Tensor
    spoken_R: Tensor
    ends_S: Tensor
    sizes_S: Tensor

    def to(self, device: torch.device) -> "ReplyBatch":
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in values}
        return ReplyBatch(**moved)

    @property
    def tokens(self) -> int:
        """Places computed."""
        return self.ids_BT.numel()


def collate(replies: Sequence[Reply], whole: int = 0) -> ReplyBatch:
    """whole: of so many replies, the first ones, the prompt is scored as well."""
    sizes = np.asarray([len(reply.ids) for reply in replies])
    longest, count = int(sizes.max()), len(replies)
    order, begins = best_fit(sizes, longest)
    shared = (len(begins) - 1) * 4 <= count * 3
    if not shared:
        order, begins = np.arange(count), np.arange(count + 1)
    ids = np.zeros((len(begins) - 1, longest), np.int64)
    segments, positions = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, np.int64)
    ends = np.zeros((2, count), np.int64)
    scored: list[np.ndarray[tuple[int, int], np.dtype[np.int64]]] = []
    for row in range(len(ids)):
        at = 0
        for segment, i in enumerate(order[begins[row] : begins[row + 1]], 1):
            reply, n = replies[i], int(sizes[i])
            ids[row, at : at + n], segments[row, at : at + n] = reply.ids, segment
            positions[row, at : at + n] = np.arange(n)
            ends[:, i] = row, at + n - 1
            told = np.arange(1 if i < whole else reply.first, reply.last)
            own = (told >= reply.first).astype(np.int64)
            same = np.ones_like(told)
            scored.append(np.stack([row * same, at + told - 1, reply.ids[told], i * same, own]))
            at += n
    rows, places, targets, owner, spoken = torch.from_numpy(np.concatenate(scored, 1))
    return ReplyBatch(
        ids_BT=torch.from_numpy(ids),
        segments_BT=torch.from_numpy(segments) if shared else None,
        positions_BT=torch.from_numpy(positions) if shared else None,
        rows_R=rows,
        places_R=places,
        targets_R=targets,
        owner_R=owner,
        spoken_R=spoken.bool(),
        ends_S=torch.from_numpy(ends),
        sizes_S=torch.tensor([len(reply) for reply in replies], dtype=torch.float32),
    )


def log_probabilities(model: Transformer, batch: ReplyBatch) -> tuple[Tensor, Tensor]:
    """Of each reply, [S], and of each scored token, [R]; nats, float32."""
    hidden_BTD = _hidden(model, batch)
    told_R = token_log_probabilities(model, hidden_BTD[batch.rows_R, batch.places_R], batch.targets_R)
    own_R = told_R if bool(batch.spoken_R.all()) else told_R * batch.spoken_R
    return torch.zeros_like(batch.sizes_S).index_add(0, batch.owner_R, own_R), told_R


def rewards(model: Transformer, batch: ReplyBatch) -> Tensor:
    """What a scalar head says at the last token of each chat, [S] float32: as transformers finds it, the last that is
    not config.json's pad_token_id (a chat may end with that token, where it ends documents too)."""
    hidden_BTD = _hidden(model, batch)
    rows_S, places_S = batch.ends_S
    pad = model.config.extra.get("pad_token_id")
    if pad is not None:
        padding_BT = batch.ids_BT == int(pad)
        for _ in range(4):  # no template ends with more of them
            places_S = places_S - padding_BT[rows_S, places_S].long()
    reward_S1: Tensor = model.head(hidden_BTD[rows_S, places_S])
    return reward_S1[:, 0].float()


@torch.inference_mode()
def reply_rewards(model: Transformer, replies: Sequence[Reply], *, batch_tokens: int = 8192) -> list[float]:
    """The reward of each whole chat, in order, computed batch_tokens places at a time."""
    found = [0.0] * len(replies)
    order = sorted(range(len(replies)), key=lambda i: len(replies[i].ids))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        while order:
            count = 1
            while count < len(order) and len(replies[order[count]].ids) * (count + 1) <= batch_tokens:
                count += 1
            chosen, order = order[:count], order[count:]
            batch = collate([replies[i] for i in chosen]).to(device)
            for i, reward in zip(chosen, rewards(model, batch).tolist(), strict=True):
                found[i] = reward
    finally:
        model.train(was_training)
    return found


def token_log_probabilities(model: Transformer, hidden_RD: Tensor, targets_R: Tensor) -> Tensor:
    """log p of each target under the head, [R] float32; its gradient needs no more memory than a block of logits."""
    rows = max(16, _LOGITS.get(hidden_RD.device.type, 2**21) // model.config.vocab)

    def block(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = model.head(hidden).float()
        picked: Tensor = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
        return picked

    if len(hidden_RD) <= rows:
        return block(hidden_RD, targets_R)
    parts = []
    for hidden, targets in zip(torch.split(hidden_RD, rows), torch.split(targets_R, rows), strict=True):
        parts.append(checkpoint(block, hidden, targets, use_reentrant=False) if torch.is_grad_enabled()
                     else block(hidden, targets))  # fmt: skip
    return torch.cat(parts)


def _hidden(model: Transformer, batch: ReplyBatch) -> Tensor:
    if batch.segments_BT is None:  # padding on the right: a causal model does not look there
        return model.hidden(batch.ids_BT)
    return model.hidden(batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
