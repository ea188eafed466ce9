"""GPT-OSS's block: attention that may look at nothing, and experts whose gates are clamped.

Shapes: N tokens, F inner width of an expert.
"""

import torch
from torch import Tensor, nn

from lapis.families.config import ModelConfig
from lapis.families.gpt_oss import ALPHA, LIMIT
from lapis.model.blocks.attention import Attention, AttentionCore
from lapis.model.blocks.experts import MixtureOfExperts
from lapis.model.blocks.stacked import StackedExperts, StackedLinear
from lapis.model.blocks.standard import Architecture, TransformerBlock


class SinkAttention(Attention):
    """Attention with one more score for each head, which no value belongs to (OpenAI 2025, arXiv:2508.10925)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.sinks = nn.Parameter(torch.empty(config.heads))
        self.core = SinkCore(config.attention_scale, self)


class SinkCore(AttentionCore):
    """The core of an attention with sinks; the sinks are looked up in it at every call."""

    def __init__(self, scale: float, attention: SinkAttention) -> None:
        super().__init__(scale)
        self._attention = (attention,)  # in a tuple: not a second home for its parameters

    @property
    def sinks(self) -> Tensor | None:
        return self._attention[0].sinks


class ClampedExperts(StackedExperts):
    """All experts of a block, each (1 + up) gate sigmoid(alpha gate), projected back.

    Gate and up are clamped, the gate from above alone, and lie interleaved: 0 is the gate, 1 the up, 2 the gate, ...
    """

    def __init__(self, config: ModelConfig, count: int) -> None:
        super().__init__()
        self.gate_up = StackedLinear(count, config.dim, 2 * config.ffn_dim, inputs_first=True, bias=True)
        self.down = StackedLinear(count, config.ffn_dim, config.dim, inputs_first=True, bias=True)

    def inner(self, both_N2F: Tensor) -> Tensor:
        gate_NF, up_NF = both_N2F[..., ::2].clamp(max=LIMIT), both_N2F[..., 1::2].clamp(-LIMIT, LIMIT)
        return (up_NF + 1) * gate_NF * torch.sigmoid(ALPHA * gate_NF)


class GptOssBlock(TransformerBlock):
    """The usual block, with sinks in its attention and a mixture in the place of its MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, mlp=MixtureOfExperts(config, ClampedExperts))
        self.attn = SinkAttention(config, layer)


ARCHITECTURE = Architecture(GptOssBlock)
