"""The model that a policy must not stray too far from, and what it says of the policy's replies.

It is the policy as it was handed over: where that has LoRA, the same weights with the adapters off, and no second model
sits in memory; else a copy, which is said. Or it is a folder. Leaves out: references that move.
"""

import copy
from dataclasses import replace

import torch

from lapis.checkpoint import open_checkpoint
from lapis.errors import CheckpointError, TrainingError
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.distributed.ranks import added
from lapis.training.objectives.policy.experience import Experience
from lapis.training.objectives.policy.rollouts import read_again

_FAR = 1.0  # nats per token between policy and reference at the first rollout: no fine-tune starts there
_AT_ONCE = 64  # replies


class Reference:
    """source: "start", or a folder. digest: of a folder's weights, "" for the start. notes: for the person who waits.

    Raises CheckpointError for a folder whose tokenizer is another.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.notes = source, list[str]()
        self.digest = "" if source == "start" else open_checkpoint(source).digest()
        self._model: Transformer | None = None
        self._checked = False
        if source != "start" and Tokenizer.open(source).digest() != tokenizer.digest():
            raise CheckpointError(
                f"reference: {source} has another tokenizer than the policy; a reference is the policy's parent"
            )

    def begin(self, model: Transformer) -> None:
        """Takes the reference from the policy as it is handed over."""
        if self.source != "start":
            self._model = load(self.source, dtype=torch.float32, device=model.embed.weight.device)
            ours, theirs = model.config, self._model.config
            for name in ("vocab", "dim", "layers", "heads"):
                if getattr(ours, name) != getattr(theirs, name):
                    raise CheckpointError(
                        f"reference: {self.source} has {name} {getattr(theirs, name):,} and the policy "
                        f"{getattr(ours, name):,}; a reference is the policy's parent"
                    )
        elif not has_adapters(model):
            self._model = copy.deepcopy(model).eval()
        if self._model is not None:
            self._model.requires_grad_(False)
            size = sum(p.numel() * p.element_size() for p in self._model.parameters())
            self.notes.append(f"reference: a second model is held in memory ({size / 1e6:,.0f} MB); LoRA needs none")
        else:
            self.notes.append("reference: the policy with its adapters off; no second model is held")

    @torch.no_grad()
    def read(self, policy: Transformer, experience: Experience, temperature: float) -> Experience:
        """The experience with the reference's log-probabilities of its tokens."""
        if self._model is None:
            from lapis.model import lora

            with lora.off(policy):
                found = _read(policy, experience, temperature)
        else:
            found = _read(self._model, experience, temperature)
        rollouts = found.rollouts
        assert found.reference_BR is not None
        if self.source != "start" and not self._checked:
            nats = ((rollouts.logprobs_BR - found.reference_BR) * rollouts.mask_BR).sum()
            nats, tokens = added(torch.stack((nats.double(), rollouts.mask_BR.sum().double())))
            if nats / tokens > _FAR:
                raise TrainingError(
                    f"reference: {self.source} differs by {nats / tokens:.2f} nats per token from the policy before "
                    "its first step; a reference is the policy's parent"
                )
            self._checked = True
        return found


def has_adapters(model: Transformer) -> bool:
    """Whether the model has LoRA on it, whose base is the reference."""
    from lapis.model import lora

    return lora.of(model) is not None


def _read(model: Transformer, experience: Experience, temperature: float) -> Experience:
    pieces = []
    R = experience.rollouts.reply_BR.shape[1]
    for first in range(0, len(experience), _AT_ONCE):
        r = experience.rows(first, min(first + _AT_ONCE, len(experience))).rollouts
        said = read_again(model, r.ids_BT, r.prompt_B, r.reply_BR, r.mask_BR, temperature)
        pieces.append(torch.nn.functional.pad(said.logprobs_BR, (0, R - said.logprobs_BR.shape[1])))
    return replace(experience, reference_BR=torch.cat(pieces))
