"""Optimizers against torch's own, state by name, and the schedule as a function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer
from lapis.training.optim.muon import Muon, hidden_matrices, orthogonalize
from lapis.training.optim.optimizers import Optimizers, Schedule
from lapis.training.optim.rates import rates_by_name


def test_muon_equals_torchs_muon() -> None:
    torch.manual_seed(0)
    shapes = [(16, 16), (8, 16), (16, 8), (16, 40), (40, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        # both are orthogonalized in bfloat16, in another order of sums
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.002)


def test_orthogonalize_flattens_the_singular_values() -> None:
    torch.manual_seed(1)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 12, 30)))
    assert 0.6 < singular.min() and singular.max() < 1.3


def _small_model() -> nn.Module:
    return nn.ModuleDict({
        "embed": nn.Embedding(11, 6), "blocks": nn.ModuleList([nn.Linear(6, 6), nn.LayerNorm(6)]),
        "head": nn.Linear(6, 11),
    })  # fmt: skip


def test_muon_takes_hidden_matrices_only() -> None:
    model = _small_model()
    names = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
    assert names == {"blocks.0.weight"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_back_by_name(kind: str) -> None:
    def stepped(model: nn.Module, optimizers: Optimizers, seed: int) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers.step(0.5)

    torch.manual_seed(0)
    model, other = _small_model(), _small_model()
    first = Optimizers(model, kind, 1e-2, 0.1)  # type: ignore[arg-type]
    stepped(model, first, 1)
    second = Optimizers(other, kind, 1e-2, 0.1)  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    stepped(model, first, 2)
    stepped(other, second, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@given(total=st.integers(1, 500), warmup=st.integers(0, 60), share=st.floats(0, 1))
def test_schedule_rises_stays_and_falls(total: int, warmup: int, share: float) -> None:
    schedule = Schedule(warmup, round(share * total), total)
    scales = [schedule.scale(step) for step in range(total)]
    assert all(0 < s <= 1 for s in scales)
    top = scales.index(max(scales))
    assert scales[: top + 1] == sorted(scales[: top + 1]) and scales[top:] == sorted(scales[top:], reverse=True)


def test_the_stable_part_does_not_know_the_length() -> None:
    known, unknown = Schedule(10, 40, 100), Schedule(10, 0, None)
    assert [known.scale(s) for s in range(60)] == [unknown.scale(s) for s in range(60)]


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_each_part_moves_at_its_own_rate(kind: str) -> None:
    def moved(rates: dict[str, float]) -> dict[str, float]:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, vocab=30, context=8, tied=False))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizers = Optimizers(model, kind, 1e-3, 0.0, rates=rates_by_name(rates, before, 1e-3))  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) + 0.1 * torch.randn_like(parameter)
        optimizers.step(0.5)
        return {name: float((p.detach() - before[name]).norm()) for name, p in model.named_parameters()}

    plain, apart = moved({}), moved({"layers": 1e-4, "1.mlp": 5e-4, "embed": 1e-2})
    for name, distance in plain.items():
        times = 10 if name.startswith("embed") else 0.5 if "1.mlp" in name else 0.1 if "blocks" in name else 1
        assert apart[name] == pytest.approx(times * distance, rel=1e-3), name


def test_rates_that_cannot_be_are_refused() -> None:
    names = ["embed.weight", "blocks.0.attn.q.weight", "norm.final.weight"]
    assert rates_by_name({"blocks": 1e-5}, names, 1e-3) == dict(zip(names, (1e-3, 1e-5, 1e-3), strict=True))
    for rates, text in (({"embed": 0}, "above 0"), ({"head": 1e-4}, "head"), ({"9.mlp": 1e-4}, "9.mlp")):
        with pytest.raises(ConfigError, match=text):
            rates_by_name(rates, names, 1e-3)
