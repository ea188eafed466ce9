"""What a run will take: measured against the run itself, on paper against published runs, within budgets."""

import json
import os
import re
import shlex
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.config import load_yaml, override
from lapis.errors import ConfigError, TrainingError
from lapis.families import PRESETS, find
from lapis.training.config import TrainConfig
from lapis.training.forecast import measured
from lapis.training.forecast.budget import Budget
from lapis.training.forecast.measured import best_tokens
from lapis.training.forecast.memory import MemoryWatch, peak
from lapis.training.forecast.options import ForecastOptions
from lapis.training.forecast.paper import PaperForecast, on_paper
from lapis.training.loop.progress import Silent
from lapis.training.loop.update import Updater
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.run import plan, read_settings, run

from .conftest import SMALL_RUN

Lapis = Callable[..., tuple[int, str, str]]
SETTINGS = {**SMALL_RUN, "new": {"dim": 64, "layers": 2, "heads": 4, "ffn_dim": 96}, "batch": 8}
pytestmark = pytest.mark.usefixtures("here")


def settings(**changes: Any) -> Any:
    return read_settings({**SETTINGS, **changes}, "run.yaml")


def test_a_forecast_counts_what_the_run_then_does() -> None:
    before = plan(settings(), watch=Silent())
    assert not any(Path().glob("*run*")), "nothing is written"
    memory = MemoryWatch(torch.device("cpu"))
    after = run(settings(save_every=20), watch=Silent())
    assert (before.steps, before.tokens) == (after.steps, after.tokens)
    assert before.memory.weights == before.memory.gradients
    assert before.memory.optimizer >= before.memory.weights  # Muon for matrices in blocks, AdamW for the embedding
    assert before.memory.total == pytest.approx(memory.peak, rel=0.15)
    assert after.predicted["after_steps"] == 5 and after.predicted["memory_bytes"] > 0
    times = json.loads(Path("run/times.json").read_text())
    assert times["predicted"] == after.predicted and times["memory_bytes"] == after.memory_bytes
    assert "predicted" not in Path("run/training.json").read_text()


