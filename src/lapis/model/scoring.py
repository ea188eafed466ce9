"""How likely a model finds given tokens: the one computation under every score and every loss on replies.

    with evaluating(model):                                    no dropout, no gradients
        for numbers in batches_by_length(lengths):             which sequences are read together
            batch = lay_out([sequences[i] for i in numbers])   their tokens in rows, and the places that are scored
            hidden_BTD = hidden_states(model, batch)
            logp_R = token_log_probabilities(model, scored_states(batch, hidden_BTD), batch.targets_R)

`nll` and `likelihoods` do all of it. The head runs on scored places only, a block of rows at a time, so the logits of a
batch never exist at once; with gradients each block is computed again on the way back. Leaves out what the tokens are:
evaluation/ and training/objectives/.

Shapes: S sequences, B rows, T places, R scored places, D model dim, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lapis.errors import ConfigError, DataError
from lapis.model.reading.readable import ReadableModel
from lapis.text.rows.sequences import together

Precision = Literal["float32", "bf16"]
Progress = Callable[[int, int], None]  # called with how many tokens are done, and of how many

BATCH_TOKENS = 2048  # places computed at once on a CPU: a few seconds on a laptop
LOGITS = {"cpu": 2**23, "cuda": 2**26}  # elements of logits at once
WIDENED = 8  # rows of logits in float32 at once, on a CPU
SHARED = 0.25  # of the places that sharing rows must save; below that, the mask between sequences costs more


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; afterwards every module is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def computing(model: nn.Module, precision: Precision | None) -> Iterator[None]:
    """What is computed inside is of this precision.

    Args:
        model: Whose weights decide where no precision is given.
        precision: None: that of the model's weights.

    Raises:
        ConfigError: float32 is asked for, and the weights are of another precision.
    """
    weight = next(model.parameters())
    if precision == "float32" and weight.dtype != torch.float32:
        raise ConfigError(
            f"precision is float32 and the model's weights are {str(weight.dtype).removeprefix('torch.')}; load the "
            f"model with dtype=torch.float32"
        )
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Which sequences are read together: their numbers, the short ones first.

    Args:
        lengths: Tokens of each sequence.
        batch_tokens: Most places of a batch, padding included. A sequence that is longer is a batch of its own.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        # the longest of a batch is its last, so its length times the number of rows is what is computed
        if batch and lengths[number] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@dataclass(frozen=True)
class ScoredSequence:
    """Ids in the order that the model reads them. scored: for each id whether it is scored; the first never is, since
    nothing stands before it."""

    ids: "Sequence[int] | NDArray[np.int64]"
    scored: "Sequence[bool] | NDArray[np.bool_]"


@dataclass(frozen=True)
class ScoredBatch:
    """Sequences as rows of ids, and the places that are scored.

    ids_BT: int64, padded with 0. segments_BT (int32, 0 = padding), positions_BT (int64): where sequences share rows,
    else None. rows_R, places_R: int64, the hidden states from which targets_R (int64) are predicted. owner_R: int64,
    the sequence of each. ends_S: int64, [2, S], row and place of the last id of each sequence.
    """

    ids_BT: Tensor
    segments_BT: Tensor | None
    positions_BT: Tensor | None
    rows_R: Tensor
    places_R: Tensor
    targets_R: Tensor
    owner_R: Tensor
    ends_S: Tensor

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        tensors = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        moved: dict[str, Any] = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors}
        return dataclasses.replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Places computed."""
        return self.ids_BT.numel()


def lay_out(sequences: Sequence[ScoredSequence], *, share: bool = False) -> ScoredBatch:
    """Sequences as one batch, in rows as long as the longest of them.

    Args:
        sequences: At least one, each of one id or more.
        share: Let several share a row, kept apart by segments, where that saves SHARED of the places. The scores are
            the same. Without it each sequence has a row of its own, padded on the right.
    """
    rows = together([sequence.ids for sequence in sequences], saving=SHARED if share else 1.0)
    shared = len(rows.ids_RT) < len(sequences)
    row_S, first_S = rows.row_B.numpy(), rows.first_B.numpy()
    parts: list[NDArray[np.int64]] = []
    for owner in np.lexsort((first_S, row_S)):
        ids = np.asarray(sequences[owner].ids, np.int64)
        scored = np.array(sequences[owner].scored, bool)
        scored[0] = False
        (places,) = scored.nonzero()
        same = np.ones_like(places)
        parts.append(np.stack([row_S[owner] * same, first_S[owner] + places - 1, ids[places], owner * same]))
    rows_R, places_R, targets_R, owner_R = torch.from_numpy(np.concatenate(parts, 1))
    return ScoredBatch(
        ids_BT=rows.ids_RT,
        segments_BT=rows.segments_RT if shared else None,
        positions_BT=rows.positions_RT if shared else None,
        rows_R=rows_R,
        places_R=places_R,
        targets_R=targets_R,
        owner_R=owner_R,
        ends_S=torch.stack([rows.row_B, rows.last_B]),
    )


def hidden_states(model: ReadableModel, batch: ScoredBatch) -> Tensor:
    """The last hidden states, [B, T, D], with gradients where they are on."""
    if batch.segments_BT is None:  # padding on the right: a causal model does not look there
        return model.hidden(batch.ids_BT)
    return model.hidden(batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)


def scored_states(batch: ScoredBatch, hidden_BTD: Tensor) -> Tensor:
    """The hidden states from which the targets are predicted, [R, D]."""
    return hidden_BTD[batch.rows_R, batch.places_R]


