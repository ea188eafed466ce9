"""The loop: divided once, measured without a trace, stopped with a reason."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lapis
from lapis.errors import ConfigError, OutputError, TrainingError
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal

Make = Callable[[], Transformer]
CONFIG = TrainConfig(steps=6, batch=8, lr=1e-2, warmup=2, log_every=2, precision="float32", threads=1, sample_every=0)


@pytest.fixture
def objective(tokenizer: Tokenizer, documents: list[Document]) -> Causal:
    return Causal(tokenizer, documents, context=32)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(make: Make, objective: Any, config: TrainConfig, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    model = make()
    train(model, objective, config, out, watch=Silent(), **more)
    return weights(model)


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_learns_and_leaves_a_folder_that_loads(
    new_model: Make, objective: Causal, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = new_model()
    result = lapis.training.loop.loop.train(  # type: ignore[attr-defined]
        model, objective, replace(CONFIG, steps=30), tmp_path / "out", watch=Silent()
    )
    assert result.log[0]["loss"] > 1.5 * result.loss
    assert result.steps == 30 and [row["step"] for row in result.log] == list(range(2, 31, 2))
    assert result.bits_per_byte is not None and result.bits_per_byte < 4
    assert_same(weights(model), weights(load(tmp_path / "out")))
    assert Tokenizer.open(tmp_path / "out").digest() == tokenizer.digest()
    timeless = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    times = json.loads((tmp_path / "out" / "times.json").read_text())
    assert [{**row, **at} for row, at in zip(timeless, times["curve"], strict=True)] == result.log
    assert not {"seconds", "tokens_per_second", "share"} & timeless[0].keys() and times["seconds"] == result.seconds
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing hidden is left


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_equals_not_accumulated(new_model: Make, objective: Causal, tmp_path: Path, optimizer: Any) -> None:
    config = replace(CONFIG, optimizer=optimizer, lr=1e-3)
    whole = trained(new_model, objective, config, tmp_path / "whole")
    parts = trained(new_model, objective, replace(config, accumulate=4), tmp_path / "parts")
    tolerance = 1e-5 if optimizer == "adamw" else 1e-4  # Muon rounds its update to bfloat16
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=tolerance, atol=tolerance)


def test_measuring_does_not_change_the_result(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    fixed = trained(new_model, objective, CONFIG, tmp_path / "fixed")
    model = new_model()
    result = train(model, objective, replace(CONFIG, precision="auto", threads=0), tmp_path / "auto", watch=Silent())
    assert result.threads == 1
    if result.precision == "float32":
        assert_same(fixed, weights(model))
    else:
        again = trained(new_model, objective, replace(CONFIG, precision="bf16"), tmp_path / "bf16")
        assert_same(again, weights(model))


def test_frozen_weights_stay(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    model = new_model()
    model.embed.weight.requires_grad_(False)
    before = weights(model)
    train(model, objective, CONFIG, tmp_path / "out", watch=Silent())
    after = weights(model)
    assert torch.equal(before["embed.weight"], after["embed.weight"])
    assert not torch.equal(before["blocks.0.mlp.up.weight"], after["blocks.0.mlp.up.weight"])


def test_bfloat16_weights_are_trained_as_float32(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    result = train(new_model().bfloat16(), objective, CONFIG, tmp_path / "out", watch=Silent())
    assert {p.dtype for p in load(result.out).parameters()} == {torch.float32}
    train(new_model(), objective, replace(CONFIG, save_dtype="bfloat16"), tmp_path / "small", watch=Silent())
    assert {p.dtype for p in load(tmp_path / "small").parameters()} == {torch.bfloat16}


def test_a_budget_of_time_ends_with_a_decay(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=None, minutes=0.02, log_every=1)
    result = train(new_model(), objective, config, tmp_path / "out", watch=Silent())
    rates = [row["lr"] for row in result.log]
    assert max(rates) == pytest.approx(config.lr)
    assert rates[-1] < rates[-2] < config.lr  # falls over the last steps, how far is the machine's business
    assert result.log[-1]["share"] == 1


def test_epochs_become_steps(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    result = train(new_model(), objective, replace(CONFIG, steps=None, epochs=2), tmp_path / "out", watch=Silent())
    assert result.steps == -(-2 * objective.rows // CONFIG.batch)


class Wrapped(Causal):
    """The objective with another loss."""

    def __init__(self, inner: Causal, loss: Callable[..., Any]) -> None:
        super().__init__(inner.tokenizer, inner.examples, context=inner.context)
        self.other_loss = loss

    def loss(self, model: Transformer, batch: Any) -> Any:
        return self.other_loss(model, batch)


def test_nothing_supervised_is_an_error(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    def nothing(model: Transformer, batch: Any) -> Any:
        return objective.loss(model, batch)[0] * 0, 0, {}

    with pytest.raises(TrainingError, match="no token of step 1 is supervised"):
        train(new_model(), Wrapped(objective, nothing), CONFIG, tmp_path / "out", watch=Silent())
    assert list(tmp_path.iterdir()) == []


def test_fault_56_a_part_without_loss_adds_nothing(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    calls = iter(range(1000))

    def every_second(model: Transformer, batch: Any) -> Any:
        loss, count, metrics = objective.loss(model, batch)
        return (loss, count, metrics) if next(calls) % 2 == 0 else (loss * torch.nan, 0, metrics)

    config = replace(CONFIG, accumulate=2)
    result = train(new_model(), Wrapped(objective, every_second), config, tmp_path / "out", watch=Silent())
    assert result.loss > 0


def test_fault_66_nan_stops_and_names_the_last_good(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    steps = iter(range(1000))

    def breaks(model: Transformer, batch: Any) -> Any:
        loss, count, metrics = objective.loss(model, batch)
        return (loss * torch.nan if next(steps) == 4 else loss), count, metrics

    with pytest.raises(TrainingError, match=r"loss is nan at step 5; the last good checkpoint is .*step-4"):
        config = replace(CONFIG, save_every=2)
        train(new_model(), Wrapped(objective, breaks), config, tmp_path / "out", watch=Silent())
    assert not (tmp_path / "out").exists()
    good = load(tmp_path / ".out.lapis" / ".journal" / "step-4")
    assert all(p.isfinite().all() for p in good.parameters())


@pytest.mark.parametrize("what", ["curve", "result"])
def test_fault_63_a_full_disk_names_the_last_good(
    what: str, new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an entry of the curve, or the result itself, has no room."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(Silent):
        def row(self, row: Any) -> None:
            if row["step"] == 6 and what == "curve":
                full()

    if what == "result":
        monkeypatch.setattr("lapis.training.loop.loop.write_result", full)
    last = tmp_path / ".out.lapis" / ".journal" / "step-4"
    with pytest.raises(OutputError, match=rf"the disk is full .* again; the last good checkpoint is {last}$"):
        train(new_model(), objective, replace(CONFIG, save_every=2), tmp_path / "out", watch=Full())


def test_fault_72_out_of_memory_names_the_lever(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    def large(model: Transformer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    for config, ways in (
        (CONFIG, r"raise accumulate \(the result is the same\), set .*, freeze a part, .*, or set weights to bf16"),
        (replace(CONFIG, batch=1, accumulate=1, checkpointing="whole", weights="bf16"),
         r"lower context, freeze a part, or train a LoRA \(which needs model\)"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=rf"^train: out of memory; {ways}$"):
            train(new_model(), Wrapped(objective, large), config, tmp_path / "out", watch=Silent())


def test_fault_70_two_runs_in_one_place(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    inside, done = threading.Event(), threading.Event()

    class Waiting(Wrapped):
        def __init__(self) -> None:
            super().__init__(objective, objective.loss)

        def batches(self, state: Any) -> Iterator[Any]:
            inside.set()
            assert done.wait(30)
            return objective.batches(state)

    first = threading.Thread(
        target=train, args=(new_model(), Waiting(), CONFIG, tmp_path / "out"), kwargs={"watch": Silent()}
    )
    first.start()
    assert inside.wait(30)
    try:
        with pytest.raises(OutputError, match="another lapis is writing"):
            train(new_model(), objective, CONFIG, tmp_path / "out", watch=Silent())
    finally:
        done.set()
        first.join()
    assert (tmp_path / "out" / "config.json").exists()


def test_fault_78_an_existing_output_is_refused_or_overwritten(
    new_model: Make, objective: Causal, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists already"):
        train(new_model(), objective, CONFIG, tmp_path / "out", watch=Silent())
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    train(new_model(), objective, CONFIG, tmp_path / "out", watch=Silent(), overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.parametrize("wrong, message", [
    ({"steps": None}, "one of steps, epochs or minutes"),
    ({"minutes": 1.0}, "one of steps, epochs or minutes"),
    ({"accumulate": 3}, "accumulate 3 equal parts"),
    ({"lr": -1.0}, "lr is -1.0; it must be above 0"),
    ({"decay": 2.0}, "share of the run"),
])  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **wrong)


def test_ctrl_c_in_another_thread_is_left_alone(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(
        target=train, args=(new_model(), objective, CONFIG, tmp_path / "out"), kwargs={"watch": Silent()}
    )
    thread.start()
    thread.join()
    assert (tmp_path / "out").exists() and signal.getsignal(signal.SIGINT) is before


def test_progress_goes_to_standard_error(tmp_path: Path) -> None:
    code = "from lapis.training.loop.progress import LogLines; w = LogLines('x', 0); w.note('hello')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "" and done.stderr == "hello\n"
