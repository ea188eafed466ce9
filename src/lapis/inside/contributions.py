"""Who wrote a word: the direct contribution of each attention head and MLP to a token's logit.

The final norm is linear once its scale is frozen at what it was in this pass, so a logit is a sum over all that was
ever added to the residual stream (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Direct
only: what a head does to later layers is not counted. Leaves out: patching and gradients.

Shapes: C contributors, R tokens, H heads, I heads x head dim, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapis.inside.trace import Anatomy, Trace


@dataclass(frozen=True)
class Contribution:
    """What one part adds to the logit of `token` at the last place.

    part: "embed", "head" (then layer and head are given), "attention bias", "attention" as a whole where its heads are
    not told apart, "delta net" in its place, "mlp", "norm bias", "head bias", or "rounding": what the sum lacks of the
    logit because the model rounds its residual stream.
    """

    word: str
    token: int
    part: str
    layer: int | None
    head: int | None
    logit: float

    @property
    def label(self) -> str:
        if self.part == "head":
            return f"head {self.layer}.{self.head}"
        part = "MLP" if self.part == "mlp" else self.part
        return part if self.layer is None else f"{part} {self.layer}"


@torch.inference_mode()
def contributions(
    parts: Anatomy, trace: Trace, place: int, tokens: Sequence[tuple[str, int]], logits_R: Tensor
) -> list[Contribution]:
    """Contributions to the logits of tokens at one place of a trace.

    Args:
        parts: The model.
        trace: One pass of it.
        place: Of the trace.
        tokens: (word, id) of each.
        logits_R: Their logits, which the contributions add up to.

    Returns:
        Nothing where the halves of the blocks do not add up to the stream, or the norm is of an unknown kind.
    """
    last_D = trace.after_LPD[-1][place]
    frozen = freeze(parts.norm, last_D) if trace.adds_up else None
    if frozen is None or not tokens:
        return []
    gain_D, centers, shift_D = frozen
    ids_R = torch.tensor([index for _, index in tokens], device=last_D.device)
    head_RD = parts.matrix[ids_R].double()
    reader_RD = head_RD * gain_D
    if centers:
        reader_RD = reader_RD - reader_RD.mean(1, keepdim=True)
    keys: list[tuple[str, int | None, int | None]] = [("embed", None, None)]
    added_CD = [trace.embed_PD[place][None]]
    for layer in range(parts.layers):
        heads_HD, rest_1D = _heads(parts, trace, layer, place)
        keys += [("head", layer, head) for head in range(len(heads_HD))]
        rest = "attention bias" if len(heads_HD) else "delta net" if layer in parts.states else "attention"
        keys += [(rest, layer, None), ("mlp", layer, None)]
        added_CD += [heads_HD, rest_1D, trace.mlp_LPD[layer][place][None]]
    shares_CR = torch.cat([added.double() for added in added_CD]) @ reader_RD.T
    keys.append(("norm bias", None, None))
    shares_CR = torch.cat((shares_CR, (head_RD @ shift_D)[None]))
    if parts.bias is not None:
        keys.append(("head bias", None, None))
        shares_CR = torch.cat((shares_CR, parts.bias[ids_R].double()[None]))
    keys.append(("rounding", None, None))
    shares_CR = torch.cat((shares_CR, (logits_R.double() - shares_CR.sum(0))[None]))
    result = []
    for column, (word, index) in enumerate(tokens):
        for (part, layer_, head), share in zip(keys, shares_CR[:, column].tolist(), strict=True):
            if share or part in ("embed", "head", "mlp"):
                result.append(Contribution(word, index, part, layer_, head, share))
    return result


def _heads(parts: Anatomy, trace: Trace, layer: int, place: int) -> tuple[Tensor, Tensor]:
    """What each head adds, [H, D], and what the attention adds besides, [1, D]: its bias.

    The linear map runs with all heads but one at zero, so any kind of linear layer will do, a LoRA's too. A norm
    between the map and the stream is taken as linear, with its scale frozen.
    """
    whole_1D = trace.attention_LPD[layer][place][None]
    if (
        layer in parts.states
        or not trace.mixed_LPI
        or not parts.heads
        or trace.mixed_LPI[layer].shape[-1] % parts.heads
    ):
        return whole_1D[:0], whole_1D
    mixed_I = trace.mixed_LPI[layer][place]
    alone_HHE = torch.diag_embed(mixed_I.view(parts.heads, -1).T).permute(1, 2, 0)
    inputs = torch.cat((alone_HHE.reshape(parts.heads, -1), torch.zeros_like(mixed_I)[None]))
    answers = parts.mixers[layer](inputs).double()
    heads_HD, rest_1D = answers[:-1] - answers[-1], answers[-1:]
    norm = parts.attention[layer]
    if all(module is not parts.mixers[layer] for module in norm.modules()):
        frozen = freeze(norm, parts.mixers[layer](mixed_I))
        if frozen is None or frozen[1]:
            return whole_1D[:0], whole_1D
        gain_D, _, shift_D = frozen
        heads_HD, rest_1D = heads_HD * gain_D, rest_1D * gain_D + shift_D
    lacks_1D = whole_1D.double() - heads_HD.sum(0) - rest_1D
    if bool((lacks_1D.abs() > 16 * torch.finfo(whole_1D.dtype).eps * heads_HD.abs().amax().clamp(min=1)).any()):
        return whole_1D[:0], whole_1D  # more happens behind the heads than this map
    return heads_HD, rest_1D


def freeze(norm: nn.Module, state_D: Tensor) -> tuple[Tensor, bool, Tensor] | None:
    """The norm at one state as a linear map: (gain_D, whether the mean is taken away first, shift_D), in float64.

    norm(state) = gain * (state - mean) + shift. None where no usual kind of norm gives what this one gives.
    """
    gain, weight = getattr(norm, "gain", None), getattr(norm, "weight", None)
    weight = weight if gain is None else gain
    weight_D = torch.ones_like(state_D).double() if weight is None else weight.double()
    bias = getattr(norm, "bias", None)
    shift_D = torch.zeros_like(weight_D) if bias is None else bias.double()
    eps = next((float(e) for name in ("eps", "variance_epsilon", "epsilon") if (e := getattr(norm, name, None))), 1e-6)
    wide_D, target_D = state_D.double(), norm(state_D).double()
    allowed = 4 * max(torch.finfo(state_D.dtype).eps, 1e-6) * target_D.abs().max().clamp(min=1)
    if weight is None and (factor := getattr(norm, "scale", None)) is not None:  # a number takes the place of a norm
        return torch.full_like(wide_D, factor), False, shift_D
    for centers in (False, True):
        centered_D = wide_D - wide_D.mean() if centers else wide_D
        scale = (centered_D.square().mean() + eps).rsqrt()
        for offset in (0, 1):  # Gemma's norms multiply by 1 + weight
            gain_D = (weight_D + offset) * scale
            if bool(((gain_D * centered_D + shift_D - target_D).abs() <= allowed).all()):
                return gain_D, centers, shift_D
    return None
