"""A causal model of transformers behind the face of our own: for what only reads it, and never to train or save it.

It is proved once, on a handful of tokens: that no token sees a later one, and that the head is the linear map (with the
factor or soft cap that its config names) which a lens needs. Leaves out how it is opened (opening.py).

Shapes: B batch, T time, S time of all tokens, D model dim, V vocabulary.
"""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.errors import ConfigError
from lapis.families.config import Head, Image
from lapis.model.reading.readable import ReadableModel

CACHES = ("past_key_values", "cache")  # what a forward calls it
PROBE = 6  # tokens that a model is proved on


@dataclass(frozen=True)
class OutsideConfig:
    """The shape of a model of transformers, as far as its config.json says it."""

    family: str
    dim: int
    layers: int
    heads: int
    vocab: int
    context: int
    named: bool = True
    """Whether config.json names the context."""
    causal: bool = True
    head: Head = "lm"
    image: Image | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def reach(self) -> int:
        """Tokens that prompt and reply may have together."""
        return self.context


class OutsideHead(nn.Module):
    """logits = cap tanh(scale (hidden matrix^T + bias) / cap), as the config says; without a cap the inner part."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        linear, config = inner.get_output_embeddings(), inner.config.get_text_config()
        self._linear = (linear,)  # in a tuple: not a second home for its parameters
        self.cap = _number(config, "final_logit_softcapping")
        factor, divisor = _number(config, "logit_scale"), _number(config, "logits_scaling")
        self.scale = (factor or 1.0) * (_number(config, "lm_head_multiplier") or 1.0) / (divisor or 1.0)

    @property
    def matrix(self) -> Tensor:
        """The output embedding, [V, D]."""
        matrix: Tensor = self._linear[0].weight
        return matrix

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        bias: Tensor | None = getattr(self._linear[0], "bias", None)
        return bias

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.matrix, self.bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class OutsideCache:
    """transformers' own cache of keys and values; where a model has none that can be handed on, the tokens themselves,
    which each step then reads anew."""

    def __init__(self, past: Any, batch: int, device: torch.device) -> None:
        self.past = past
        self.ids_BS = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.mask_BS = torch.zeros(batch, 0, dtype=torch.bool, device=device)

    @property
    def length(self) -> int:
        return self.ids_BS.shape[1]

    def append(self, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
        """Takes in new tokens, before they are read."""
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        self.ids_BS = torch.cat((self.ids_BS, ids_BT), 1)
        self.mask_BS = torch.cat((self.mask_BS, real_BT), 1)

    def select(self, rows: Tensor) -> None:
        self.ids_BS, self.mask_BS = self.ids_BS[rows], self.mask_BS[rows]
        if self.past is not None:
            self.past.batch_select_indices(rows)

    def truncate(self, length: int) -> None:
        if length != self.length and self.past is not None:
            raise ValueError("this cache cannot be cut; start with a new one")
        self.ids_BS, self.mask_BS = self.ids_BS[:, :length], self.mask_BS[:, :length]


class OutsideModel(ReadableModel):
    """A model of transformers; `inner` is it, whole: also any part that hooks look for.

    Args:
        inner: A causal language model, in evaluating mode.
        config: Its shape.
    """

    config: OutsideConfig

    def __init__(self, inner: Any, config: OutsideConfig) -> None:
        super().__init__()
        self.inner, self.config, self.notes, self.generation = inner, config, [], {}
        self._trunk = (inner.base_model,)
        takes = inspect.signature(inner.base_model.forward).parameters
        self._positions = "position_ids" in takes
        stateful = bool(getattr(inner, "_is_stateful", False))
        self._cache_name = None if stateful else next((name for name in CACHES if name in takes), None)
        self._padded = not stateful and "attention_mask" in takes
        linear = inner.get_output_embeddings()
        self.head = OutsideHead(inner) if isinstance(getattr(linear, "weight", None), Tensor) else nn.Identity()
        self.blocks = nn.ModuleList()

    @property
    def caches(self) -> bool:
        """Whether keys and values are handed from token to token."""
        return self._cache_name is not None

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        logits_BTV: Tensor = self.head(self.hidden(ids_BT, mask_BT))
        return logits_BTV

    def hidden(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, *, positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None, types_BT: Tensor | None = None, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """What the head reads: the last hidden state, or, where the head is not known, the logits themselves."""
        if segments_BT is not None or types_BT is not None or positions_BT is not None:
            raise ConfigError(f"a {self.config.family} model, which runs through transformers, takes no packed rows")
        if cache is None:
            return self._run(ids_BT, mask_BT, None)
        cache.append(ids_BT, mask_BT)
        if cache.past is None:
            return self._run(cache.ids_BS, cache.mask_BS, None)[:, -ids_BT.shape[1] :]
        return self._run(ids_BT, cache.mask_BS, cache.past)

    def start(self, ids_BT: Tensor) -> tuple[Tensor, None]:
        """The ids themselves: it is not entered between its layers."""
        return ids_BT, None

    def end(self, x_BTD: Tensor) -> Tensor:
        """All of it, from what `start` gave."""
        return self.hidden(x_BTD)

    def new_cache(self, batch: int, room: int) -> OutsideCache:
        """An empty cache for `batch` rows.

        Args:
            batch: Rows.
            room: Is not needed: it grows.
        """
        from transformers import DynamicCache

        past = None if self._cache_name is None else DynamicCache(config=self.inner.config)
        return OutsideCache(past, batch, self.device)

    def _run(self, ids_BT: Tensor, mask_BS: Tensor | None, past: Any) -> Tensor:
        hides = mask_BS is not None and not bool(mask_BS.all())
        if hides and not self._padded:
            return self._row_by_row(ids_BT, mask_BS)
        options: dict[str, Any] = {"use_cache": past is not None}
        if mask_BS is not None and hides:
            options["attention_mask"] = mask_BS.long()
            if self._positions:
                options["position_ids"] = (mask_BS.long().cumsum(1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        if past is not None and self._cache_name is not None:
            options[self._cache_name] = past
        if isinstance(self.head, OutsideHead):
            hidden_BTD: Tensor = self._trunk[0](input_ids=ids_BT, **options)[0]
            return hidden_BTD
        logits_BTV: Tensor = self.inner(input_ids=ids_BT, **options).logits
        return logits_BTV

    def _row_by_row(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """For a model that cannot pass over padding: each row by itself; what stands at padding is 0."""
        assert mask_BT is not None
        rows = [self._run(ids_T[None, real_T], None, None)[0] for ids_T, real_T in zip(ids_BT, mask_BT, strict=True)]
        out_BTD = rows[0].new_zeros(*ids_BT.shape, rows[0].shape[-1])
        out_BTD[mask_BT] = torch.cat(rows)
        return out_BTD

    @torch.inference_mode()
    def prove(self) -> None:
        """Looks at the logits of a few tokens: their number, that none sees a later one, what the head is, and whether
        a cache gives the same.

        Raises:
            ConfigError: A token sees later ones.
        """
        vocab = self.config.vocab  # the middle of which holds words, and no tokens for pictures
        ids_T = (vocab // 4 + torch.arange(PROBE, device=self.device) * (vocab // 16 + 1)) % vocab
        ids_BT = ids_T[None].repeat(2, 1)
        ids_BT[1, -1] = ids_BT[1, 1]
        own_BTV = self.inner(input_ids=ids_BT, use_cache=False).logits
        allowed = max(torch.finfo(own_BTV.dtype).eps * 8, 2e-5) * max(1.0, float(own_BTV.abs().max()))
        if not float((own_BTV[0, :-1] - own_BTV[1, :-1]).abs().max()) <= allowed:
            raise ConfigError(
                f"a {self.config.family} model with this config.json sees later tokens; give a causal one"
            )
        self.config = replace(self.config, vocab=own_BTV.shape[-1])
        try:
            proved = float((self.head(self.hidden(ids_BT)) - own_BTV).abs().max()) <= allowed
        except (RuntimeError, TypeError):  # states that the head does not take as they are
            proved = False
        if not proved:
            self.head = nn.Identity()
        if self.caches and not self._proved_cache(ids_BT, allowed):
            self._cache_name = None

    def _proved_cache(self, ids_BT: Tensor, allowed: float) -> bool:
        """Whether a token behind a cache gets what it gets in one pass; some models want a cache of their own."""
        cache, last = self.new_cache(len(ids_BT), PROBE), PROBE - 1
        try:
            self.hidden(ids_BT[:, :last], cache=cache)
            stepped = self.head(self.hidden(ids_BT[:, last:], cache=cache))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        return float((stepped[:, 0] - self.head(self.hidden(ids_BT))[:, last]).abs().max()) <= 4 * allowed


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value else None
