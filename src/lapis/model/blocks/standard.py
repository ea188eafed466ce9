"""The usual block, and what an architecture may have in its place.

Shapes: B batch, T time, D model dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import MLP_KINDS, ModelConfig
from lapis.model.blocks.attention import Attention, Shared
from lapis.model.blocks.norm import Norm, make_norm
from lapis.model.cache import Cache

MakeNorm = Callable[[ModelConfig, int], Norm]
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or down(act(up(x))) where there is no gate.

    act: an activation with parameters, which the block brings; None is the one that the config names. width: of the
    inner vector; 0 = ffn_dim.
    """

    def __init__(self, config: ModelConfig, act: Activation | None = None, width: int = 0) -> None:
        super().__init__()
        self.biased, width = config.bias in ("mlp", "all"), width or config.ffn_dim
        gated, activation = MLP_KINDS[config.mlp]
        self.gate = nn.Linear(config.dim, width, bias=self.biased) if gated else None
        self.up = nn.Linear(config.dim, width, bias=self.biased)
        self.down = nn.Linear(width, config.dim, bias=self.biased)
        self.act = act or ACTIVATIONS[activation]

    def forward(self, x_BTD: Tensor, weights: Tensor | None = None) -> Tensor:
        """weights: What each output is multiplied by; where `down` has no bias its narrower input is instead."""
        up: Tensor = self.up(x_BTD)
        inner = self.act(up) if self.gate is None else times(self.act(self.gate(x_BTD)), up)
        if weights is not None and not self.biased:
            inner, weights = times(inner, weights.to(inner.dtype)), None
        out: Tensor = self.down(inner)
        return out if weights is None else out * weights


def times(fresh: Tensor, other: Tensor) -> Tensor:
    """fresh * other, in the memory of the former where no gradient is computed."""
    return fresh * other if torch.is_grad_enabled() else fresh.mul_(other)


class Norms(nn.Module):
    """The norms of a block or of a model, so that a name here is a component's name.

    Attributes:
        attn, mlp: Before attention and MLP (after the sum where norms come last).
        attn_out, mlp_out: After attention and MLP, before the sum; few blocks have them.
        mlp_dense, experts, experts_out, inputs_out: Of Gemma 4: after the MLP that experts stand beside, before and
            after these, and after the inputs of a layer.
        embed, final: Of the model.
    """

    attn: Norm
    attn_out: Norm
    mlp: Norm
    mlp_out: Norm
    mlp_dense: Norm
    experts: Norm
    experts_out: Norm
    inputs_out: Norm
    embed: Norm
    final: Norm

    def __init__(self, config: ModelConfig, norm: MakeNorm, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, norm(config, config.dim))


class TransformerBlock(nn.Module):
    """Attention and MLP, each added to the residual stream; normed before (most) or after (BERT).

    Where they are parallel, the MLP reads what the attention reads (Wang and Komatsuzaki 2021, GPT-J).

    A block of another kind is a subclass. It keeps the names `attn` (with q, k, v, o and core), `mlp` (gate, up, down)
    and `norm`, so that adapters, freezing, the lens and tables of parts need to know nothing of it.
    """

    dropout = 0.0
    only_adds = True  # what leaves the block is what enters it and what its two halves add

    def __init__(
        self, config: ModelConfig, layer: int, norm: MakeNorm = make_norm, norms: tuple[str, ...] = ("attn", "mlp"),
        mlp: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.parallel = config.parallel
        self.norm = Norms(config, norm, *(name for name in norms if (name, self.parallel) != ("mlp", "shared")))
        self.attn = Attention(config, layer, norm)
        self.mlp = Mlp(config) if mlp is None else mlp
        self.post = config.norm_place == "post"

    @property
    def mixer(self) -> nn.Module:
        """What mixes the tokens: attention, or what a layer has in its place."""
        return self.attn

    @property
    def added(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs are added to the stream, for attention and for the MLP."""
        return self.attn, self.mlp

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        norm = self.norm
        if self.post:
            x_BTD = norm.attn(x_BTD + self._dropped(self.attn(x_BTD, shared, cache)))
            x_BTD = norm.mlp(x_BTD + self._dropped(self.mlp(x_BTD)))
        elif self.parallel != "none":
            normed_BTD = norm.attn(x_BTD)
            mlp_BTD = self.mlp(normed_BTD if self.parallel == "shared" else norm.mlp(x_BTD))
            x_BTD = x_BTD + self._dropped(self.attn(normed_BTD, shared, cache)) + self._dropped(mlp_BTD)
        else:
            x_BTD = x_BTD + self._dropped(self.attn(norm.attn(x_BTD), shared, cache))
            x_BTD = x_BTD + self._dropped(self.mlp(norm.mlp(x_BTD)))
        return x_BTD

    def _dropped(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout) if self.dropout and self.training else x_BTD


@dataclass(frozen=True)
class Architecture:
    """What a model is built from.

    Attributes:
        block: Makes the block of a layer.
        norm: Makes a norm of a width: the final one, and whatever the block asks it for.
        embed_scale: What embedded tokens are multiplied by, rounded to the dtype of the embedding.
        layer_inputs: Makes what gives each layer a vector of each token, from ids and embedded tokens.
    """

    block: Callable[[ModelConfig, int], TransformerBlock] = TransformerBlock
    norm: MakeNorm = make_norm
    embed_scale: Callable[[ModelConfig], float] = lambda config: 1.0
    layer_inputs: Callable[[ModelConfig], nn.Module] | None = None


ARCHITECTURE = Architecture()
