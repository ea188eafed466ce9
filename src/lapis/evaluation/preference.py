"""Held-out preferences: how often the chosen reply gets the higher reward, how sure the rewards are of it, and how much
of it is length.

A model with a scalar head gives rewards. A language model is scored by its implicit reward: the log-probability of a
reply less that under a reference (arXiv:2305.18290, eq. 5), or with no reference the log-probability per token.
Leaves out: judging what a model says itself.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lapis.errors import ConfigError, DataError
from lapis.evaluation.replies import reply_log_probabilities, reply_rewards
from lapis.model.load import load
from lapis.model.scoring import Precision, Progress
from lapis.model.transformer import Transformer
from lapis.text.corpus.pairs import Pair
from lapis.text.rows.pair_rows import Paired
from lapis.text.tokenizer.tokenizer import Tokenizer

_BINS = 10


def score_pairs(
    model: Transformer,
    tokenizer: Tokenizer,
    pairs: Paired | Iterable[Pair] | Path | str,
    *,
    reference: Transformer | Path | str | None = None,
    beta: float = 0.1,
    context: int | None = None,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `pair_figures` says, with `by` (what was compared) and the counts of pairs, cut_replies and dropped_long.

    reference: for a language model: a model, or its folder, whose tokenizer has to be the same. beta: the scale of
    implicit rewards, for calibration. Raises DataError where no pair can be scored, or the model has neither a scalar
    nor a language head, and ConfigError for a reference with another tokenizer.
    """
    context = min(context or model.config.context, model.config.context)
    paired = pairs if isinstance(pairs, Paired) else Paired.read(pairs, tokenizer, context)
    if model.config.head == "scalar":
        by, values = "reward", np.asarray(reply_rewards(model, paired.replies, progress=progress))
    elif model.config.head == "lm":
        values = reply_log_probabilities(model, paired.replies, precision=precision, progress=progress)
        if reference is None:
            by, values = "log-probability per token", values / [len(reply) for reply in paired.replies]
        else:
            by, other = "log-ratio to the reference", _opened(reference, tokenizer, next(model.parameters()))
            of_other = reply_log_probabilities(other, paired.replies, precision=precision, progress=progress)
            values = beta * (values - of_other)
    else:
        raise DataError(f"eval: a model with the head {model.config.head} does not rank replies; give one with a "
                        "scalar head, or a language model")  # fmt: skip
    sizes = [len(reply) for reply in paired.replies]
    counts = {name: paired.counts[name] for name in ("pairs", "cut_replies", "dropped_long")}
    return {"by": by, **pair_figures(values[::2], values[1::2], sizes[::2], sizes[1::2]), **counts}


def _opened(reference: Transformer | Path | str, tokenizer: Tokenizer, like: Tensor) -> Transformer:
    """The reference, with weights of the dtype and on the device of `like`."""
    if isinstance(reference, Transformer):
        return reference
    if Tokenizer.open(reference).digest() != tokenizer.digest():
        raise ConfigError(f"eval: {reference} has another tokenizer than the model; a reference reads the same ids")
    return load(reference, like.dtype, like.device)


def pair_figures(
    chosen: ArrayLike, rejected: ArrayLike, chosen_sizes: ArrayLike, rejected_sizes: ArrayLike
) -> dict[str, float | None]:
    """Rewards and lengths (tokens) of the two replies of each pair -> figures.

    accuracy: the share of pairs of which the chosen reply has the higher reward, a tie counting half. margin: the mean
    difference. loss: -log sigmoid(difference), nats. calibration_error: with p = sigmoid(|difference|) the claimed
    chance of being right, the mean distance between p and the share that is right, over ten bins of p (expected
    calibration error; Guo et al. 2017, arXiv:1706.04599). length_correlation: Pearson's, of reward and length over all
    replies. length_correlation_within: of the difference in reward and in length over pairs, which leaves the prompt
    out. longer_preferred: the share of pairs of unequal length of which the longer reply has the higher reward, and
    longer_chosen the share of which it was chosen. accuracy_chosen_longer, accuracy_chosen_shorter: accuracy on those
    two kinds of pairs. None where there is nothing to count.
    """
    good, bad = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    long, short = np.asarray(chosen_sizes, np.float64), np.asarray(rejected_sizes, np.float64)
    margin, more = good - bad, long - short
    right = np.where(margin == 0, 0.5, margin > 0)
    differ = more != 0
    longer_wins = np.where(margin == 0, 0.5, (margin > 0) == (more > 0))
    return {
        "accuracy": float(right.mean()),
        "margin": float(margin.mean()),
        "loss": float(np.logaddexp(0, -margin).mean()),
        "calibration_error": calibration_error(1 / (1 + np.exp(-np.abs(margin))), right),
        "length_correlation": _correlation(np.concatenate([good, bad]), np.concatenate([long, short])),
        "length_correlation_within": _correlation(margin, more),
        "longer_preferred": _mean(longer_wins[differ]),
        "longer_chosen": _mean(more[differ] > 0),
        "accuracy_chosen_longer": _mean(right[more > 0]),
        "accuracy_chosen_shorter": _mean(right[more < 0]),
    }


def calibration_error(claimed: ArrayLike, right: ArrayLike) -> float:
    """The distance between what was claimed and what came true, over ten bins of equal width from 0.5 to 1, weighted by
    how much is in each."""
    p, hit = np.asarray(claimed, np.float64), np.asarray(right, np.float64)
    bins = np.minimum(((p - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    gaps = [abs(p[bins == b].sum() - hit[bins == b].sum()) for b in range(_BINS)]
    return math.fsum(gaps) / max(1, len(p))


def _correlation(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> float | None:
    if len(one) < 2 or one.std() == 0 or two.std() == 0:
        return None
    return float(np.corrcoef(one, two)[0, 1])


def _mean(values: np.ndarray[Any, Any]) -> float | None:
    return float(values.mean()) if len(values) else None