@pytest.mark.parametrize("changes, later", [({}, 0), ({"ema": 0.9, "best": True, "eval_every": 9, "valid": 0.1}, 1)])
def test_parts_of_memory_add_up_to_its_peak(
    changes: dict[str, Any], later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, too, the weights are there before the watch begins; of copies the best weights come after it ends."""

    class OnGpu:
        def __init__(self, device: torch.device) -> None:
            self.device, self.peak, self.held = torch.device("cuda"), 9_000_000, 1_000_000

    monkeypatch.setattr("lapis.training.forecast.measured.MemoryWatch", OnGpu)
    monkeypatch.setattr("lapis.training.forecast.measured.available", lambda device: 1 << 30)
    memory = plan(settings(**changes), watch=Silent()).memory
    assert memory.process == 1_000_000 - memory.weights
    assert memory.copies == (2 if changes else 0) * memory.weights
    assert memory.total == 9_000_000 + later * memory.weights


def test_weights_in_bfloat16_are_counted_as_they_are_held() -> None:
    whole, half = (plan(settings(weights=kind, optimizer="adamw"), watch=Silent()) for kind in ("float32", "bf16"))
    assert half.memory.weights * 2 == whole.memory.weights and half.memory.gradients == half.memory.weights
    assert half.memory.optimizer == pytest.approx(2 * half.memory.weights, rel=0.01)
    kept = {"ema": 0.9, "best": True, "eval_every": 9, "valid": 0.1}  # the average is in float32
    more = plan(settings(weights="bf16", optimizer="adamw", **kept), watch=Silent())
    assert more.memory.copies == 3 * half.memory.weights
    assert more.checkpoint_bytes - half.checkpoint_bytes == more.memory.copies


def test_flops_of_frozen_weights_are_four_not_six() -> None:
    whole = plan(settings(optimizer="adamw"), watch=Silent())
    run(settings(out="base", steps=2), watch=Silent())
    adapter = settings(new=None, model="base", tokenizer=None, lora={"rank": 2}, optimizer="adamw")
    small = plan(adapter, watch=Silent())
    assert 0.66 < small.flops / whole.flops < 0.75
    assert small.memory.gradients < whole.memory.gradients / 4
    assert small.checkpoint_bytes < whole.checkpoint_bytes / 4


def test_a_budget_of_flops_or_time_sets_the_steps() -> None:
    whole = plan(settings(), watch=Silent())
    half = plan(settings(), Budget.parse(f"{whole.flops / 2} flops"), watch=Silent())
    assert half.settings == {"steps": 20} and half.tokens == whole.tokens // 2
    hour = plan(settings(), Budget.parse("1 hour"), watch=Silent())
    assert hour.settings["steps"] == hour.steps and hour.seconds == pytest.approx(3600, rel=0.01)


@pytest.mark.parametrize(("every", "steps", "seconds"), [(0, 500, 60.0), (10, 45, 54.5), (1000, 454, 55.4)])
def test_a_budget_of_time_counts_each_evaluation_once(
    every: int, steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 0.1 seconds here, what is held out 10, of which the one at the end has no step to share it."""
    first_steps = measured._first_steps
    monkeypatch.setattr(measured, "_first_steps", lambda *given: (first_steps(*given)[0] and [0.1, 0.1], 10.0))
    result = plan(settings(valid=0.1, eval_every=every), Budget.parse("60 s"), watch=Silent())
    assert result.steps == result.settings["steps"] == steps and result.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("bound", [{"minutes": 10}, {"epochs": 2}, {"steps": 40}])
def test_the_settings_of_a_budget_are_those_of_a_run(bound: dict[str, Any], run: Lapis) -> None:
    """What is printed replaces the bound that the file has, and keeps what the command line said beside it."""
    others = {name: value for name, value in SETTINGS.items() if name != "steps"}
    Path("a run.yaml").write_text(json.dumps({**others, **bound}))
    given = ["train", "a run.yaml", "out=my run", "optimizer=adamw", "eval_every=0"]
    status, out, _ = run(*given, "--plan-only", "--budget", "1e10 flops")
    printed = shlex.split(next(line for line in out.splitlines() if "within the budget: " in line).split(": ", 1)[1])
    assert status == 0 and printed[:3] == ["lapis", *given[:2]]
    how = read_settings(override(load_yaml("a run.yaml"), printed[3:]), "run.yaml")
    assert (how.minutes, how.epochs, how.out, how.optimizer) == (None, None, "my run", "adamw") and how.steps
    assert [word for word in printed if word.endswith("=null")] == [f"{name}=null" for name in bound if name != "steps"]


def test_a_budget_of_memory_cuts_a_step_into_parts() -> None:
    wide = settings(batch=64, context=256)
    whole = plan(wide, watch=Silent())
    limit = whole.memory.total - whole.memory.activations // 2
    cut = plan(wide, Budget.parse(f"{limit / 1e6:.0f} MB"), watch=Silent())
    assert cut.settings["accumulate"] > 1 and cut.memory.total <= limit
    with pytest.raises(
        TrainingError, match=r"even one row at a time takes \d\.\d+ GB, which is more than 20 MB; lower"
    ):
        plan(wide, Budget.parse("20 MB"), watch=Silent())
    with pytest.raises(TrainingError, match=r"one step takes .* FLOPs, which is more than 9 flops; lower batch"):
        plan(wide, Budget.parse("9 flops"), watch=Silent())


LORA, HALF = {"lora": {"rank": 2}}, {"weights": "bf16"}


@pytest.mark.parametrize("changes, remedies", [
    ({}, "lower context, freeze a part, train a LoRA (which needs model), or set weights to bf16"),
    (HALF, "lower context, freeze a part, or train a LoRA (which needs model)"),
    ({"optimizer": "sgd", "tune": ["layers.0"]}, "lower context, freeze more, or train a LoRA (which needs model)"),
    (LORA, "lower context, hold the base in bfloat16 (lora.base), or set weights to bf16"),
    (LORA | HALF, "lower context"), ({"lora": {"rank": 2, "base": "bfloat16"}}, "lower context"),
])  # fmt: skip
def test_a_budget_of_memory_names_what_would_help(changes: dict[str, Any], remedies: str) -> None:
    if changes:
        run(settings(out="base", steps=1), watch=Silent())
    how = settings(optimizer="adamw") if not changes else settings(
        **{"new": None, "model": "base", "tokenizer": None, "optimizer": "adamw", **changes})  # fmt: skip
    with pytest.raises(TrainingError, match=re.escape(f"which is more than 20 MB; {remedies}") + "$"):
        plan(how, Budget.parse("20 MB"), watch=Silent())


def test_a_budget_of_time_is_not_met_by_a_smaller_row() -> None:
    for batch, remedy in ((1, "lower context"), (2, "lower batch or context")):
        with pytest.raises(TrainingError, match=rf"which is more than 9 flops; {remedy}$"):
            plan(settings(batch=batch), Budget.parse("9 flops"), watch=Silent())


def test_a_budget_chooses_the_batch_of_a_new_model() -> None:
    """By the tokens that it buys, where the settings leave it open; steps times batch are those tokens."""
    whole = plan(settings(), watch=Silent())
    assert best_tokens(196_608) == 2048 and best_tokens(1e12) / best_tokens(1e9) == pytest.approx(1000**0.383)
    for times in (1, 100):
        budget = Budget.parse(f"{whole.flops * times} flops")
        chosen = plan(settings(), budget, choose_batch=True, watch=Silent())
        rows = chosen.settings.get("batch", 8)
        assert rows & (rows - 1) == 0 and 2**-0.5 < rows * 64 / best_tokens(whole.tokens * times) < 2**0.5
        assert chosen.tokens == chosen.steps * rows * 64 == pytest.approx(whole.tokens * times, rel=0.05)
    assert plan(settings(), budget, watch=Silent()).settings == {"steps": 4000}, "the settings give it"
    run(settings(out="base", steps=2), watch=Silent())
    tuned = settings(new=None, model="base", tokenizer=None)
    assert list(plan(tuned, budget, choose_batch=True, watch=Silent()).settings) == ["steps"]


def test_a_chosen_batch_is_cut_to_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(settings(), watch=Silent())
    budget = Budget.parse(f"{whole.flops * 100} flops")
    monkeypatch.setattr("lapis.training.forecast.measured.available", lambda device: 0)
    chosen = plan(settings(), budget, choose_batch=True, watch=Silent())
    assert chosen.settings["batch"] / chosen.settings["accumulate"] <= 4, "half of what eight rows took"


@pytest.mark.parametrize(
    "text, kind, amount",
    [("3 min", "seconds", 180), ("90s", "seconds", 90), ("1.5 H", "seconds", 5400), ("8GB", "bytes", 8e9),
     ("1e18 flops", "flops", 1e18), ("2 GiB", "bytes", 2**31)],
)  # fmt: skip
def test_a_budget_is_read_as_it_is_written(text: str, kind: str, amount: float) -> None:
    assert (Budget.parse(text).kind, Budget.parse(text).amount) == (kind, amount)


@pytest.mark.parametrize("text", ["", "3", "min", "3 parsecs", "-3 min", "0 min", "1e999 flops", "nan GB"])
def test_a_budget_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'train: budget is .*; give a time, a size or FLOPs: "3 min"'):
        Budget.parse(text)


