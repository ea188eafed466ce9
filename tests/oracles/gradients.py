"""A loss and its gradients beside those of another library's model."""

from typing import Any

import pytest
import torch


def assert_same_gradients(mine: tuple[float, dict[str, torch.Tensor]], loss: torch.Tensor, model: Any) -> None:
    """mine: the loss, and the gradient of each parameter by the name that the other model gives it."""
    assert mine[0] == pytest.approx(loss.item(), abs=1e-5)
    model.zero_grad()
    loss.backward()
    largest = 0.0
    for name, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        largest = max(largest, float(grad.abs().max()))
        torch.testing.assert_close(mine[1][name], grad, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert largest > 1e-3  # something was compared
