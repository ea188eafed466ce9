"""The reference of a preference objective: what the policy is measured against, without a second model in memory.

Its log-probabilities are computed once, before the first step, and kept with a digest of the weights and the data
beside the run's checkpoints; a run that goes on reads them. By `reference`:

    start     the policy as it is when the run begins
    base      the model without its adapter, which is switched off for a moment on every batch (LoRA)
    FOLDER    a model that the policy descends from; it is opened, asked, and let go

Leaves out: whether it may drift (it does not).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.files import read_json
from lapis.checkpoint.tensor_file import read_tensors, write_tensors
from lapis.errors import ConfigError, LapisError
from lapis.evaluation.replies import reply_log_probabilities
from lapis.model import lora
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.rows.pair_rows import Reply
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.loop.state import weights_digest

_FILE, _FACTS = "reference.safetensors", "reference.json"
_SHAPE = ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocab")
_KIN = 0.3  # cosine of the weights; strangers have about 0


def references(
    model: Transformer,
    tokenizer: Tokenizer,
    source: str,
    replies: Mapping[str, Sequence[Reply]],
    folder: Path | None,
) -> dict[str, Tensor]:
    """Log-probabilities (nats, float32) of each list of replies: computed, or read where `folder` keeps those of the
    same weights and data. model: the policy at the start of its run. Raises ConfigError where `source` is a folder
    whose model is not the policy's parent."""
    parent = model if source in ("start", "base") else parent_of(model, tokenizer, source)
    facts = {"weights": weights_digest(parent), "replies": _digest(replies), "reference": source}
    kept = _kept(folder, facts)
    if kept is not None:
        return kept
    found = {
        name: torch.from_numpy(reply_log_probabilities(parent, some)).float() for name, some in replies.items() if some
    }
    if folder is not None:
        with commit_file(folder / _FILE, overwrite=True) as temporary:
            write_tensors(temporary, found)
        with commit_file(folder / _FACTS, overwrite=True) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return found


def without_adapter(model: Transformer) -> AbstractContextManager[None]:
    """The model as it is without its LoRA adapter, for a moment. Raises ConfigError where it carries none."""
    if lora.of(model) is None:
        raise ConfigError('reference: it is "base", but the model carries no adapter; use "start"')
    return lora.off(model)


def parent_of(policy: Transformer, tokenizer: Tokenizer, source: str) -> Transformer:
    """The model of a folder, if it can be the one that the policy was made from: the same shape and tokenizer, and
    weights that point the same way. Raises ConfigError, one line, where not."""
    try:
        other = Tokenizer.open(source)
        parent = load(source, dtype=torch.float32, device=next(policy.parameters()).device)
    except LapisError as error:
        raise type(error)(f"reference: {error}") from None
    remedy = 'give the model that the policy was made from, or "start"'
    for name in _SHAPE:
        mine, theirs = getattr(policy.config, name), getattr(parent.config, name)
        if mine != theirs:
            raise ConfigError(f"reference: {source} is not the policy's parent: its {name} is {theirs}, the policy's "
                              f"{mine}; {remedy}")  # fmt: skip
    if other.digest() != tokenizer.digest():
        raise ConfigError(f"reference: {source} is not the policy's parent: its tokenizer is another; {remedy}")
    cosine = kinship(policy, parent)
    if cosine < _KIN:
        raise ConfigError(f"reference: {source} is not the policy's parent: the cosine of their weights is "
                          f"{cosine:.2f}; {remedy}")  # fmt: skip
    return parent


@torch.no_grad()
def kinship(one: Transformer, two: Transformer) -> float:
    """Cosine of all matrices of two models, by name; vectors (norms) are alike in strangers too. Float64 sums."""
    others = dict(two.named_parameters())
    dots = torch.zeros(3, dtype=torch.float64)
    for name, parameter in one.named_parameters():
        if parameter.dim() > 1 and name in others and others[name].shape == parameter.shape:
            a, b = parameter.detach().flatten().float(), others[name].detach().flatten().float()
            dots += torch.stack([(a * b).sum(dtype=torch.float64), (a * a).sum(dtype=torch.float64),
                                 (b * b).sum(dtype=torch.float64)]).cpu()  # fmt: skip
    return float(dots[0] / (dots[1] * dots[2]).sqrt().clamp(min=1e-30))


def _digest(replies: Mapping[str, Sequence[Reply]]) -> str:
    digest = hashlib.sha256()
    for name, some in sorted(replies.items()):
        digest.update(f"{name} {len(some)}\n".encode())
        for reply in some:
            digest.update(f"{reply.first} {reply.last}\n".encode() + reply.ids[: reply.last].tobytes())
    return digest.hexdigest()


def _kept(folder: Path | None, facts: Mapping[str, str]) -> dict[str, Tensor] | None:
    """What was computed before, if it was for these weights and this data."""
    if folder is None or not (folder / _FACTS).is_file() or not (folder / _FILE).is_file():
        return None
    try:
        return read_tensors(folder / _FILE) if read_json(folder / _FACTS) == dict(facts) else None
    except (LapisError, ValueError, OSError):
        return None  # damaged: computed anew
