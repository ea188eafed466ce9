"""The head's loss in blocks equals logits followed by F.cross_entropy: value and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lapis.training.objectives.supervised.cross_entropy import head_cross_entropy


@pytest.mark.parametrize("rows, bias", [(1, False), (64, True), (131, True), (200, False)])
def test_equals_torch_in_float64(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    b = torch.randn(50, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(0, 50, (rows,))
    inputs = [t for t in (hidden, weight, b) if t is not None]

    expected = F.cross_entropy(F.linear(hidden, weight, b), targets, reduction="sum")
    expected_grads = torch.autograd.grad(expected / 3, inputs)
    loss = head_cross_entropy(hidden, weight, targets, b)
    grads = torch.autograd.grad(loss / 3, inputs)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_far_apart_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = head_cross_entropy(hidden, weight, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(600.0)
    assert hidden.grad is not None and hidden.grad.tolist() == [[2.0], [0.0]]


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    head_cross_entropy(hidden, weight, torch.arange(5)).backward()
    assert hidden.grad is not None and weight.grad is None


def test_under_autocast_it_is_near_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(100, 32), torch.randn(70, 32) * 0.2
    targets = torch.randint(0, 70, (100,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(hidden @ weight.T, targets, reduction="sum").item(), rel=5e-3)


def test_logits_of_a_large_vocabulary_never_exceed_300_mb() -> None:
    """Blocks do not grow with the rows, so a few rows show what 8 x 1024 of them take."""
    live: dict[int, int] = {}

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (151_936,) and out.dim() == 2:
                live[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
            return out

    hidden = torch.randn(200, 2, requires_grad=True)
    weight = torch.randn(151_936, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Largest():
        head_cross_entropy(hidden, weight, torch.arange(200)).backward()
    assert 0 < sum(live.values()) <= 300e6


def test_products_have_few_shapes_whatever_is_supervised() -> None:
    """Each shape that oneDNN multiplies leaves a kernel in memory: 60 steps of chats held 290 MB of them."""
    shapes: set[tuple[int, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
                shapes.add((*args[0].shape, *args[1].shape))
            return func(*args, **(kwargs or {}))

    weight = torch.randn(70, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Shapes():
        for rows in range(1, 129):
            head_cross_entropy(torch.randn(rows, 8, requires_grad=True), weight, torch.arange(rows) % 70).backward()
    assert 0 < len(shapes) <= 6, shapes
