"""What the attention of a model of transformers does in one pass: weights, and where the model shows them q, k and v.

Its own eager attention computes; a function of our name, registered where transformers takes such functions, stands
before it and notes what goes in and out. Models whose attention is written out in their blocks (Bloom, MPT, Falcon)
hand over their weights alone.

Shapes: B batch, T queries, S keys, H heads, K key heads, E head dim.
"""

import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapis.model.reading.opening import quiet

NAME = "lapis"


@dataclass(frozen=True)
class Attended:
    """One layer's attention: its weights and, where the model shows them, queries, keys and values, the factor of their
    products, and the mask that was added (None hides nothing beyond the causal order)."""

    weights_BHTS: Tensor
    q_BHTE: Tensor | None = None
    k_BKSE: Tensor | None = None
    v_BKSE: Tensor | None = None
    scale: float = 1.0
    mask: Tensor | None = None


_records: ContextVar[tuple[dict[int, Attended], int]] = ContextVar("records")


@torch.inference_mode()
def record_attention(inner: Any, ids_BT: Tensor, last: int = 0) -> dict[int, Attended]:
    """Each layer's attention in one pass, by the layer's number; layers that have none, or show none, are left out.

    Args:
        inner: A causal model of transformers.
        ids_BT: int64.
        last: Of how many of the last queries it is noted; 0 = all.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _noted)
    AttentionMaskInterface.register(NAME, eager_mask)
    before, records = inner.config._attn_implementation, dict[int, Attended]()
    token = _records.set((records, last))
    try:
        with quiet():
            inner.set_attn_implementation(NAME)
        if inner.config._attn_implementation == NAME:
            inner(input_ids=ids_BT, use_cache=False)
            return records
        weights = inner(input_ids=ids_BT, use_cache=False, output_attentions=True).attentions or ()
        return {i: Attended(w_BHTS[:, :, -last:]) for i, w_BHTS in enumerate(weights) if isinstance(w_BHTS, Tensor)}
    finally:
        _records.reset(token)
        with quiet():
            inner.set_attn_implementation(before)


def _noted(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The eager attention that stands beside the module's class, with its weights noted."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    mixed, weights_BHTS = eager(module, query, key, value, attention_mask, **options)
    records, last = _records.get()
    scale = options.get("scaling")
    q_BHTE, k_BKSE = (None, None) if scale is None else (query[:, :, -last:], key)
    mask = None if attention_mask is None else attention_mask[:, :, -last:]
    weights_BHtS = weights_BHTS[:, :, -last:].clone() if last else weights_BHTS
    layer = getattr(module, "layer_idx", len(records))
    records[layer] = Attended(weights_BHtS, q_BHTE, k_BKSE, value, scale or 1.0, mask)
    return mixed, weights_BHTS
