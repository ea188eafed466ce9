"""Stops are obeyed at once and lose nothing; measuring takes a slice; progress shows from the beginning."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.checkpoint.tensor_file import read_tensors
from lapis.errors import TrainingError
from lapis.model.transformer import Transformer, put_head
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.corpus.labels import Labeled
from lapis.text.corpus.pairs import Pair
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import LogLines, Silent
from lapis.training.loop.stop_request import StopSignal, stop_requests
from lapis.training.objectives.objective import SMALL_BATCH, FirstRows
from lapis.training.objectives.policy.policy import GRPO, PPO
from lapis.training.objectives.preference.preference import DPO, ORPO
from lapis.training.objectives.supervised.classify import Classify
from lapis.training.objectives.supervised.next_token import Causal, Chat

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=6, batch=4, lr=1e-2, warmup=0, log_every=1, precision="float32", threads=1, sample_every=0, accumulate=2
)
PROMPTS = [{"prompt": f"Where does cat {i} sleep?"} for i in range(6)]


def stop() -> None:
    """What another process' kill does; a handler that does not raise leaves the caller waiting."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


class Stops(Causal):
    """Is asked to stop in call number `at` of one of its methods."""

    method = "loss"
    at = 0

    def _call(self, name: str) -> None:
        if name == self.method and self.at:
            self.at -= 1
            if not self.at:
                stop()

    def begin(self, model: Transformer, folder: Path | None = None) -> None:
        self._call("begin")

    def prepare(self, model: Transformer, batch: Any) -> Any:
        model.drop(0.2)  # so that the random numbers of a step matter
        return super().prepare(model, batch)

    def loss(self, model: Transformer, batch: Any) -> Any:
        result = super().loss(model, batch)
        self._call("loss")
        return result

    def evaluate(self, model: Transformer) -> dict[str, float]:
        self._call("evaluate")
        return super().evaluate(model)

    def sample(self, model: Transformer) -> str:
        self._call("sample")
        return ""

    def write(self, folder: Path) -> None:
        self._call("write")


