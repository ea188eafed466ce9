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

from lapis.model.reading.outside import quiet

NAME = "lapis"


@dataclass(frozen=True)
class Attended:
    """One layer's attention: its weights and, where the model shows them, scores (q . k times its factor, of what is
    hidden too), values, and the mask that was added (None hides nothing beyond the causal order)."""

    weights_BHTS: Tensor
    scores_BHTS: Tensor | None = None
    v_BKSE: Tensor | None = None
    mask: Tensor | None = None


_records: ContextVar[dict[int, Attended]] = ContextVar("records")


@torch.inference_mode()
def record_attention(inner: Any, ids_BT: Tensor) -> dict[int, Attended]:
    """Each layer's attention in one pass, by the layer's number; layers that have none, or show none, are left out.

    Args:
        inner: A causal model of transformers.
        ids_BT: int64.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _noted)
    AttentionMaskInterface.register(NAME, eager_mask)
    before, records = inner.config._attn_implementation, dict[int, Attended]()
    token = _records.set(records)
    try:
        with quiet():
            inner.set_attn_implementation(NAME)
        if inner.config._attn_implementation == NAME:
            inner(input_ids=ids_BT, use_cache=False)
            return records
        weights = inner(input_ids=ids_BT, use_cache=False, output_attentions=True).attentions or ()
        return {layer: Attended(w_BHTS) for layer, w_BHTS in enumerate(weights) if isinstance(w_BHTS, Tensor)}
    finally:
        _records.reset(token)
        with quiet():
            inner.set_attn_implementation(before)


def _noted(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The eager attention that stands beside the module's class, with its weights noted."""
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    mixed, weights_BHTS = eager(module, query, key, value, attention_mask, **options)
    records = _records.get()
    scale = options.get("scaling")
    scores_BHTS = None
    if scale is not None:
        k_BHSE = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores_BHTS = (query @ k_BHSE.transpose(2, 3)).float() * scale
    records[getattr(module, "layer_idx", len(records))] = Attended(weights_BHTS, scores_BHTS, value, attention_mask)
    return mixed, weights_BHTS
