"""What goes wrong when a policy follows a reward, and how it is noticed: collapse, reward hacking, KL runaway.

Each compares the last few rollouts with the first few, and speaks with the figure. A low entropy alone is no collapse:
a policy that has learned a task with one right answer has none left. Leaves out: mending.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FIGURES = ("reward", "entropy", "length", "repetition", "kl")
WINDOW = 5  # rollouts that are averaged, at the start and now

COLLAPSED = 0.1  # entropy, of what it was
LONGER = 2.0  # length, of what it was
REPEATS = 0.3  # share of words said again, above what it was
RUNAWAY = 2.0  # KL, of what it was a window ago
NEAR = 0.1  # nats per token: a KL below this runs nowhere
RISEN = 0.02  # a reward that changed by less has not risen


class Guards:
    """figures: one row per rollout, the first WINDOW and the last 2 * WINDOW of them."""

    def __init__(self) -> None:
        self._rows: dict[int, list[float]] = {}

    def see(self, number: int, figures: Mapping[str, float]) -> list[tuple[str, str]]:
        """Takes in the figures (FIGURES) of rollout `number`; what is wrong now, as kind and sentence.

        Seeing a rollout again replaces it, so that a step which is only measured leaves no trace.
        """
        self._rows = {n: row for n, row in self._rows.items() if n < number}
        self._rows[number] = [figures[name] for name in FIGURES]
        kept = sorted(self._rows)
        for old in kept[WINDOW : -2 * WINDOW]:
            del self._rows[old]
        return self._wrong() if len(self._rows) >= 2 * WINDOW else []

    def _wrong(self) -> list[tuple[str, str]]:
        order = [self._rows[number] for number in sorted(self._rows)]
        first, before, now = (_means(rows) for rows in (order[:WINDOW], order[-2 * WINDOW : -WINDOW], order[-WINDOW:]))
        said = f"while the reward went from {first['reward']:.2f} to {now['reward']:.2f}"
        found = []
        if now["entropy"] < COLLAPSED * first["entropy"] and now["reward"] < first["reward"] + RISEN:
            found.append(("collapse", f"the policy collapsed: entropy fell from {first['entropy']:.3f} to "
                          f"{now['entropy']:.3f} nats per token {said}; lower lr or raise temperature"))  # fmt: skip
        risen = now["reward"] > first["reward"] + RISEN
        if risen and now["length"] > LONGER * first["length"]:
            found.append(("length", f"replies grew from {first['length']:.0f} to {now['length']:.0f} tokens {said}; "
                          "does the reward pay for length? Add the reward length"))  # fmt: skip
        if risen and now["repetition"] > first["repetition"] + REPEATS:
            found.append(("repetition", f"replies repeat themselves: {now['repetition']:.0%} of words in a row were "
                          f"said before, {first['repetition']:.0%} at first, {said}"))  # fmt: skip
        still = now["reward"] < before["reward"] + RISEN
        if now["kl"] > max(NEAR, RUNAWAY * before["kl"]) and still:
            found.append(("kl", f"the KL to the reference ran from {before['kl']:.2f} to {now['kl']:.2f} nats per "
                          f"token {said}; raise kl or lower lr"))  # fmt: skip
        return found

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
    """Summed over replies: the share of three tokens in a row that the reply has said before."""
    total = 0.0
    for row, length in zip(ids, lengths, strict=True):
        threes = list(zip(row[: length - 2], row[1 : length - 1], row[2:length], strict=True)) if length > 2 else []
        total += 1 - len(set(threes)) / len(threes) if threes else 0.0
    return total


def _means(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Per figure; a KL that is not known is 0."""
    columns = zip(*rows, strict=True)
    means = {name: sum(column) / len(rows) for name, column in zip(FIGURES, columns, strict=True)}
    return {name: 0.0 if math.isnan(value) else value for name, value in means.items()}
