"""A model opened up: where its parts are, and one forward pass with the residual stream kept at chosen places.

One description serves lapis' own Transformer and the causal models of transformers, which are found by their structure
and never imported. Blocks, final norm and head must be there; where the halves of a block cannot be found, or do not
add up, the lens has the ends of blocks only. Hooks are put on for the length of one pass, so the plain path stays as it
was; the state after an attention is the model's own sum, bit for bit. Leaves out: encoders and encoder-decoders.

Shapes: B batch, T time, P chosen places, D model dim, L layers, I heads x head dim, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lapis.errors import LapisError
from lapis.model.blocks.attention import View, additive
from lapis.model.cache import Cache
from lapis.model.heads import LanguageHead
from lapis.model.reading.outside import OutsideHead, OutsideModel
from lapis.model.reading.readable import TokenCache
from lapis.model.transformer import Transformer

Places = tuple[Tensor, Tensor]  # rows and positions in a batch, int64 each


class Branches(NamedTuple):
    """Several ways to go on from one text, in one row. positions_BT: of each token in its own way. seen_TT: bool."""

    positions_BT: Tensor
    seen_TT: Tensor


# ids, cache, branches, places -> a function that gives the model's own logits at some of the places, [p, V]
Run = Callable[[Tensor, TokenCache | None, Branches | None, Places], "Logits"]
Logits = Callable[[slice], Tensor]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal model. matrix: the output embedding, [V, D].

    attention, mlp: the halves of the blocks; empty where they are not known. mixers: the linear map of each attention
    that adds what its heads mixed. heads: of each attention; 0 where it is not known. own: the model is lapis' own,
    with an AttentionCore and a Cache. cap: logits are cap tanh(logits / cap) behind the head; None: as they are.
    states: the layers that have a delta net in the place of attention; `attention` and `mixers` hold its parts there.
    """

    name: str
    model: nn.Module
    blocks: Sequence[nn.Module]
    attention: Sequence[nn.Module]
    mlp: Sequence[nn.Module]
    mixers: Sequence[nn.Module]
    heads: int
    norm: nn.Module
    matrix: Tensor
    bias: Tensor | None
    context: int
    run: Run
    own: bool
    cap: float | None = None
    states: frozenset[int] = frozenset()

    @property
    def layers(self) -> int:
        return len(self.blocks)


def anatomy(model: nn.Module, name: str = "") -> Anatomy:
    """The parts of `model`. Raises LapisError for an encoder, and for what has no head over a vocabulary."""
    if isinstance(model, Transformer):
        return _own(model, name or f"this {model.config.family} model")
    if isinstance(model, OutsideModel):
        return _foreign(model.inner, name or f"this {model.config.family} model")
    if isinstance(model, nn.Module):
        return _foreign(model, name or type(model).__name__)
    raise LapisError(
        f"lens: {type(model).__name__} is no model; give one of lapis.load, or a causal one of transformers"
    )


def refuse(name: str, family: str, causal: bool, head: str) -> None:
    """Raises LapisError where a model of this shape says no next token."""
    if not causal:
        raise LapisError(f"lens: {name} is an encoder ({family}), which says no next token; give a causal model")
    if head != "lm":
        what = "no head" if head == "none" else f"a head for {head}"
        raise LapisError(f"lens: {name} has {what}, not one over the vocabulary; give a causal language model")


def _own(model: Transformer, name: str) -> Anatomy:
    config, head = model.config, cast(LanguageHead, model.head)  # or one that was packed to generate
    refuse(name, config.family, config.causal, config.head)
    matrix = model.embed.weight if config.tied else head.matrix

    def run(
        ids_BT: Tensor, cache: TokenCache | None, branches: Branches | None, places: Places
    ) -> Callable[[slice], Tensor]:
        if branches is None:
            state_PD = model.hidden(ids_BT, cache=cast(Cache | None, cache))[places]
        else:
            assert config.delta is None, "a state cannot branch"
            x_BTD, shared = model.start(ids_BT, positions_BT=branches.positions_BT)
            full, near = (_hide(view, branches.seen_TT, x_BTD.dtype) for view in (shared.full, shared.near))
            for block in model.blocks:
                x_BTD = block(x_BTD, shared._replace(full=full, near=near))
            state_PD = model.end(x_BTD)[places]

        def logits(some: slice) -> Tensor:
            logits_pV: Tensor = head(state_PD[some])
            return logits_pV

        return logits

    blocks: list[Any] = list(model.blocks)
    return Anatomy(
        name, model, blocks, [block.added[0] for block in blocks], [block.added[1] for block in blocks],
        [block.mixer.o for block in blocks], config.heads, model.norm.final, matrix, head.bias, config.context, run,
        True, config.logit_cap or None, frozenset(filter(config.mixes_by_state, range(config.layers))),
    )  # fmt: skip