def published(
    name: str, gpus: int, rows: int, checkpointing: Any, context: int = 8192, *, how: Mapping[str, Any] = {},
    **machine: Any,
) -> PaperForecast:  # fmt: skip
    family = find(PRESETS[name])
    assert family is not None
    config = TrainConfig(steps=10, batch=gpus * rows, checkpointing=checkpointing, **how)
    return on_paper(family.read_config(PRESETS[name]), context, config, ForecastOptions(True, gpus=gpus, **machine))


H100, FAST, SLOW = {"tflops": 989.0, "gpu_memory": 96.0}, {"bandwidth": 450.0}, {"bandwidth": 50.0}
A100 = {"tflops": 312.0, "bandwidth": 25.0, "efficiency": 0.57}


@pytest.mark.parametrize(
    "forecast, tokens_per_second, gigabytes",
    [  # tokens per second on each GPU, and GB, that torchtitan published for Llama 3 with FSDP; docs/scale.md
        (published("llama-3-8b", 8, 2, "selective", **H100, **FAST), 6667, 77.0 * 1.0737),
        (published("llama-3-8b", 128, 2, "selective", **H100, **SLOW), 6514, 62.0 * 1.0737),
        (published("llama-3-8b", 64, 1, "selective", **A100), 2973, None),
        (published("llama-3-70b", 64, 1, "whole", **A100), 331, None),
    ],
)
def test_on_paper_as_published(forecast: PaperForecast, tokens_per_second: float, gigabytes: float | None) -> None:
    assert forecast.tokens_per_second == pytest.approx(tokens_per_second, rel=0.15)
    assert forecast.fits
    if gigabytes:
        assert sum(forecast.memory_bytes.values()) / 1e9 == pytest.approx(gigabytes, rel=0.15)


