"""One forward pass, with the residual stream kept at the asked places and nowhere else.

Hooks are put on for the length of one pass, so the plain path stays as it was. Kept are the stream before the first
block, after each attention and after each MLP, and what each of the two added; the state after an attention is the
model's own sum, bit for bit. Leaves out: what the states would say (readout.py).

Shapes: B batch, T time, P asked places, D model dim, L layers, I heads x head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lapis.errors import LapisError
from lapis.inside.anatomy import Anatomy, Branches, Places
from lapis.model.cache import Cache


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
        middle, after, attention, mlp, mixed = ([x_PD[first:last] for x_PD in found] for found in lists)

        def own(some: slice) -> Tensor:
            return (
                self.own(slice(first, last))[some]
                if some.start is None
                else self.own(slice(first + some.start, first + some.stop))
            )

        return Trace(self.embed_PD[first:last], middle, after, attention, mlp, mixed, self.adds_up, own)


@torch.inference_mode()
def trace(
    parts: Anatomy, ids_BT: Tensor, places: Places, cache: Cache | None = None, branches: Branches | None = None
) -> Trace:
    """Runs the model on ids_BT (int64) and keeps the stream at `places`. A cache is read and appended to.

    branches: of lapis' own models only, and without a cache.

    Raises LapisError, naming the damaged weight, where a state is not a number.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    handles: list[Any] = []

    def keep(key: tuple[str, int], value: Any) -> None:
        x = value[0] if isinstance(value, tuple) else value
        kept[key] = x.view(*ids_BT.shape, -1)[places]  # some flatten rows and time

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
        return [kept[name, layer] for layer in range(parts.layers) if (name, layer) in kept]

    embed, after_, attention, mlp = kept["embed", 0], each("after"), each("attention"), each("mlp")
    middle = [x + added for x, added in zip([embed, *after_[:-1]], attention, strict=False)]
    adds_up = parts.own or (bool(middle) and _adds_up(middle, mlp, after_))
    found = Trace(embed, middle if adds_up else [], after_, attention, mlp, each("mixed"), adds_up, own)
    _check_finite(parts, found)
    return found


def _adds_up(middle_LPD: list[Tensor], mlp_LPD: list[Tensor], after_LPD: list[Tensor]) -> bool:
    """Whether every block is x + attention, then + MLP: not so where outputs are normed or scaled before the sum."""
    return all(
        bool(((x + added - out).abs() <= 4 * torch.finfo(out.dtype).eps * out.abs().amax().clamp(min=1)).all())
        for x, added, out in zip(middle_LPD, mlp_LPD, after_LPD, strict=True)
    )


def _check_finite(parts: Anatomy, found: Trace) -> None:
    """Looks at the end of the stream, where whatever is not a number stays."""
    if not bool(found.after_LPD[-1].isfinite().all()):
        layer = next(i for i, x_PD in enumerate(found.after_LPD) if not bool(x_PD.isfinite().all()))
        raise not_numbers(parts, f"the residual stream in layer {layer}")


def not_numbers(parts: Anatomy, where: str) -> LapisError:
    """The error for NaN or Inf, naming the weight that is to blame, or saying that there is none."""
    damaged = next((n for n, p in parts.model.named_parameters() if not bool(p.isfinite().all())), None)
    if damaged:
        return LapisError(f"lens: {parts.name}: {damaged} holds NaN or Inf; fetch the weights again")
    return LapisError(f"lens: {parts.name}: {where} overflows {parts.matrix.dtype}; load the model in float32")
