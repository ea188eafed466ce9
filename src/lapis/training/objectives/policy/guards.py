"""The figures of a policy's step, and guards that notice collapse, reward hacking and KL runaway in them.

A guard compares the last few rollouts with the first few, and warns with the figure. A low entropy alone is no
collapse: a policy that has learned a task with one right answer has none left.

Shapes: B replies, R tokens of a reply.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lapis.training.distributed.parallel import sum_over_processes
from lapis.training.objectives.policy.experience import Experience
from lapis.training.objectives.policy.losses import k3
from lapis.training.objectives.policy.rollouts import ReplyScores

FIGURES = ("reward", "entropy", "length", "repetition", "kl")
WINDOW = 5  # rollouts that are averaged, at the start and now

COLLAPSED = 0.1  # entropy, of what it was
LONGER = 2.0  # length, of what it was
REPEATS = 0.3  # share of words written again, above what it was
RUNAWAY = 2.0  # KL, of what it was a window ago
NEAR = 0.1  # nats per token: a KL below this runs nowhere
RISEN = 0.02  # a reward that changed by less has not risen


class Guards:
    """figures: one row per rollout, the first WINDOW and the last 2 * WINDOW of them."""

    def __init__(self) -> None:
        self._rows: dict[int, list[float]] = {}

    def see(self, number: int, figures: Mapping[str, float]) -> list[tuple[str, str]]:
        """Takes in the figures (FIGURES) of rollout `number`.

        A rollout that is given again replaces the earlier one, so that a step which is only measured leaves no trace.

        Returns:
            What is wrong now, as kind and sentence.
        """
        self._rows = {n: row for n, row in self._rows.items() if n < number}
        self._rows[number] = [figures[name] for name in FIGURES]
        numbers = sorted(self._rows)
        for old in numbers[WINDOW : -2 * WINDOW]:
            del self._rows[old]
        return self._warnings() if len(self._rows) >= 2 * WINDOW else []

    def _warnings(self) -> list[tuple[str, str]]:
        order = [self._rows[number] for number in sorted(self._rows)]
        first, before, now = (_means(rows) for rows in (order[:WINDOW], order[-2 * WINDOW : -WINDOW], order[-WINDOW:]))
        trend = f"while the reward went from {first['reward']:.2f} to {now['reward']:.2f}"
        warnings = []
        if now["entropy"] < COLLAPSED * first["entropy"] and now["reward"] < first["reward"] + RISEN:
            warnings.append(("collapse", f"the policy collapsed: entropy fell from {first['entropy']:.3f} to "
                          f"{now['entropy']:.3f} nats per token {trend}; lower lr or raise temperature"))  # fmt: skip
        risen = now["reward"] > first["reward"] + RISEN
        if risen and now["length"] > LONGER * first["length"]:
            warnings.append(("length", f"replies grew from {first['length']:.0f} to {now['length']:.0f} tokens "
                          f"{trend}; does the reward pay for length? Add the reward length"))  # fmt: skip
        if risen and now["repetition"] > first["repetition"] + REPEATS:
            warnings.append(("repetition", f"replies repeat themselves: {now['repetition']:.0%} of words in a row were "
                          f"written before, {first['repetition']:.0%} at first, {trend}"))  # fmt: skip
        still = now["reward"] < before["reward"] + RISEN
        if now["kl"] > max(NEAR, RUNAWAY * before["kl"]) and still:
            warnings.append(("kl", f"the KL to the reference ran from {before['kl']:.2f} to {now['kl']:.2f} nats per "
                          f"token {trend}; raise kl or lower lr"))  # fmt: skip
        return warnings

    def tensors(self) -> dict[str, Tensor]:
        """The figures as float64 tensors, for a checkpoint."""
        if not self._rows:
            return {}
        numbers = sorted(self._rows)
        return {"numbers": torch.tensor(numbers),
                "figures": torch.tensor([self._rows[n] for n in numbers], dtype=torch.float64)}  # fmt: skip

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Guards":
        """The reverse of `tensors`."""
        guards = cls()
        if tensors:
            guards._rows = dict(zip(tensors["numbers"].tolist(), tensors["figures"].tolist(), strict=True))
        return guards


def repetition(ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Summed over replies: the share of three tokens in a row that the reply has written before."""
    total = 0.0
    for row, length in zip(ids, lengths, strict=True):
        threes = list(zip(row[: length - 2], row[1 : length - 1], row[2:length], strict=True)) if length > 2 else []
        total += 1 - len(set(threes)) / len(threes) if threes else 0.0
    return total


