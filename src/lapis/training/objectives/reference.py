"""The reference model: what a policy is compared with, in learning from preferences and from rewards.

    start     the policy as it is when the run begins
    base      the model without its LoRA adapter, which is switched off for a moment
    FOLDER    a model that the policy descends from

Preferences: the log-probabilities of all replies are computed once, before the first step, and lie beside the
checkpoints (`reply_references`); the model is let go. Rewards: replies are new at every step, so the model is at hand
(`Reference`): the policy with its adapter off, or a second model in memory.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.files import read_json
from lapis.checkpoint.tensor_file import read_tensors, write_tensors
from lapis.errors import ConfigError, LapisError, TrainingError
from lapis.evaluation.replies import reply_log_probabilities
from lapis.model import lora
from lapis.model.load import load
from lapis.model.scoring import Progress
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import EncodedReply
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.loop.state import weights_digest

_FILE, _FACTS = "reference.safetensors", "reference.json"
_SHAPE = ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocab")
_RELATED = 0.3  # cosine of the weights; unrelated models have about 0
_FAR = 1.0  # nats per token between policy and reference before the first step: no fine-tune begins there


class Reference:
    """The reference of a policy whose replies are new at every step.

    Args:
        source: "start", or a folder.
        tokenizer: The policy's.

    Attributes:
        digest: sha256 of a folder's weights, known after `begin`; "" for "start", whose weights the run records itself.
        notes: Lines to show to the user.
        model: The second model in memory; None where the policy with its adapter off is the reference.

    Raises:
        ConfigError: For a folder whose tokenizer is not the policy's.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.digest, self.notes = "", list[str]()
        self.model: Transformer | None = None
        check_tokenizer(source, tokenizer)

    def begin(self, policy: Transformer) -> None:
        """Opens the reference, or copies the policy as it is now. Raises ConfigError for a folder that is no parent."""
        if self.source != "start":
            self.model = open_parent(policy, self.tokenizer, self.source)
            self.digest = weights_digest(self.model)
        elif lora.of(policy) is None:
            self.model = copy.deepcopy(policy).eval()
        if self.model is None:
            self.notes.append("reference: the policy with its adapters off; no second model is in memory")
            return
        self.model.requires_grad_(False)
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.notes.append(f"reference: a second model is in memory ({size / 1e6:,.0f} MB); LoRA needs none")

    def on(self, policy: Transformer) -> tuple[Transformer, AbstractContextManager[None]]:
        """The model to ask, and the context in which it is the reference."""
        return (policy, lora.off(policy)) if self.model is None else (self.model, nullcontext())

    def compare(self, nats: float) -> None:
        """Raises ConfigError where the reference is `nats` per token away from the policy at the first rollout."""
        if nats > _FAR:
            raise _no_parent(self.source, f"it differs by {nats:.2f} nats per token from the policy before its first "
                             "step")  # fmt: skip