def test_on_paper_more_gpus_hold_less_and_a_slow_network_bounds() -> None:
    eight, many = (published("llama-3-8b", gpus, 1, "whole", **H100, **FAST) for gpus in (8, 64))
    assert many.memory_bytes["held"] * 8 == pytest.approx(eight.memory_bytes["held"], rel=1e-6)
    assert many.checkpoint_bytes == eight.checkpoint_bytes == 8_030_261_248 * 12
    half = published("llama-3-8b", 8, 1, "whole", **H100, **FAST, how={"weights": "bf16", "ema": 0.99})
    assert half.checkpoint_bytes == 8_030_261_248 * (6 + 4)  # an average is in float32
    assert half.memory_bytes["held"] == 8_030_261_248 * (8 + 4) // 8
    full = published("llama-3-8b", 8, 1, "whole", **H100, **FAST, how={"precision": "float32"})
    assert full.memory_bytes["gathered"] == 2 * eight.memory_bytes["gathered"]
    assert full.bytes_per_step == pytest.approx(eight.bytes_per_step * (2 * 4 + 4) / (2 * 2 + 4))
    slow = published("llama-3-8b", 8, 1, "whole", **H100, bandwidth=1.0)
    assert slow.seconds_per_step == slow.communicating > slow.computing and slow.mfu < eight.mfu
    alone = published("llama-3.2-1b", 1, 1, "none", **H100, **FAST)
    assert alone.bytes_per_step == 0 and alone.memory_bytes["gathered"] == 0


def test_on_paper_what_does_not_fit_is_told_with_what_helps() -> None:
    assert published("llama-3-70b", 8, 1, "whole", **H100, **FAST).levers == "more GPUs"
    rows = published("llama-3-8b", 8, 8, "none", **H100, **FAST)
    assert not rows.fits and rows.levers == "accumulate=8 or checkpointing=whole"
    with pytest.raises(TrainingError, match="batch 9 is not 8 GPUs times accumulate 1 times whole rows; give batch=8"):
        machine = ForecastOptions(True, gpus=8, tflops=1.0, bandwidth=1.0)
        family = find(PRESETS["gpt2"])
        assert family is not None
        on_paper(family.read_config(PRESETS["gpt2"]), 64, TrainConfig(steps=1, batch=9), machine)


