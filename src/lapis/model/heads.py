"""What stands on top of the last hidden state: logits over a vocabulary, classes, or nothing.

A head is applied to hidden states of any leading shape, so a loss can run it only where there is loss, or in chunks.
`put_head` puts another one on a model. Leaves out: which token a classifier looks at (transformer.py).

Shapes: B batch, T time, D model dim, V vocabulary, C classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import CLASS_FIELDS, MLP_KINDS, Head, ModelConfig, class_fields
from lapis.model.norm import make_norm

if TYPE_CHECKING:
    from lapis.model.transformer import Transformer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class LanguageHead(nn.Module):
    """hidden -> logits over the vocabulary. Tied: the embedding is the weight, looked up at every call."""

    def __init__(self, config: ModelConfig, embed: nn.Module) -> None:
        super().__init__()
        if config.tied:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(config.vocab, config.dim))
        if config.head == "masked":
            self.bias = nn.Parameter(torch.zeros(config.vocab))
        else:
            self.register_parameter("bias", None)
        self._embed = (embed,)  # in a tuple: not a second home for its parameters

    @property
    def matrix(self) -> Tensor:
        """The output embedding, [V, D]; the input's where they are tied."""
        return self._embed[0].weight if self.weight is None else self.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.matrix, self.bias)


class MaskedHead(LanguageHead):
    """BERT's: dense, activation, norm, then logits with a bias (Devlin et al. 2018)."""

    def __init__(self, config: ModelConfig, embed: nn.Module) -> None:
        super().__init__(config, embed)
        self.transform = nn.Linear(config.dim, config.dim)
        self.norm = make_norm(config, config.dim)
        self.activation = ACTIVATIONS[MLP_KINDS[config.mlp][1]]

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(self.norm(self.activation(self.transform(hidden))))


class ClassHead(nn.Module):
    """hidden -> scores of classes, or one number; through BERT's pooler where there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooler else None
        self.classes = nn.Linear(config.dim, config.classes, bias=not config.causal)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden))
        scores: Tensor = self.classes(hidden)
        return scores


class NoHead(nn.Module):
    """hidden -> hidden. A pooler that the folder holds is kept, for `pooled`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooler else None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden

    def pooled(self, hidden_BTD: Tensor) -> Tensor:
        """The pooler's view of the first token, [B, D]."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(hidden_BTD[:, 0]))


def make_head(config: ModelConfig, embed: nn.Module) -> nn.Module:
    if config.head == "lm":
        return LanguageHead(config, embed)
    if config.head == "masked":
        return MaskedHead(config, embed)
    return ClassHead(config) if config.head in ("classes", "scalar") else NoHead(config)


def put_head(model: "Transformer", head: Head, classes: Sequence[str] = ()) -> list[str]:
    """Another head on a model, in place; the names of its parameters that are new and drawn at random (0.02).

    classes: their names in order, for head="classes"; config.json gets them, where transformers looks for them. What
    the old head has of the same name and shape (a pooler, one's own embedding rows) is kept. A head that is the same
    already keeps its weights.
    """
    if (head == "classes") != bool(classes):
        raise ValueError("classes are given with the head of that name, and only with it")
    config, old = model.config, model.head.state_dict()
    extra = {name: value for name, value in config.extra.items() if name not in CLASS_FIELDS} | class_fields(classes)
    pooler = head in ("classes", "scalar") and not config.causal and config.image is None
    like = next(model.parameters())
    model.config = dataclasses.replace(config, head=head, classes=len(classes), pooler=pooler, extra=extra)
    model.head = make_head(model.config, model.embed).to(like.device, like.dtype)
    fresh = []
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name in old and old[name].shape == parameter.shape:
                parameter.copy_(old[name])
                continue
            fresh.append(f"head.{name}")
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    model.head.train(model.training)
    return fresh
