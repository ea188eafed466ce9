"""What a policy learns from between two rollouts: replies, rewards, advantages, as tensors that a checkpoint can hold.

Shapes: B replies, T prompt and reply, R reply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.model.transformer import Transformer
from lapis.training.distributed.parallel import join
from lapis.training.objectives.policy.rollouts import Rollouts, score_replies

_AT_ONCE = 64  # replies that the reference reads at once


@dataclass(frozen=True)
class Experience:
    """Replies with their rewards.

    Attributes:
        rewards_B: float32, the weighted sum; NaN where a reward failed.
        parts: Each reward alone, [B].
        advantages: [B], or [B, R] where tokens differ.
        reference_BR: Log-probabilities under the reference, nats.
        values_BR: Of a value head, before each token.
        returns_BR: What these values should have been.

    What an objective does not need is None.
    """

    rollouts: Rollouts
    rewards_B: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    advantages: Tensor | None = None
    reference_BR: Tensor | None = None
    values_BR: Tensor | None = None
    returns_BR: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rewards_B)

    def tensors(self) -> dict[str, Tensor]:
        """By name; bool as uint8, so that every file format has it."""
        named = {f"rollouts.{name}": value for name, value in self.rollouts.tensors().items()}
        named |= {f"parts.{name}": value for name, value in self.parts.items()}
        for name in ("rewards_B", "advantages", "reference_BR", "values_BR", "returns_BR"):
            if (value := getattr(self, name)) is not None:
                named[name] = value
        return {name: value.byte() if value.dtype == torch.bool else value for name, value in named.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Experience":
        """The reverse of `tensors`."""
        rollouts = {name[9:]: value for name, value in tensors.items() if name.startswith("rollouts.")}
        for name in ("mask_BR", "ended_B"):
            rollouts[name] = rollouts[name].bool()
        parts = {name[6:]: value for name, value in tensors.items() if name.startswith("parts.")}
        rest = {name: value for name, value in tensors.items() if "." not in name}
        return cls(Rollouts(**rollouts), parts=parts, **rest)

    def rows(self, first: int, last: int) -> "Experience":
        """Replies [first, last), without the columns that only longer ones need."""
        mask_BR = self.rollouts.mask_BR[first:last]
        R = int(mask_BR.sum(1).max())
        T = int((self.rollouts.prompt_B[first:last] + mask_BR.sum(1)).max())
        widths = {"_BR": R, "_BT": T}

        def cut(name: str, value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            width = widths.get(name[-3:], R if value.dim() == 2 else None)
            return value[first:last] if width is None else value[first:last, :width]

        rollouts = Rollouts(**{name: value for name, old in self.rollouts.tensors().items()
                               if (value := cut(name, old)) is not None})  # fmt: skip
        names = ("advantages", "reference_BR", "values_BR", "returns_BR")
        return replace(
            self,
            rollouts=rollouts,
            rewards_B=self.rewards_B[first:last],
            parts={name: value[first:last] for name, value in self.parts.items()},
            **{name: cut(name, getattr(self, name)) for name in names},
        )


def joined_rollouts(pieces: Sequence[Rollouts]) -> Rollouts:
    """Rollouts one after the other, padded to the longest."""
    return pieces[0] if len(pieces) == 1 else Rollouts(**_joined([piece.tensors() for piece in pieces]))


def joined_experience(pieces: Sequence[Experience]) -> Experience:
    """Experience one after the other, padded to the longest."""
    return pieces[0] if len(pieces) == 1 else Experience.of(_joined([piece.tensors() for piece in pieces]))


def _joined(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name in pieces[0]:
        tensors = [piece[name] for piece in pieces]
        if tensors[0].dim() == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        result[name] = torch.cat(tensors)
    return result


@torch.no_grad()
def reference_log_probabilities(model: Transformer, experience: Experience, temperature: float) -> Tensor:
    """What a reference model says of the tokens of all replies: nats, [B, R] float32, 0 outside the mask."""
    pieces = []
    R = experience.rollouts.reply_BR.shape[1]
    for first in range(0, len(experience), _AT_ONCE):
        rollouts = experience.rows(first, min(first + _AT_ONCE, len(experience))).rollouts
        scores = score_replies(model, rollouts, temperature)
        pieces.append(F.pad(scores.logprobs_BR, (0, R - scores.logprobs_BR.shape[1])))
    return torch.cat(pieces)


def gather_experience(own: list[int], experience: Experience) -> Experience:
    """The experience of all processes in the order of the step's parts, so that one of them can save it all, and any
    number of processes can go on from it. own: the parts that `experience` is of. Raises StepLeft as
    `sum_over_processes` does."""
    world = join()
    if world.size == 1:
        return experience
    sent = {name: [str(t.dtype)[6:], t.tolist()] for name, t in experience.tensors().items()}
    pieces: dict[int, Experience] = {}
    for parts, received in world.gather_within([own, sent]):
        tensors = {name: torch.tensor(value, dtype=getattr(torch, kind)) for name, (kind, value) in received.items()}
        piece = Experience.of(tensors)
        size = len(piece) // len(parts)
        pieces |= {part: piece.rows(place * size, (place + 1) * size) for place, part in enumerate(parts)}
    return joined_experience([pieces[part] for part in sorted(pieces)])
