"""AdamW, Muon (with AdamW for what is no hidden matrix) and SGD, as one optimizer with named state.

Leaves out: the learning rate of a step (schedule.py), optimizers of their own for parts of a model.
"""

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor, nn

from lapis.errors import ConfigError
from lapis.training.optim.muon import Muon, hidden_matrices
from lapis.training.optim.rounding import RoundedAdamW


class Optimizers:
    """One or two optimizers that act as one; state is named by the parameter, not by a number.

    Weights in bfloat16 are updated with random rounding (rounding.py); SGD has none. seed: of that rounding. extra:
    what an objective trains beside the model.
    """

    def __init__(
        self, model: nn.Module, kind: Literal["adamw", "muon", "sgd"], lr: float, weight_decay: float, seed: int = 0,
        extra: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.lr, self.seed = lr, seed
        beside = [] if extra is None else [(f"objective.{name}", p) for name, p in extra.named_parameters()]
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in [*model.named_parameters(), *beside] if parameter.requires_grad
        }
        self.parameters: list[nn.Parameter] = list(self.names)  # type: ignore[arg-type]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        hidden = hidden_matrices(model) if kind == "muon" else set()
        groups = [
            {"params": [p for p in matrices if p not in hidden], "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},  # norms and biases have nothing to shrink towards
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: list[torch.optim.Optimizer] = []
        rounded = any(p.dtype == torch.bfloat16 for p in self.parameters)
        if groups and kind == "sgd":
            if rounded:
                raise ConfigError("train: sgd does not round weights in bf16; use adamw or muon, or weights: float32")
            self.parts.append(torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True))
        elif groups and rounded:
            self.parts.append(RoundedAdamW(groups, lr))
        elif groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True))
        if hidden:
            self.parts.append(Muon([p for p in matrices if p in hidden], lr, weight_decay))

    def set_precision(self, precision: str) -> None:
        """Muon orthogonalizes in bfloat16 where the rest of the step is in bfloat16, too."""
        for part in self.parts:
            if isinstance(part, Muon):
                part.exact = precision == "float32"

    def step(self, scale: float, step: int = 0) -> None:
        """Update number `step` at `scale` times the peak learning rate."""
        for part in self.parts:
            if isinstance(part, (RoundedAdamW, Muon)):
                part.seed = self.seed * 1_000_003 + step  # so that every process rounds alike
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()

    def clear(self) -> None:
        """Drops the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state as `parameter name/what` -> tensor."""
        return {
            f"{self.names[parameter]}/{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`. A parameter that had no gradient yet has no state."""
        held: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            parameter, _, key = name.rpartition("/")
            held[parameter][key] = value
        for part in self.parts:
            part.state.clear()
            for group in part.param_groups:
                for parameter in group["params"]:
                    if self.names[parameter] in held:
                        # AdamW's step counts live on the CPU or with the parameter, as torch keeps them
                        part.state[parameter] = {
                            key: value.to(parameter.device) for key, value in held[self.names[parameter]].items()
                        }
