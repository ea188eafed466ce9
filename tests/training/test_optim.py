"""Optimizers against torch's own, state by name, and the schedule as a function."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.model.lora import LoraConfig, wrap
from lapis.model.transformer import Transformer
from lapis.training.config import MuonOptions, TrainConfig
from lapis.training.distributed.sharding import state_bytes
from lapis.training.forecast.options import ForecastOptions
from lapis.training.forecast.paper import on_paper
from lapis.training.optim import muon as muon_module
from lapis.training.optim.footprint import checkpoint_bytes, optimizer_bytes, trained_bytes, weight_bytes
from lapis.training.optim.muon import _POLAR, Muon, hidden_matrices, orthogonalize
from lapis.training.optim.optimizers import Optimizers, Schedule
from lapis.training.optim.rates import rates_by_name
from lapis.training.optim.rows import RowsAdamW, features_of


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


def test_polar_coefficients_stray_from_1_by_equal_amounts() -> None:
    """Their composition strays from 1 by the same amount above and below, which is what makes it the best one
    (Chebyshev); matrices with known singular values come out so."""
    values = torch.logspace(-3, 0, 30)
    left, right = (torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1))
    made = (left * values) @ right
    expected = (made.norm() * 1.02) ** -1 * values.double()
    for a, b, c in _POLAR:
        expected = a * expected + b * expected**3 + c * expected**5
    found = torch.linalg.svdvals(orthogonalize(made[None], "polar")[0])
    torch.testing.assert_close(found.double(), expected.sort(descending=True)[0], rtol=1e-3, atol=1e-3)
    line = torch.logspace(-3, 0, 2000, dtype=torch.float64)
    for a, b, c in _POLAR:
        line = a * line + b * line**3 + c * line**5
    assert line.max().item() - 1 == pytest.approx(1 - line.min().item(), rel=1e-3) and line.max() < 1.15


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_normuon_and_cautious_decay_equal_a_recomputation(shape: tuple[int, int]) -> None:
    """Row by row in float64, from the text of the papers' algorithms."""
    torch.manual_seed(3)
    parameter = nn.Parameter(torch.randn(shape))
    mine = Muon([parameter], lr=0.02, weight_decay=0.5, options=MuonOptions("polar", by_neuron=True, cautious=True))
    mine.exact = True
    weights, momentum = parameter.detach().double(), torch.zeros(shape, dtype=torch.float64)
    squares = [0.0] * shape[0]
    for _ in range(3):
        gradient = torch.randn(shape)
        parameter.grad = gradient.clone()
        mine.step()
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        ahead = 0.05 * gradient.double() + 0.95 * momentum
        wide = ahead if shape[0] < shape[1] else ahead.T
        turned = orthogonalize(wide[None], "polar")[0]
        turned = turned if shape[0] < shape[1] else turned.T
        for row in range(shape[0]):
            squares[row] = 0.95 * squares[row] + 0.05 * float((turned[row] ** 2).mean())
            turned[row] /= squares[row] ** 0.5
        step = 0.2 * 0.02 * (shape[0] * shape[1]) ** 0.5 / turned.norm() * turned
        weights = weights - 0.02 * 0.5 * weights * (weights * step > 0) - step
    torch.testing.assert_close(parameter.detach().double(), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cautious", [False, True])
def test_a_falling_decay_is_smaller_by_the_schedule_once_more(cautious: bool) -> None:
    """Without a gradient's direction only decay is left; in float64 from lr times decay times the share."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6, bias=False)])})
    weights = model["blocks"][0].weight  # type: ignore[index]
    torch.manual_seed(2)
    shrunk = []
    for falling in (False, True):
        with torch.no_grad():
            weights.copy_(torch.eye(6))
        optimizers = Optimizers(model, "muon", 1e-2, 0.5, muon=MuonOptions(cautious=cautious, falling=falling))
        optimizers.set_precision("float32")
        weights.grad = torch.eye(6)  # the update is made orthogonal, which it is: it is the same in both
        optimizers.step(0.25)
        shrunk.append(weights.detach().double().diagonal().mean().item())
    plain, falling_ = (1e-2 * 0.25 * 0.5 * share for share in (1.0, 0.25))
    assert shrunk[1] - shrunk[0] == pytest.approx(plain - falling_, rel=1e-3)


def test_normuon_leaves_a_matrix_without_gradient_alone() -> None:
    """As those behind projections that begin at zero, in the first step."""
    parameter = nn.Parameter(torch.randn(4, 6))
    before, parameter.grad = parameter.detach().clone(), torch.zeros(4, 6)
    Muon([parameter], lr=0.02, weight_decay=0.0, options=MuonOptions(by_neuron=True)).step()
    assert torch.equal(parameter, before)


def test_options_of_muon_need_muon() -> None:
    with pytest.raises(ConfigError, match="muon is set, and optimizer is adamw; set optimizer: muon"):
        TrainConfig(steps=1, muon=MuonOptions(cautious=True))
    plain, other = (
        TrainConfig(steps=1, optimizer="muon", muon=given) for given in (MuonOptions(), MuonOptions("polar"))
    )
    assert "muon" not in plain.decisive() and other.decisive()["muon"]["coefficients"] == "polar"


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


def test_a_row_moves_as_far_as_its_token_is_met() -> None:
    """One row alone as AdamW has it; of several those with small gradients less."""
    torch.manual_seed(0)
    start = torch.randn(1, 8)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = RowsAdamW([ours], 1e-2)
    oracle = torch.optim.AdamW([theirs], 1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(1, 8)
        theirs.grad = ours.grad.clone()
        mine.step()
        oracle.step()
    assert torch.allclose(ours, theirs, atol=1e-6)

    rows = nn.Parameter(torch.zeros(3, 8))
    rows.grad = torch.tensor([1.0, 1.0, 0.01])[:, None].expand(3, 8).clone()
    RowsAdamW([rows], 1e-2).step()
    assert torch.allclose(rows[:2], torch.full((2, 8), -1e-2), rtol=1e-3)
    assert -2e-4 < rows[2].min() and rows[2].max() < -1e-4


def test_tokens_that_share_characters_learn_together() -> None:
    """A token that did not come moves with one of the same stem, and not with another; alone, none has a feature."""
    mix = features_of([" makan", " makanan", "xyz!"])
    assert mix is not None and mix.shape[0] == 3
    rows = nn.Parameter(torch.zeros(3, 8))
    optimizer = RowsAdamW([rows], 1e-2, {rows: mix})
    rows.grad = torch.zeros(3, 8)
    rows.grad[0] = 1.0
    optimizer.step()
    assert rows[0].max() < rows[1].max() < 0 == rows[2].abs().max()
    assert {"features_exp_avg", "exp_avg"} < set(optimizer.state[rows])
    assert features_of(["a", "zw"]) is None


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


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("frozen", ["", "embed"])
def test_the_state_of_an_optimizer_is_counted_before_it_is(kind: Any, frozen: str) -> None:
    """By its own tensors, but for counts of steps; on paper from the shape, for sharing out from an empty model."""
    shape = ModelConfig(dim=32, layers=3, heads=4, kv_heads=2, ffn_dim=48, vocab=300, context=64)
    model = Transformer(shape)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
        parameter.grad = torch.zeros_like(parameter)
    optimizers = Optimizers(model, kind, 0.1, 0.1)
    optimizers.step(1.0)
    held = sum(t.nbytes for name, t in optimizers.tensors().items() if not name.endswith("/step"))
    assert optimizer_bytes(model, kind) == held
    config = TrainConfig(steps=1, optimizer=kind, ema=0.9, eval_every=1, best=True, limits={"nll": 1.0})
    weights, trained = weight_bytes(model), trained_bytes(model)
    assert state_bytes(model.to("meta"), config) == weights + held + 4 * trained
    assert checkpoint_bytes(model, config) == weights + held + 3 * trained
    if frozen:
        adapted = Transformer(shape)
        wrap(adapted, LoraConfig(rank=2, targets=("attn",)), "base")
        assert checkpoint_bytes(adapted, config) < checkpoint_bytes(model, config) / 8
    else:
        paper = on_paper(shape, 64, config, ForecastOptions(True, gpus=1, tflops=1.0, bandwidth=1.0))
        assert paper.memory_bytes["held"] == weights + held + 4 * trained
        assert paper.checkpoint_bytes == weights + held + 3 * trained


class Traffic(TorchDispatchMode):
    """Adds up what is gathered from all processes, in bytes, and what the products of matrices take, in FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered, self.flops, self.others = 0, 0, set[str]()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = call(*args, **(kwargs or {})), str(call)
        if "all_gather" in name:
            self.gathered += result.nbytes
        elif "c10d" in name and "wait" not in name and "wrap" not in name:
            self.others.add(name)
        if "bmm" in name:
            self.flops += 2 * args[-2].shape[2] * result.numel()
        return result


def step_of_one_of_four(shape: ModelConfig, options: MuonOptions, exact: bool) -> tuple[int, int, set[str]]:
    """Bytes that Muon gathers, its FLOPs, and its other messages in one of four processes, of which it alone is there.
    For a process of its own: torch remembers for good where it stands among the four."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh, mine = init_device_mesh("cpu", (4,)), []
    for matrix in hidden_matrices(Transformer(shape)):
        pieces = [distribute_tensor(matrix.detach(), mesh, [Shard(0)], src_data_rank=None) for _ in range(2)]
        mine.append(nn.Parameter(pieces[0]))
        mine[-1].grad = pieces[1]
    muon = Muon(mine, lr=0.1, options=options)
    muon.exact = exact
    with Traffic() as traffic:
        muon.step()
    return traffic.gathered, traffic.flops, traffic.others


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("by_neuron", [False, True])
def test_muon_sends_and_computes_what_the_paper_counts(precision: Any, by_neuron: bool) -> None:
    shape = ModelConfig(dim=32, layers=2, heads=4, kv_heads=4, ffn_dim=48, vocab=64, context=32)
    options = MuonOptions(by_neuron=by_neuron)
    config = TrainConfig(steps=1, batch=4, optimizer="muon", muon=options, precision=precision)
    machines = ForecastOptions(True, gpus=4, tflops=1.0, bandwidth=1.0)
    paper = on_paper(shape, 32, config, machines)
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        gathered, flops, others = pool.submit(step_of_one_of_four, shape, options, precision == "float32").result()
    assert paper.bytes_by_part["updates"] == gathered * 3 / 4 > 0 and not others
    assert paper.updating == pytest.approx(flops / 0.4e12 + gathered * 3 / 4 / 1e9)
    adamw = on_paper(shape, 32, replace(config, optimizer="adamw", muon=MuonOptions()), machines)
    assert adamw.updating == adamw.bytes_by_part["updates"] == 0 and adamw.seconds_per_step < paper.seconds_per_step
    assert paper.bytes_per_step == sum(paper.bytes_by_part.values()) > adamw.bytes_per_step


def test_muon_makes_few_matrices_orthogonal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones of a large model would not fit into a GPU that holds a piece of each; the updates are the same."""
    results, stacks = [], []
    make = muon_module.orthogonalize

    def counted(stack_NSL: torch.Tensor, *given: Any) -> torch.Tensor:
        stacks.append(len(stack_NSL))
        return make(stack_NSL, *given)

    monkeypatch.setattr(muon_module, "orthogonalize", counted)
    for most in (1 << 26, 250, 1):
        monkeypatch.setattr(muon_module, "_AT_ONCE", most)
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(8, 12)) for _ in range(5)]
        for parameter in parameters:
            parameter.grad = torch.randn(8, 12)
        Muon(parameters, lr=0.1).step()
        results.append(torch.stack(list(parameters)).detach())
    assert stacks == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
