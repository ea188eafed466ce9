"""What stands on top of the last hidden state: logits over a vocabulary, classes, or nothing.

A head is applied to hidden states of any leading shape, so a loss can run it only where there is loss, or in chunks.
Which token a classifier looks at is decided in transformer.py.

Shapes: B batch, T time, D model dim, V vocabulary, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import MLP_KINDS, ModelConfig
from lapis.model.blocks.attention import capped
from lapis.model.blocks.norm import Norm, make_norm
from lapis.model.blocks.standard import ACTIVATIONS, Activation


class LanguageHead(nn.Module):
    """hidden -> logits over the vocabulary. Tied: the embedding is the weight, looked up at every call.

    cap: logits are cap tanh(logit / cap); 0 = as they are.
    """

    def __init__(self, config: ModelConfig, embed: nn.Module) -> None:
        super().__init__()
        self.cap = config.logit_cap
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
        return capped(F.linear(hidden, self.matrix, self.bias), self.cap)


class MaskedHead(LanguageHead):
    """BERT's: dense, activation, norm, then logits with a bias (Devlin et al. 2018)."""

    transform: nn.Linear
    norm: Norm
    activation: Activation

    def __init__(self, config: ModelConfig, embed: nn.Module) -> None:
        super().__init__(config, embed)
        _add_transform(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(self.norm(self.activation(self.transform(hidden))))


def _add_transform(head: nn.Module, config: ModelConfig) -> None:
    """The dense layer and the norm before the logits of masked words."""
    head.transform = nn.Linear(config.dim, config.dim, bias=config.bias == "all")
    head.norm = make_norm(config, config.dim)
    head.activation = ACTIVATIONS[MLP_KINDS[config.mlp][1]]  # type: ignore[assignment]


class ClassHead(nn.Module):
    """hidden -> scores of classes, or one number; through BERT's pooler, or a dense layer of its own, if any."""

    transform: nn.Linear
    norm: Norm

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooler else None
        self.dense = nn.Linear(config.dim, config.dim) if config.class_dense in ("tanh", "relu") else None
        self.activation: Activation = torch.tanh if config.class_dense == "tanh" else F.relu
        self.transforms = config.class_dense == "masked"
        if self.transforms:
            _add_transform(self, config)
        self.classes = nn.Linear(config.dim, config.classes, bias=not config.causal)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden))
        if self.dense is not None:
            hidden = self.activation(self.dense(hidden))
        if self.transforms:
            hidden = self.norm(self.activation(self.transform(hidden)))
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
    """The head of a config; one that is tied shares the embedding's weight."""
    if config.head == "lm":
        return LanguageHead(config, embed)
    if config.head == "masked":
        return MaskedHead(config, embed)
    return ClassHead(config) if config.head in ("classes", "scalar") else NoHead(config)
