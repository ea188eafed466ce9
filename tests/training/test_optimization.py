"""Schedules, SGD, an average of the weights, bfloat16 weights, recomputed blocks, memory that is refused in time."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapis.errors import ConfigError, TrainingError
from lapis.families.config import ModelConfig
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.optim.optimizers import Average, Schedule
from lapis.training.optim.rounding import RoundedAdamW, round_into_
from lapis.training.setup import probe
from lapis.training.setup.blocks import compiled
from lapis.training.setup.probe import Probe, training_speed
from tests.model.conftest import SHAPES

Make = Callable[[], Transformer]
CONFIG = TrainConfig(steps=10, batch=8, lr=1e-2, warmup=2, log_every=1, precision="float32", threads=1, sample_every=0)


@pytest.fixture
def objective(tokenizer: Tokenizer, documents: list[Document]) -> Causal:
    return Causal(tokenizer, documents, context=32)


def trained(make: Make, objective: Any, config: TrainConfig, out: Path) -> Transformer:
    model = make()
    train(model, objective, config, out, watch=Silent())
    return model


@given(st.sampled_from(["wsd", "constant", "cosine", "linear"]), st.integers(0, 10), st.integers(40, 300))
def test_a_schedule_rises_stays_within_its_peak_and_falls(kind: Any, warmup: int, total: int) -> None:
    scales = [Schedule(warmup, total // 3, total, kind=kind).scale(step) for step in range(total)]
    assert all(0 < scale <= 1 for scale in scales) and max(scales) == pytest.approx(1.0, abs=0.05)
    top = scales.index(max(scales))
    assert scales[: top + 1] == sorted(scales[: top + 1]) and scales[top:] == sorted(scales[top:], reverse=True)
    assert scales[-1] < 0.2 or kind == "constant"


def test_shapes_of_the_schedule() -> None:
    assert Schedule(0, 0, 100, kind="cosine").scale(50) == pytest.approx(0.5, abs=0.01)
    assert Schedule(0, 0, 100, kind="linear").scale(75) == pytest.approx(0.25, abs=0.01)
    assert Schedule(0, 50, 100).scale(49) == 1.0


@pytest.mark.parametrize("options", [
    {"optimizer": "sgd", "lr": 0.3}, {"schedule": "cosine"}, {"weights": "bf16"},
    {"weights": "bf16", "optimizer": "muon"}, {"ema": 0.9},
])  # fmt: skip
def test_each_way_learns(new_model: Make, objective: Causal, tmp_path: Path, options: dict[str, Any]) -> None:
    result = train(new_model(), objective, replace(CONFIG, steps=25, **options), tmp_path / "out", watch=Silent())
    assert result.loss < 0.8 * result.log[0]["loss"]


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe"])
def test_a_mixture_of_experts_learns(objective: Causal, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    shape = SHAPES[kind]
    assert shape.experts is not None
    torch.manual_seed(0)
    model = Transformer(replace(shape, vocab=tokenizer.rows, context=32, window=None, window_layers=None,
                                experts=replace(shape.experts, balance=0.01)))  # fmt: skip
    result = train(model, objective, replace(CONFIG, steps=25), tmp_path / "out", watch=Silent())
    assert result.loss < 0.8 * result.log[0]["loss"]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    again = dict(load(tmp_path / "out").named_parameters())
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["selective", "whole"])
def test_recomputed_blocks_give_the_same_bits_and_keep_less(
    new_model: Make, objective: Causal, tmp_path: Path, kind: Any
) -> None:
    config = replace(CONFIG, steps=3)
    plain = trained(new_model, objective, config, tmp_path / "plain")
    model = trained(new_model, objective, replace(config, checkpointing=kind), tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert "forward" not in vars(model.blocks[0]) and "forward" not in vars(model.blocks[1])


def test_the_average_is_what_is_written(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    last = trained(new_model, objective, CONFIG, tmp_path / "last")
    model = trained(new_model, objective, replace(CONFIG, ema=0.5), tmp_path / "out")
    saved = load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert not torch.equal(saved.embed.weight, last.embed.weight)
    average = Average(torch.nn.Linear(1, 1, bias=False), 0.9)
    ((name, parameter),) = average.parameters.items()
    expected = parameter.item()
    for step, value in enumerate((1.0, 2.0, 5.0), 1):
        parameter.data.fill_(value)
        average.update(step)
        expected += (value - expected) * (1 - min(0.9, step / (step + 9)))
    assert average.tensors[name].item() == pytest.approx(expected)


def test_random_rounding_is_right_on_average() -> None:
    value = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    target = torch.empty(200_000, dtype=torch.bfloat16)
    round_into_(target, value, torch.Generator().manual_seed(0))
    assert set(target.tolist()) == {1.0, 1.0 + 2**-7}
    assert target.double().mean().item() == pytest.approx(1.0 + 2**-10, abs=5e-5)
    exact = torch.tensor([0.5, -3.0, 0.0, float("inf"), float("-inf")])
    small = torch.empty(5, dtype=torch.bfloat16)
    round_into_(small, exact)
    assert torch.equal(small.float(), exact)
    round_into_(small[:1], torch.tensor([float("nan")]))
    assert small[0].isnan()


def test_bfloat16_weights_follow_float32_ones() -> None:
    """Updates of a tenth of a rounding step would all be lost by rounding to nearest."""
    torch.manual_seed(0)
    low = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = RoundedAdamW([{"params": [low], "weight_decay": 0.0}], lr=4e-4)
    for step in range(40):
        low.grad = torch.ones_like(low)
        optimizer.seed = step
        optimizer.step()
    assert low.float().mean().item() == pytest.approx(1 - 40 * 4e-4, abs=1e-3)


def test_sgd_on_bfloat16_weights_is_refused(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sgd does not round"):
        trained(new_model, objective, replace(CONFIG, optimizer="sgd", weights="bf16"), tmp_path / "out")


def test_fault_72_a_batch_that_cannot_fit_names_the_levers(
    new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "available", lambda device: 700_000)
    with pytest.raises(TrainingError, match=r"needs about .* are free; raise accumulate .*checkpointing to whole"):
        trained(new_model, objective, CONFIG, tmp_path / "out")
    smaller = replace(CONFIG, batch=1, checkpointing="whole")
    monkeypatch.setattr(probe, "available", lambda device: 100_000)
    for config, ways in ((smaller, "freeze a part, train a LoRA .*, or set weights to bf16"),
                         (replace(smaller, weights="bf16"), r"freeze a part, or train a LoRA \(which needs model\)"),
                         (replace(smaller, optimizer="sgd"), r"freeze a part, or train a LoRA .*")):  # fmt: skip
        with pytest.raises(TrainingError, match=f"are free; {ways}$"):
            trained(new_model, objective, config, tmp_path / "out")
    copied = replace(CONFIG, batch=1, eval_every=1, best=True, limits={"valid_loss": 9.0})
    with pytest.raises(TrainingError, match="for gradients, optimizer and copies"):
        trained(new_model, objective, copied, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.lapis").exists()


def test_processes_of_a_machine_share_what_is_free(
    new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fits beside no other process does not fit twice."""
    monkeypatch.setattr(probe, "available", lambda device: 700_000)
    monkeypatch.setattr(probe, "_saved", lambda *given: (9000 * given[-1], given[-1]))
    config = replace(CONFIG, batch=1, steps=1, checkpointing="whole")
    trained(new_model, objective, config, tmp_path / "one")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"are free for each of 2 processes; lower context$"):
        trained(new_model, objective, replace(config, optimizer="sgd"), tmp_path / "two")