def result(folder: Path) -> tuple[bytes, list[tuple[Any, Any]]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return (folder / "model.safetensors").read_bytes(), [(row["loss"], row.get("held_out")) for row in rows]


def test_a_signal_is_obeyed_at_once_only_where_that_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        with pytest.raises(StopSignal), request.at_once():
            stop()
        assert request.signal == "SIGTERM"
        with pytest.raises(StopSignal), request.at_once():
            raise AssertionError
    with stop_requests(immediate=False) as request, request.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == "SIGINT"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("method, at, after", [
    ("loss", 6, 2), ("evaluate", 2, 4), ("evaluate", 3, 6), ("write", 1, 6), ("sample", 1, 1),
])  # fmt: skip
def test_a_stop_within_a_step_loses_nothing(
    method: str, at: int, after: int, new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    config = replace(CONFIG, eval_every=2, ema=0.5, sample_every=1e-9 if method == "sample" else 0)

    def make() -> Stops:
        return Stops(tokenizer, documents, context=32, valid=documents[:9])

    train(new_model(), make(), config, tmp_path / "whole", watch=Silent())
    stopped = make()
    stopped.method, stopped.at = method, at
    with pytest.raises(TrainingError, match=f"stopped by SIGTERM after step {after} of 6; saved in .*step-{after}"):
        train(new_model(), stopped, config, tmp_path / "parts", watch=Silent())
    train(new_model(), make(), config, tmp_path / "parts", watch=Silent())
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


class Drifts(Stops):
    """Its held-out error is how far the weights have come."""

    def evaluate(self, model: Transformer) -> dict[str, float]:
        self._call("evaluate")
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.start: torch.Tensor = self.__dict__.get("start", weights)
        return {"error": (weights - self.start).norm().item()}


@pytest.mark.parametrize("changes, method, at", [
    ({"ema": 0.5}, "evaluate", 2), ({"ema": 0.5, "early_stop": 2}, "write", 1), ({"best": True}, "evaluate", 2),
    ({"best": True}, "write", 1), ({"limits": {"error": 1e-9}, "eval_every": 4}, "evaluate", 3),
])  # fmt: skip
def test_a_run_that_was_stopped_at_its_end_can_be_longer(
    changes: dict[str, Any], method: str, at: int, new_model: Make, tokenizer: Tokenizer, documents: list[Document],
    tmp_path: Path,
) -> None:  # fmt: skip
    """What is saved then are the weights of the last step, and not the average or the best ones, which end a run."""
    plain = replace(CONFIG, steps=4, eval_every=2, schedule="constant")
    config = replace(plain, **changes)

    def make() -> Drifts:
        objective = Drifts(tokenizer, documents, context=32)
        objective.evaluate(new_model())
        return objective

    train(new_model(), make(), plain, tmp_path / "plain", watch=Silent())
    train(new_model(), make(), replace(config, steps=8), tmp_path / "whole", watch=Silent())
    stopped = make()
    stopped.method, stopped.at = method, at
    with pytest.raises(TrainingError, match=r"stopped by SIGTERM after step 4 of 4; saved in .*step-4"):
        train(new_model(), stopped, config, tmp_path / "out", watch=Silent())
    checkpoint = tmp_path / ".out.lapis" / ".journal" / "step-4"
    weights = (read_tensors(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "plain"))
    assert all(torch.equal(*pair) for pair in zip(*(w.values() for w in weights), strict=True))
    saved = json.loads((checkpoint / "state.json").read_text())
    assert (saved["ended"], saved["left"]) == ("", False)
    train(new_model(), make(), replace(config, steps=8), tmp_path / "out", allow_change=["steps"], watch=Silent())
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_stop_before_the_first_step_leaves_nothing(
    new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    for method, config in (("begin", CONFIG), ("loss", replace(CONFIG, threads=0, precision="auto"))):
        stopped = Stops(tokenizer, documents, context=32)
        stopped.method, stopped.at = method, 1
        with pytest.raises(TrainingError, match="stopped by SIGTERM before a step was done"):
            train(new_model(), stopped, config, tmp_path / "out", watch=Silent())
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_a_stop_among_rollouts_loses_nothing(kind: Any, new_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    calls = [0]

    def worth(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        calls[0] -= 1
        if calls[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return len(set(reply)) / 10

    def make() -> Any:
        return kind(tokenizer, PROMPTS, rewards=worth, context=64, max_tokens=8, group=4, updates=2, kl=0.1)

    config = replace(CONFIG, accumulate=1, batch=2)
    train(new_model(), make(), config, tmp_path / "whole", watch=Silent())
    calls[0] = 6 + 8 + 3  # the replies before the run, the first rollouts, and some of the second
    with pytest.raises(TrainingError, match="stopped by SIGTERM after step 2 of 6"):
        train(new_model(), make(), config, tmp_path / "parts", watch=Silent())
    train(new_model(), make(), config, tmp_path / "parts", watch=Silent())
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_measuring_takes_a_slice(
    new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    sizes: list[int] = []

    class Noted(Causal):
        def loss(self, model: Transformer, batch: Any) -> Any:
            sizes.append(batch.ids_BT.numel())
            return super().loss(model, batch)

    objective = Noted(tokenizer, documents, context=64)
    config = replace(CONFIG, steps=1, batch=16, accumulate=1, threads=0, precision="auto")
    train(new_model(), objective, config, tmp_path / "out", watch=Silent())
    assert sizes[-1] == 16 * 64 and len(sizes) > 3
    assert max(sizes[:-1]) <= SMALL_BATCH


@pytest.mark.parametrize("kind", ["causal", "chat", "classify", "dpo", "orpo", "grpo", "ppo"])
def test_every_objective_has_a_small_batch(
    kind: str, new_model: Make, tokenizer: Tokenizer, documents: list[Document], chats: list[ChatRecord]
) -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    pairs = [Pair([said("user", "Where? " * 30)], said("assistant", "Here. " * 9), said("assistant", "There."),
                  Path("p.jsonl"), 1)]  # fmt: skip
    labels = [Labeled(f"cat {i}", "odd" if i % 2 else "even", Path("l.tsv"), i) for i in range(20)]
    objectives: dict[str, Callable[[], Any]] = {
        "causal": lambda: Causal(tokenizer, documents, context=64),
        "chat": lambda: Chat(tokenizer, chats, context=64),
        "classify": lambda: Classify(tokenizer, labels, context=64),
        "dpo": lambda: DPO(tokenizer, pairs, context=256),
        "orpo": lambda: ORPO(tokenizer, pairs, context=256),
        "grpo": lambda: GRPO(tokenizer, PROMPTS, rewards="ends", kl=0.1, context=64, max_tokens=8),
        "ppo": lambda: PPO(tokenizer, PROMPTS, rewards="ends", context=64, max_tokens=8),
    }
    model, objective = new_model(), objectives[kind]()
    model.config = replace(model.config, context=256)
    if kind == "classify":
        put_head(model, "classes", objective.class_names)
    objective.begin(model)
    for tokens in (48, SMALL_BATCH):
        with torch.no_grad():
            batch = objective.small_batch(model, FirstRows(16, 0), tokens)
        loss, count, metrics = objective.loss(model, batch)
        loss.backward()
        assert loss.isfinite() and count > 0 and 0 < metrics["tokens"] <= tokens + 16


def test_lines_come_while_nothing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    watch = LogLines("run", 0.05)
    watch.stage("measuring how to compute a step")
    time.sleep(0.5)
    row = {"step": 1, "loss": 2.0, "share": 0.25, "seconds_left": 30.0, "tokens_per_second": 10.0}
    watch.step(row)
    watch.close()
    lines = capsys.readouterr().err.splitlines()
    assert "run  measuring how to compute a step" in lines
    assert "run   25%  step 1  loss 2.000  10 tok/s  0:30 left" in lines
