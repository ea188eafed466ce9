"""All experts of a block in a few tensors, as some families' folders hold them, and adapters beside these.

Shapes: X experts, N tokens, I inputs, O outputs, F inner width of one expert, D model dim, R rank.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.model.blocks.standard import times

Layer = Callable[[Tensor], Tensor]


class StackedLinear(nn.Module):
    """A linear layer of each expert: weight [X, O, I], or [X, I, O] with inputs first; bias [X, O] or None."""

    def __init__(
        self, count: int, inputs: int, outputs: int, *, inputs_first: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.inputs_first = inputs_first
        shape = (inputs, outputs) if inputs_first else (outputs, inputs)
        self.weight = nn.Parameter(torch.empty(count, *shape))
        self.bias = nn.Parameter(torch.empty(count, outputs)) if bias else None

    def layers(self) -> Sequence[Layer]:
        """The layer of each expert, [N, I] -> [N, O]. They are cut at once: each cut has a gradient of full size."""
        weights = self.weight.unbind()
        biases = [None] * len(weights) if self.bias is None else self.bias.unbind()
        product = _inputs_first if self.inputs_first else F.linear
        return [partial(product, weight=one, bias=bias) for one, bias in zip(weights, biases, strict=True)]

    def sizes(self) -> tuple[int, int, int]:
        """Experts, inputs and outputs."""
        count, one, two = self.weight.shape
        return (count, one, two) if self.inputs_first else (count, two, one)


def _inputs_first(x_NI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x_NI @ weight if bias is None else torch.addmm(bias, x_NI, weight)


class LoraStacked(StackedLinear):
    """The same with an adapter of each expert beside it, y = x W^T + b + scale * x A^T B^T, W and b frozen.

    As PEFT adapts a parameter of three dimensions (`target_parameters`), which knows neither dropout nor DoRA there.
    lora_A [X, R, I], lora_B [X, O, R], float32. on: False gives the base.
    """

    def __init__(self, base: StackedLinear, a_XRI: nn.Parameter, b_XOR: nn.Parameter, scale: float) -> None:
        nn.Module.__init__(self)
        self.inputs_first, self.weight, self.bias = base.inputs_first, base.weight, base.bias
        self.lora_A, self.lora_B, self.scale, self.on = a_XRI, b_XOR, scale, True

    def layers(self) -> Sequence[Layer]:
        plain = super().layers()
        if not self.on:
            return plain
        pairs = zip(plain, self.lora_A.unbind(), self.lora_B.unbind(), strict=True)
        return [partial(self._one, layer=layer, a_RI=a_RI, b_OR=b_OR) for layer, a_RI, b_OR in pairs]

    def _one(self, x_NI: Tensor, layer: Layer, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        y_NO = layer(x_NI)
        added_NO = F.linear(F.linear(x_NI.to(a_RI.dtype), a_RI), b_OR) * self.scale
        return y_NO + added_NO.to(y_NO.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the adapter adds to the weight, float32, in its shape."""
        added_XOI = self.scale * (self.lora_B.float() @ self.lora_A.float())
        return added_XOI.mT if self.inputs_first else added_XOI

    @torch.no_grad()
    def folded(self) -> StackedLinear:
        """A plain layer with the adapter added, rounded once to the weight's dtype."""
        count, inputs, outputs = self.sizes()
        with torch.device("meta"):
            plain = StackedLinear(count, inputs, outputs, inputs_first=self.inputs_first)
        plain.weight = nn.Parameter((self.weight.float() + self.delta()).to(self.weight.dtype))
        plain.bias = self.bias
        return plain


class StackedExperts(nn.Module):
    """The MLPs of a block's experts, down(inner(gate_up(x))) each."""

    gate_up: StackedLinear
    down: StackedLinear

    def __len__(self) -> int:
        return len(self.down.weight)

    def __iter__(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """What each expert says of tokens [N, D], times the weights of these [N, 1]."""
        for gate_up, down in zip(self.gate_up.layers(), self.down.layers(), strict=True):
            yield partial(self._one, gate_up=gate_up, down=down)

    def _one(self, x_ND: Tensor, weights_N1: Tensor, gate_up: Layer, down: Layer) -> Tensor:
        inner_NF = self.inner(gate_up(x_ND))
        if self.down.bias is not None:
            return down(inner_NF) * weights_N1
        return down(times(inner_NF, weights_N1.to(inner_NF.dtype)))

    def inner(self, both_N2F: Tensor) -> Tensor:
        """Gate and up of tokens -> what `down` reads, [N, F]."""
        raise NotImplementedError