def test_as_it_is_typed(run: Lapis) -> None:
    Path("run.yaml").write_text(json.dumps(SETTINGS))
    status, out, _ = run("train", "run.yaml", "--plan-only", "--json")
    result = json.loads(out)
    assert status == 0 and result["steps"] == 40 and result["memory"]["total"] > result["memory"]["weights"]
    status, out, _ = run("train", "run.yaml", "--plan-only", "--budget", "1 hour")
    assert status == 0 and "within the budget: lapis train run.yaml steps=" in out and "Memory at its peak" in out
    Path("open.yaml").write_text(json.dumps({name: value for name, value in SETTINGS.items() if name != "batch"}))
    status, out, _ = run("train", "open.yaml", "--plan-only", "--budget", "1e12 flops", "--json")
    assert status == 0 and {"steps", "batch"} <= set(json.loads(out)["settings"])
    paper = ["--plan-only", "--gpus", "4", "--tflops", "100", "--bandwidth", "10"]
    status, out, _ = run("train", "run.yaml", *paper)
    assert status == 0 and "on 4 GPUs" in out and "counted as shard: full" in out
    assert "Sent by a GPU" in out and "updates" in out and "s for Muon's updates, which each GPU gathers" in out
    status, out, _ = run("train", "run.yaml", *paper, "optimizer=adamw")
    assert status == 0 and "gradients" in out and "updates" not in out
    assert json.loads(run("train", "run.yaml", *paper, "--json")[1])["fits"] is True
    for wrong, message in {
        ("--budget", "1 min"): "train: --budget '1 min' is for --plan-only; add it, or leave --budget out",
        ("--plan-only", "--gpus", "4"): "about machines that are not here and cannot be measured; add --tflops 989",
        (*paper, "--budget", "1 min"): "--budget is for this machine; without --gpus it is measured",
        (*paper, "lora={rank: 2}"): "on paper all weights are trained; leave out lora, tune, freeze and plan",
        (*paper, "objective=dpo"): "reads each row once, and dpo does more; give one of causal, chat, masked, classify",
        (*paper, "shard=none"): "shard is none, and on paper each GPU holds its share; give shard: full",
        (*paper, "shard=hybrid"): "shard is hybrid, and on paper each GPU holds its share; give shard: full",
        (*paper, "weights=bf16"): "on paper each GPU holds its share; give weights: float32, or --gpus 1",
        ("--plan-only", "--gpus", "0", "--tflops", "1", "--bandwidth", "1"): "gpus is 0; it must be above 0",
    }.items():
        status, out, error = run("train", "run.yaml", *wrong)
        assert status == 1 and not out and message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("owner, name, at", [(Updater, "_compute", 3), (Causal, "begin", 1)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_plan_as_any_command(
    owner: Any, name: str, at: int, number: signal.Signals, run: Lapis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a step, and before the first one; a step that is not whole says nothing of the time that one takes."""
    act, calls = getattr(owner, name), [at]

    def stops(*given: Any) -> Any:
        calls[0] -= 1
        if not calls[0]:
            os.kill(os.getpid(), number)
        return act(*given)

    monkeypatch.setattr(owner, name, stops)
    Path("run.yaml").write_text(json.dumps(SETTINGS))
    status, out, error = run("train", "run.yaml", "--plan-only", "--json")
    assert (status, out) == (128 + number, "") and error.splitlines()[-1] == "lapis: stopped"


PLAN, GPUS = ("--plan-only",), ("--gpus", "4", "--tflops", "100", "--bandwidth", "10")
NEITHER = "is about machines that are not here and cannot be measured; add --gpus N and --tflops 989 (an H100) and --ba"


@pytest.mark.parametrize(
    "given, message",
    [
        (("--efficiency", "0.4"), "train: --efficiency 0.4 is for --plan-only; add it, or leave --efficiency out"),
        (("--gpu-memory", "40"), "train: --gpu-memory 40 is for --plan-only; add it, or leave --gpu-memory out"),
        (GPUS, "train: --gpus 4 is for --plan-only; add it, or leave --gpus out"),
        ((*PLAN, "--efficiency", "0.4"), f"train: --efficiency 0.4 {NEITHER}"),
        ((*PLAN, "--gpu-memory", "40", "--budget", "1 min"), f"train: --gpu-memory 40 {NEITHER}"),
        ((*PLAN, "--gpus", "4", "--tflops", "9"), "cannot be measured; add --bandwidth 50 (GB/s), as "),
        ((*PLAN, "--html", "x.html"), "train: --html x.html has no effect with --plan-only, which writes nothing"),
        ((*PLAN, "--fresh"), "train: --fresh has no effect with --plan-only, which writes nothing and looks at no "),
        ((*PLAN, *GPUS, "--allow-change", "lr"), "train: --allow-change lr has no effect with --plan-only, which"),
        ((*PLAN, "--budget", "0.000001 s"), "seconds, which is more than 0.000001 s; lower batch or context"),
    ],
)
def test_what_cannot_be_forecast_is_refused_in_a_line(given: tuple[str, ...], message: str, run: Lapis) -> None:
    Path("run.yaml").write_text(json.dumps(SETTINGS))
    status, out, error = run("train", "run.yaml", *given)
    assert status == 1 and not out and message in error and error.count("\n") == 1, error
    assert not Path("run").exists() and not Path("x.html").exists()


def test_predictions_survive_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Silent):
        def row(self, row: dict[str, Any]) -> None:
            if row["step"] == 20:
                raise KeyboardInterrupt

    how = replace(settings(), save_every=10, log_every=10)
    with pytest.raises(KeyboardInterrupt):
        run(how, watch=Stop())
    told: list[str] = []

    class Listen(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    result = run(how, watch=Listen())
    assert any("going on from" in text for text in told) and result.predicted["after_steps"] == 5


def test_a_run_bounded_by_time_says_how_many_steps_it_expects(run: Lapis) -> None:
    """Its seconds are given; what its first steps predict is how many of them there will be, and the memory."""
    given = {name: value for name, value in SETTINGS.items() if name != "steps"}
    Path("run.yaml").write_text(json.dumps({**given, "minutes": 0.03, "optimizer": "adamw"}))
    status, out, _ = run("train", "run.yaml")
    times = json.loads(Path("run/times.json").read_text())
    expected, steps = times["predicted"], times["curve"][-1]["step"]
    assert status == 0 and expected["after_steps"] == 5 and expected["seconds"] == pytest.approx(1.8)
    assert steps / 4 < expected["steps"] < steps * 4 and 0 < expected["memory_bytes"] <= times["memory_bytes"]
    assert f"predicted after 5 steps: {expected['steps']:,} steps, 0:02 and" in out and f"took {steps:,} steps" in out
    page = Path("run/certificate.html").read_text()
    assert "bounded by time" in page and "too short" not in page and str(expected["steps"]) in page


def test_a_run_that_ends_before_a_prediction_says_so() -> None:
    result = run(settings(steps=2), watch=Silent())
    assert result.predicted == {}
    why = json.loads(Path("run/certificate.json").read_text())["not_predicted"]
    assert why == "The run ended after 2 steps; what it takes is predicted after 5."
    assert why in Path("run/certificate.html").read_text()


def test_memory_is_of_the_device_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what its allocator held at most, as the forecast counts it, and not the memory of the machine."""
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 123)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert peak(gpu) == 123 and peak(cpu) > 1_000_000
    asked: list[torch.device] = []
    monkeypatch.setattr("lapis.training.loop.estimate.peak", lambda device: asked.append(device) or 1)
    monkeypatch.setattr("lapis.training.loop.loop.peak", lambda device: asked.append(device) or 2)
    result = run(settings(steps=6), watch=Silent())
    assert asked == [cpu, cpu] and (result.predicted["memory_bytes"], result.memory_bytes) == (1, 2)