def reply_references(
    policy: Transformer,
    tokenizer: Tokenizer,
    source: str,
    replies: Mapping[str, Sequence[EncodedReply]],
    folder: Path | None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The reference's log-probability of each reply.

    Args:
        policy: As it is at the start of its run.
        tokenizer: The policy's.
        source: "start", "base" (the caller has switched the adapter off), or a folder.
        replies: Lists of replies by name.
        folder: Where the result is kept; what it holds for the same weights and replies is read, not computed.
        progress: Called with tokens done and tokens in all.

    Returns:
        Nats, float32, one for each reply, by the names of `replies`; empty lists are left out.

    Raises:
        ConfigError: Where `source` is a folder whose model is not the policy's parent.
        TrainingError: Where that folder has other weights than when the run in `folder` began.
    """
    parent = policy if source in ("start", "base") else open_parent(policy, tokenizer, source)
    facts = {"weights": weights_digest(parent), "replies": _replies_digest(replies), "reference": source}
    if folder is not None and parent is not policy:
        _check_unchanged(folder, facts)
    known = _read(folder, facts)
    if known is not None:
        return known
    values: dict[str, Tensor] = {}
    sizes = {name: sum(len(reply.spoken.ids) for reply in some) for name, some in replies.items()}
    for name, some in replies.items():
        before = sum(sizes[other] for other in values)

        def show(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, sum(sizes.values()))

        if some:
            values[name] = torch.from_numpy(reply_log_probabilities(parent, some, progress=show)).float()
    if folder is not None:
        with commit_file(folder / _FILE, overwrite=True) as temporary:
            write_tensors(temporary, values)
        with commit_file(folder / _FACTS, overwrite=True) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return values


def without_adapter(model: Transformer) -> AbstractContextManager[None]:
    """The model as it is without its LoRA adapter, for a moment. Raises ConfigError where it has none."""
    if lora.of(model) is None:
        raise ConfigError('reference: it is "base", but the model carries no adapter; use "start"')
    return lora.off(model)


def check_tokenizer(source: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where `source` is a folder with another tokenizer than the policy's."""
    if source in ("start", "base"):
        return
    try:
        other = Tokenizer.open(source)
    except LapisError as error:
        raise type(error)(f"reference: {error}") from None
    if other.digest() != tokenizer.digest():
        raise _no_parent(source, "it has another tokenizer")


def open_parent(policy: Transformer, tokenizer: Tokenizer, source: str) -> Transformer:
    """The model of a folder, if the policy can be a fine-tune of it: the same shape and tokenizer, and weights that
    point the same way. Raises ConfigError where not."""
    check_tokenizer(source, tokenizer)
    try:
        parent = load(source, dtype=torch.float32, device=next(policy.parameters()).device)
    except LapisError as error:
        raise type(error)(f"reference: {error}") from None
    for name in _SHAPE:
        ours, theirs = getattr(policy.config, name), getattr(parent.config, name)
        if ours != theirs:
            raise _no_parent(source, f"its {name} is {theirs}, the policy's {ours}")
    cosine = weights_cosine(policy, parent)
    if cosine < _RELATED:
        raise _no_parent(source, f"the cosine of their weights is {cosine:.2f}")
    return parent


def _no_parent(source: str, why: str) -> ConfigError:
    return ConfigError(
        f"reference: {source} is not the policy's parent: {why}; give the model that the policy was made from, or "
        '"start"'
    )


@torch.no_grad()
def weights_cosine(one: Transformer, two: Transformer) -> float:
    """Cosine of all matrices of two models, by name. Vectors are left out: norms are alike in unrelated models too.
    Sums are float64."""
    others = dict(two.named_parameters())
    dots = torch.zeros(3, dtype=torch.float64)
    for name, parameter in one.named_parameters():
        if parameter.dim() > 1 and name in others and others[name].shape == parameter.shape:
            a, b = parameter.detach().flatten().float(), others[name].detach().flatten().float()
            dots += torch.stack([(a * b).sum(dtype=torch.float64), (a * a).sum(dtype=torch.float64),
                                 (b * b).sum(dtype=torch.float64)]).cpu()  # fmt: skip
    return float(dots[0] / (dots[1] * dots[2]).sqrt().clamp(min=1e-30))


def _replies_digest(replies: Mapping[str, Sequence[EncodedReply]]) -> str:
    digest = hashlib.sha256()
    for name, some in sorted(replies.items()):
        digest.update(f"{name} {len(some)}\n".encode())
        for reply in some:
            digest.update(f"{reply.first} {reply.last}\n".encode() + reply.ids[: reply.last].tobytes())
    return digest.hexdigest()


def _check_unchanged(folder: Path, facts: Mapping[str, str]) -> None:
    """Raises TrainingError where a run with checkpoints in `folder` began with other weights in the same place."""
    if not any(folder.glob("step-*")):
        return
    try:
        before = read_json(folder / _FACTS)
    except (LapisError, ValueError, OSError):
        return
    if before.get("reference") == facts["reference"] and before.get("weights") != facts["weights"]:
        raise TrainingError(
            f"reference: {facts['reference']} has other weights than when the run began "
            f"({str(before.get('weights'))[:12]} then, {facts['weights'][:12]} now). Put the model back to go on, or "
            "start anew with --fresh"
        )


def _read(folder: Path | None, facts: Mapping[str, str]) -> dict[str, Tensor] | None:
    """What was computed before, if it was for these weights and replies."""
    if folder is None or not (folder / _FACTS).is_file() or not (folder / _FILE).is_file():
        return None
    try:
        return read_tensors(folder / _FILE) if read_json(folder / _FACTS) == dict(facts) else None
    except (LapisError, ValueError, OSError):
        return None  # damaged: computed anew
