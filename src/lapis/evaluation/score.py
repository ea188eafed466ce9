"""How likely a model finds given tokens: the one computation under every score.

Sequences of like length share a batch, padded on the right, where a causal model does not look. The head runs on the
scored places only, a few at a time. Leaves out: what the tokens are (text.py, chats.py, choices.py).

Shapes: B sequences, T places, R scored places, D model dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lapis.errors import DataError
from lapis.model.transformer import Transformer

Precision = Literal["float32", "bf16"]
_LOGITS = 2**21  # elements of logits at once


@dataclass(frozen=True)
class Scored:
    """Ids in the order that the model reads them, and from which place on (1 or more) each is scored, or a mask.

    said: True for each id that is scored. The first id never is: nothing stands before it.
    """

    ids: Sequence[int]
    said: Sequence[bool]


def nll(
    model: Transformer, sequences: Sequence[Scored], *, batch_tokens: int = 8192, precision: Precision = "float32"
) -> list[float]:
    """Nats of each sequence, summed in float64 over its scored ids.

    batch_tokens: places computed at once. precision: "bf16" is faster where the machine has it, and about 1e-3 off.
    Raises DataError for an id that the model has no row for.
    """
    return [nats for nats, _ in likelihoods(model, sequences, batch_tokens=batch_tokens, precision=precision)]


@torch.inference_mode()
def likelihoods(
    model: Transformer, sequences: Sequence[Scored], *, batch_tokens: int = 8192, precision: Precision = "float32"
) -> list[tuple[float, bool]]:
    """As `nll`, with whether each scored id of the sequence is the model's likeliest."""
    found = [(0.0, True)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            while order:
                # the longest of a batch is its last, so its length times the number of rows is what is computed
                count = 1
                while count < len(order) and len(sequences[order[count]].ids) * (count + 1) <= batch_tokens:
                    count += 1
                batch, order = order[:count], order[count:]
                for i, value in zip(batch, _batch(model, [sequences[i] for i in batch], device), strict=True):
                    found[i] = value
    finally:
        model.train(was_training)
    return found


def _batch(model: Transformer, sequences: Sequence[Scored], device: torch.device) -> list[tuple[float, bool]]:
    longest = max(len(s.ids) for s in sequences)
    ids_BT = torch.zeros(len(sequences), longest, dtype=torch.int64)
    said_BT = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        said_BT[row, : len(sequence.ids)] = torch.tensor(sequence.said)
    if int(ids_BT.max()) >= model.config.vocab:
        raise DataError(
            f"token id {int(ids_BT.max())}: the model has {model.config.vocab:,} rows; is it its tokenizer?"
        )
    said_BT[:, 0] = False
    if not bool(said_BT.any()):
        return [(0.0, True)] * len(sequences)
    ids_BT, said_BT = ids_BT.to(device), said_BT.to(device)
    hidden_BTD = model.hidden(ids_BT[:, :-1])
    rows_R, places_R = said_BT[:, 1:].nonzero(as_tuple=True)
    nats_R, others_R = _token_nll(model, hidden_BTD[rows_R, places_R], ids_BT[rows_R, places_R + 1])
    sums_B = torch.zeros(len(sequences), dtype=torch.float64, device=device).index_add_(0, rows_R, nats_R.double())
    others_B = torch.zeros(len(sequences), dtype=torch.int64, device=device).index_add_(0, rows_R, others_R.long())
    return list(zip(sums_B.tolist(), (others_B == 0).tolist(), strict=True))


def _token_nll(model: Transformer, hidden_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each target, [R] float32, and whether another is likelier, [R] bool."""
    rows = max(16, _LOGITS // model.config.vocab)
    parts, others = [], []
    for first in range(0, len(hidden_RD), rows):
        logits_RV = model.head(hidden_RD[first : first + rows]).float()
        picked_R = logits_RV.gather(1, targets_R[first : first + rows, None])[:, 0]
        parts.append(logits_RV.logsumexp(-1) - picked_R)
        others.append(logits_RV.amax(-1) > picked_R)
    return torch.cat(parts), torch.cat(others)