def _means(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Per figure; a KL that is not known counts as 0."""
    columns = zip(*rows, strict=True)
    means = {name: sum(column) / len(rows) for name, column in zip(FIGURES, columns, strict=True)}
    return {name: 0.0 if math.isnan(value) else value for name, value in means.items()}


def step_figures(experience: Experience, scores: ReplyScores, stopped: Tensor) -> dict[str, float]:
    """What every policy objective reports of a micro-batch.

    Args:
        experience: The replies of the micro-batch.
        scores: What the policy says of them now.
        stopped: Where clipping left no gradient.

    Returns:
        Means. kl: nats per token from the policy that sampled to the reference, estimated by k3. policy_shift: the same
        to the policy as it is now. unscored: share of replies without a reward. A reward that no reply has is left out.
    """
    rollouts, mask_BR = experience.rollouts, experience.rollouts.mask_BR
    tokens = int(mask_BR.sum())
    logp_BR = scores.logprobs_BR.detach()
    figures = _known_means({"reward": experience.rewards_B})
    if experience.reference_BR is not None:
        figures["kl"] = (k3(rollouts.logprobs_BR, experience.reference_BR) * mask_BR).sum().item() / tokens
    figures |= {
        "length": tokens / len(experience),
        "entropy": scores.entropy_BR.detach().sum().item() / tokens,
        "clip_share": stopped.double().mean().item(),
        "policy_shift": (k3(rollouts.logprobs_BR, logp_BR) * mask_BR).sum().item() / tokens,
        "ended": rollouts.ended_B.double().mean().item(),
        "unscored": experience.rewards_B.isnan().double().mean().item(),
        "tokens": float(rollouts.ids_BT.numel()),
    }
    if len(experience.parts) > 1:
        figures |= _known_means({f"reward_{name}": values for name, values in experience.parts.items()})
    return figures


def guard_figures(experience: Experience) -> dict[str, float]:
    """Means over the rollouts of all processes, as `Guards.see` takes them. entropy: of what was sampled, by its
    log-probabilities. kl: by its log ratios; NaN where there is no reference."""
    rollouts, known_B = experience.rollouts, experience.rewards_B.isfinite()
    tokens = rollouts.mask_BR.sum().double()
    sums = torch.stack([
        known_B.sum().double(), experience.rewards_B[known_B].double().sum(), tokens,
        -rollouts.logprobs_BR.double().sum(), kl_sum(experience), tokens.new_tensor(float(len(experience))),
        tokens.new_tensor(repetition(rollouts.reply_BR.tolist(), rollouts.mask_BR.sum(1).tolist())),
    ])  # fmt: skip
    known, reward, tokens_, nats, kl, replies, repeated = sum_over_processes(sums).tolist()
    return {"reward": reward / known, "entropy": nats / tokens_, "length": tokens_ / replies,
            "repetition": repeated / replies, "kl": kl / tokens_}  # fmt: skip


def kl_sum(experience: Experience) -> Tensor:
    """Nats over all tokens of what was drawn, to the reference, float64; NaN where there is no reference."""
    rollouts = experience.rollouts
    if experience.reference_BR is None:
        return rollouts.logprobs_BR.new_tensor(math.nan, dtype=torch.float64)
    return ((rollouts.logprobs_BR - experience.reference_BR).double() * rollouts.mask_BR).sum()


def _known_means(named: dict[str, Tensor]) -> dict[str, float]:
    """Of each that has a number."""
    return {name: values.nanmean().item() for name, values in named.items() if bool(values.isfinite().any())}