def _hide(view: View, seen_TT: Tensor, dtype: torch.dtype) -> View:
    """A view in which, besides, a token sees only what `seen_TT` lets it see."""
    mask = additive(seen_TT[None, None], dtype)
    return View(mask if view.mask is None else torch.minimum(view.mask, mask), False)


def _foreign(model: Any, name: str) -> Anatomy:
    """A causal model of transformers, or one built like it."""
    config: Any = getattr(model, "config", None)
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if config is not None and getattr(config, "is_encoder_decoder", False):
        raise LapisError(f"lens: {name} is an encoder-decoder; give a causal model")
    if config is None or not isinstance(getattr(linear, "weight", None), Tensor):
        raise LapisError(f"lens: {name} has no head over a vocabulary; give a causal language model")
    head, config = OutsideHead(model), config.get_text_config(decoder=True)
    layers = int(getattr(config, "num_hidden_layers", 0))
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    blocks = list(stacks[0]) if stacks else []
    trunk = next((m for m in model.modules() if stacks and stacks[0] in m.children()), None)
    norm = _child(trunk, "norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "ln_out")
    attention = [_child(block, "self_attn", "attn", "attention", "self_attention") for block in blocks]
    mlp = [_child(block, "mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2") for block in blocks]
    if norm is None:
        lacks = "final norm" if blocks else "stack of layers"
        raise LapisError(f"lens: {name} has no {lacks} where lapis looks for one; give a causal decoder")
    if None in attention or None in mlp:
        attention, mlp = [], []
    mixers = [_child(part, "o_proj", "out_proj", "c_proj", "dense", "wo") for part in attention]
    takes = inspect.signature(model.forward).parameters

    def run(
        ids_BT: Tensor, cache: TokenCache | None, branches: Branches | None, places: Places
    ) -> Callable[[slice], Tensor]:
        positions = torch.unique(places[1])
        options = {"logits_to_keep": positions} if "logits_to_keep" in takes else {}
        logits_BTV = model(input_ids=ids_BT, use_cache=False, **options).logits
        columns = torch.searchsorted(positions, places[1]) if options else places[1]
        return lambda some: logits_BTV[places[0][some], columns[some]]

    return Anatomy(
        name, model, blocks, [part for part in attention if part], [part for part in mlp if part],
        [part for part in mixers if part], int(getattr(config, "num_attention_heads", 0)),
        norm if head.scale == 1 else ScaledNorm(norm, head.scale), head.matrix,
        None if head.bias is None else head.bias * head.scale,
        int(getattr(config, "max_position_embeddings", 0) or 1 << 30), run, False, head.cap,
    )  # fmt: skip


class ScaledNorm(nn.Module):
    """A final norm with the factor of the logits in it, so that the head behind it has none."""

    def __init__(self, norm: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x) * self.scale
        return out

    def __getattr__(self, name: str) -> Any:
        """weight and bias with the factor; all else (an epsilon) as the norm has it."""
        norm = self._modules["norm"] if "_modules" in self.__dict__ else None
        if norm is None or name in ("norm", "scale"):
            return super().__getattr__(name)
        value = getattr(norm, name)
        return value * self.scale if name in ("weight", "bias") and isinstance(value, Tensor) else value


def _child(module: nn.Module | None, *names: str) -> nn.Module | None:
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


@dataclass
class Trace:
    """The residual stream at P places. own: the model's own logits at a slice of the places, [p, V].

    middle_LPD is what stands after each attention; empty where the model's halves do not simply add up (`adds_up`).
    mixed_LPI: the heads' mixed values, side by side, before the linear map that adds them to the stream.
    """

    embed_PD: Tensor
    middle_LPD: list[Tensor]
    after_LPD: list[Tensor]
    attention_LPD: list[Tensor]
    mlp_LPD: list[Tensor]
    mixed_LPI: list[Tensor]
    adds_up: bool
    own: Callable[[slice], Tensor] = field(repr=False)

    def part(self, first: int, last: int) -> "Trace":
        """The places from `first` to `last`, as a trace of their own."""
        lists = (self.middle_LPD, self.after_LPD, self.attention_LPD, self.mlp_LPD, self.mixed_LPI)
        middle, after, attention, mlp, mixed = ([x_PD[first:last] for x_PD in layers] for layers in lists)

        def own(some: slice) -> Tensor:
            return (
                self.own(slice(first, last))[some]
                if some.start is None
                else self.own(slice(first + some.start, first + some.stop))
            )

        return Trace(self.embed_PD[first:last], middle, after, attention, mlp, mixed, self.adds_up, own)


@torch.inference_mode()
def trace(
    parts: Anatomy, ids_BT: Tensor, places: Places, cache: TokenCache | None = None, branches: Branches | None = None
) -> Trace:
    """Runs the model and keeps the stream at some places.

    Args:
        parts: The model.
        ids_BT: int64.
        places: Where the stream is kept.
        cache: Is read and appended to.
        branches: Of lapis' own models only, and without a cache.

    Raises:
        LapisError: A state is not a number; the damaged weight is named.
    """
    states: dict[tuple[str, int], Tensor] = {}
    handles: list[Any] = []

    def keep(key: tuple[str, int], value: Any) -> None:
        x = value[0] if isinstance(value, tuple) else value
        states[key] = x.view(*ids_BT.shape, -1)[places]  # some flatten rows and time

    def after(module: nn.Module, name: str, layer: int) -> None:
        handles.append(module.register_forward_hook(lambda _m, _a, out: keep((name, layer), out)))

    def before(module: nn.Module, name: str, layer: int) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            keep((name, layer), args[0] if args else options["hidden_states"])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    try:
        before(parts.blocks[0], "embed", 0)
        for layer in range(parts.layers):
            after(parts.blocks[layer], "after", layer)
        for name, modules in (("attention", parts.attention), ("mlp", parts.mlp)):
            for layer, module in enumerate(modules):
                after(module, name, layer)
        for layer, mixer in enumerate(parts.mixers):
            before(mixer, "mixed", layer)
        own = parts.run(ids_BT, cache, branches, places)
    finally:
        for handle in handles:
            handle.remove()

    def each(name: str) -> list[Tensor]:
        return [states[name, layer] for layer in range(parts.layers) if (name, layer) in states]

    embed, after_, attention, mlp = states["embed", 0], each("after"), each("attention"), each("mlp")
    middle = [x + added for x, added in zip([embed, *after_[:-1]], attention, strict=False)]
    known = parts.own and all(block.only_adds for block in parts.blocks)
    adds_up = known or (bool(middle) and _adds_up(middle, mlp, after_))
    whole = Trace(embed, middle if adds_up else [], after_, attention, mlp, each("mixed"), adds_up, own)
    _check_finite(parts, whole)
    return whole


def _adds_up(middle_LPD: list[Tensor], mlp_LPD: list[Tensor], after_LPD: list[Tensor]) -> bool:
    """Whether every block is x + attention, then + MLP: not so where outputs are normed or scaled before the sum."""
    return all(
        bool(((x + added - out).abs() <= 4 * torch.finfo(out.dtype).eps * out.abs().amax().clamp(min=1)).all())
        for x, added, out in zip(middle_LPD, mlp_LPD, after_LPD, strict=True)
    )


def _check_finite(parts: Anatomy, trace: Trace) -> None:
    """Looks at the end of the stream, where whatever is not a number stays."""
    if not bool(trace.after_LPD[-1].isfinite().all()):
        layer = next(i for i, x_PD in enumerate(trace.after_LPD) if not bool(x_PD.isfinite().all()))
        raise not_numbers(parts, f"the residual stream in layer {layer}")


def not_numbers(parts: Anatomy, where: str) -> LapisError:
    """The error for NaN or Inf, naming the weight that is to blame, or saying that there is none."""
    damaged = next((n for n, p in parts.model.named_parameters() if not bool(p.isfinite().all())), None)
    if damaged:
        return LapisError(f"lens: {parts.name}: {damaged} holds NaN or Inf; fetch the weights again")
    return LapisError(f"lens: {parts.name}: {where} overflows {parts.matrix.dtype}; load the model in float32")