def test_compiling_is_tried_only_where_the_run_is_long(new_model: Make) -> None:
    def never() -> torch.Tensor:
        raise AssertionError

    model = new_model()
    probe = Probe(model, never)
    assert probe.compiling_pays("auto", 1, "float32", 50, None) == (False, None)
    assert probe.compiling_pays("auto", 1, "float32", 0, 300.0) == (False, None)
    assert probe.compiling_pays("off", 1, "float32", 10**9, None) == (False, None)
    with pytest.raises(TrainingError, match=r"torch.compile failed \(AssertionError\); set compile to off"):
        probe.compiling_pays("on", 1, "float32", 1, None)
    quick = Probe(model, lambda: model(torch.tensor([[1, 2]])).sum())
    assert quick.compiling_pays("auto", 1, "float32", 101, None) == (False, None)


def test_compile_on_is_refused_where_nothing_compiles(
    new_model: Make, objective: Causal, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An objective whose replies grow token by token, and experts; auto leaves both as they are without a word."""
    on = replace(CONFIG, steps=1, compile="on")
    refused = r"train: compile is on, and .* cannot run compiled: {}; leave compile out, or give compile: off$"
    shape = replace(SHAPES["qwen3_moe"], vocab=tokenizer.rows, context=32, window=None, window_layers=None)
    with pytest.raises(ConfigError, match=refused.format("the shapes in its experts follow the tokens")):
        train(Transformer(shape), objective, on, tmp_path / "out", watch=Silent())
    monkeypatch.setattr(Causal, "compiles", False)
    with pytest.raises(ConfigError, match=refused.format("replies grow token by token")):
        train(new_model(), objective, on, tmp_path / "out", watch=Silent())
    assert list(tmp_path.iterdir()) == []
    train(new_model(), objective, replace(on, compile="auto"), tmp_path / "out", watch=Silent())


def test_a_compiler_that_fails_in_a_step_is_one_line(new_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are shared out nothing is compiled before the first step."""

    def broken(graph: Any, inputs: Any) -> None:
        raise RuntimeError("no compiler\nhere")

    model = new_model()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.raises(TrainingError, match=r"^train: torch.compile failed \(.*no compiler\); set compile to off$"):
        with compiled(model, True):
            model(torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="mine"), compiled(model, True):
        raise RuntimeError("mine")


def test_a_speed_is_measured_where_choosing_took_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine: no way to compute a step was within the budget."""

    def busy(self: Probe, precision: str, count: int) -> tuple[int, str, None]:
        self.spent = 1e9
        return 1, "float32", None

    monkeypatch.setattr(Probe, "fastest", busy)
    config = ModelConfig(dim=32, layers=1, heads=2, ffn_dim=32, vocab=50, context=32)
    assert 1 < training_speed(Transformer(config).train()) < 1e7