def read_logits(
    model: ReadableModel, read: Callable[..., tuple[Tensor, ...]], hidden_RD: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """What `read(logits_RV, *others)` gives for all rows, computed a block of rows at a time.

    Args:
        read: From logits, float32, to tensors of as many rows. It is called with blocks, in order.
        hidden_RD: Hidden states; the head makes logits of them.
        others: Tensors of R rows that `read` needs beside the logits.
    """
    rows = max(16, LOGITS.get(hidden_RD.device.type, LOGITS["cpu"]) // model.config.vocab)

    def block(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        logits = model.head(hidden)
        if torch.is_grad_enabled() or logits.dtype == torch.float32 or logits.device.type != "cpu":
            return read(logits.float(), *rest)
        # a few rows at a time: their float32 copies are reused memory, where larger ones are fresh pages each time
        few = zip(*(torch.split(tensor, WIDENED) for tensor in (logits, *rest)), strict=True)
        return tuple(map(torch.cat, zip(*(read(part.float(), *others) for part, *others in few), strict=True)))

    if len(hidden_RD) <= rows:
        return block(hidden_RD, *others)
    split = zip(*(torch.split(tensor, rows) for tensor in (hidden_RD, *others)), strict=True)
    if torch.is_grad_enabled():
        blocks = [checkpoint(block, *tensors, use_reentrant=False) for tensors in split]
    else:
        blocks = [block(*tensors) for tensors in split]
    return tuple(torch.cat(pieces) for pieces in zip(*blocks, strict=True))


def token_log_probabilities(model: ReadableModel, hidden_RD: Tensor, targets_R: Tensor) -> Tensor:
    """log p of each target under the head, [R] float32, nats."""
    return read_logits(model, lambda logits_RV, ids_R: (_picked(logits_RV, ids_R),), hidden_RD, targets_R)[0]


def nll(
    model: ReadableModel,
    sequences: Sequence[ScoredSequence],
    *,
    batch_tokens: int | None = None,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Nats of each sequence, summed in float64 over its scored ids.

    Args:
        sequences: In any order and of any lengths.
        batch_tokens: Places computed at once, by default `tokens_at_once` of the device.
        precision: Of the arithmetic; by default that of the model's weights. "bf16" is about 1e-3 off.
        progress: Called after each batch.

    Raises:
        DataError: An id that the model has no row for.
        ConfigError: float32 is asked for, and the weights are of another precision.
    """
    scores = _scores(model, sequences, _picked_alone, batch_tokens, precision, progress)
    return [nats for nats, _ in scores]


def likelihoods(
    model: ReadableModel,
    sequences: Sequence[ScoredSequence],
    *,
    batch_tokens: int | None = None,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """As `nll`, with whether each scored id of the sequence is the model's likeliest."""
    return _scores(model, sequences, _picked_and_beaten, batch_tokens, precision, progress)


def _scores(
    model: ReadableModel,
    sequences: Sequence[ScoredSequence],
    read: Callable[..., tuple[Tensor, ...]],
    batch_tokens: int | None,
    precision: Precision | None,
    progress: Progress | None,
) -> list[tuple[float, bool]]:
    """Nats of each sequence, and whether no scored id is beaten by a likelier one, by what `read` takes from logits."""
    result = [(0.0, True)] * len(sequences)
    device = next(model.parameters()).device
    lengths = [len(sequence.ids) for sequence in sequences]
    done, total = 0, sum(lengths)
    with evaluating(model), computing(model, precision):
        for numbers in batches_by_length(lengths, batch_tokens or tokens_at_once(device)):
            batch = lay_out([sequences[i] for i in numbers])
            for i, score in zip(numbers, _score(model, batch.to(device), read, len(numbers)), strict=True):
                result[i] = score
            done += sum(lengths[i] for i in numbers)
            if progress:
                progress(done, total)
    return result


def tokens_at_once(device: torch.device) -> int:
    """Places that a device computes at once; a GPU needs more of them to be busy."""
    return BATCH_TOKENS * (1 if device.type == "cpu" else 8)


def _score(
    model: ReadableModel, batch: ScoredBatch, read: Callable[..., tuple[Tensor, ...]], count: int
) -> list[tuple[float, bool]]:
    """Nats of each of `count` sequences, and whether all of its scored ids are the likeliest."""
    if int(batch.ids_BT.max()) >= model.config.vocab:
        raise DataError(
            f"token id {int(batch.ids_BT.max())}: the model has {model.config.vocab:,} rows; is it its tokenizer?"
        )
    if not len(batch.targets_R):
        return [(0.0, True)] * count
    # the last place of a row predicts nothing
    hidden_RD = scored_states(batch, hidden_states(model, dataclasses.replace(batch, ids_BT=batch.ids_BT[:, :-1])))
    logp_R, beaten_R = read_logits(model, read, hidden_RD, batch.targets_R)
    nats_S = torch.zeros(count, dtype=torch.float64, device=logp_R.device)
    nats_S.index_add_(0, batch.owner_R, -logp_R.double())
    beaten_S = torch.zeros(count, dtype=torch.int64, device=logp_R.device)
    beaten_S.index_add_(0, batch.owner_R, beaten_R.long())
    return list(zip(nats_S.tolist(), (beaten_S == 0).tolist(), strict=True))


def _picked(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    """log p of each id, [R]. One fused pass over the logits; logsumexp takes six times as long on a CPU."""
    return -F.cross_entropy(logits_RV, ids_R, reduction="none")


def _picked_and_beaten(logits_RV: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each id, and whether another id is likelier, [R] bool."""
    picked_R = logits_RV.gather(1, ids_R[:, None])[:, 0]
    return _picked(logits_RV, ids_R), logits_RV.amax(-1) > picked_R


def _picked_alone(logits_RV: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each id; not of others, which would cost another look at all logits."""
    return _picked(logits_RV, ids_R), torch.zeros(len(ids_R), dtype=torch.bool, device=ids_R.device)
