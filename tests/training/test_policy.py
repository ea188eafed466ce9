"""Policies in the one loop: stopped among the steps that share replies, in parts, with rewards that fail."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.config import load_yaml
from lapis.errors import ConfigError, DataError, TrainingError
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives import reference
from lapis.training.objectives.policy.policy import GRPO, PPO, RLOO
from lapis.training.objectives.policy.rollouts import sample_rollouts, score_replies
from lapis.training.run import read_settings, run

Make = Callable[[], Transformer]
DATA = [{"prompt": f"Where does cat {i} sleep?", "answer": f"{i}"} for i in range(6)]


def worth(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
    return len(set(reply)) / 10 + (record["answer"] in reply)


def settings(steps: int = 6, **more: Any) -> TrainConfig:
    return TrainConfig(steps=steps, batch=2, lr=1e-3, warmup=0, precision="float32", threads=1, sample_every=0,
                       log_every=1, **more)  # fmt: skip


def objective(kind: Any, tokenizer: Tokenizer, **more: Any) -> Any:
    options = {"rewards": worth, "context": 64, "max_tokens": 8, "group": 4, "updates": 3, **more}
    return kind(tokenizer, DATA, **options)


class StopsAfter(Silent):
    """Wishes to stop, as Ctrl-C does, after so many entries of the curve."""

    def __init__(self, objective: Any, rows: int) -> None:
        self.objective, self.left = objective, rows

    def row(self, row: Mapping[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            self.objective.halt = "the test"


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_a_stop_among_steps_that_share_replies_is_exact(
    kind: Any, new_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    more = {"kl": 0.1, "kl_target": 0.5} if kind is PPO else {"kl": 0.1}
    whole = train(new_model(), objective(kind, tokenizer, **more), settings(), tmp_path / "whole", watch=Silent())
    stopped = objective(kind, tokenizer, **more)
    with pytest.raises(TrainingError, match=r"stopped by the test after step 4"):
        train(new_model(), stopped, settings(), tmp_path / "parts", watch=StopsAfter(stopped, 4))
    again = objective(kind, tokenizer, **more)
    train(new_model(), again, settings(), tmp_path / "parts", watch=Silent())
    for name in ("model.safetensors", "replies.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert whole.metrics["kl"] > 0 and whole.metrics["rollout_gap"] < 1e-4
    first = json.loads((tmp_path / "whole" / "replies.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == DATA[0]["prompt"] and first["before_reward"] is not None


@pytest.mark.parametrize("kind", [GRPO, RLOO, PPO])
def test_a_step_in_parts_is_the_step(kind: Any, new_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    logs = []
    for accumulate in (1, 2):
        made = objective(kind, tokenizer, kl=0.1)
        result = train(
            new_model(), made, settings(4, accumulate=accumulate), tmp_path / str(accumulate), watch=Silent()
        )
        logs.append(result.log)
    for one, two in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=2e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        for name in ("reward", "length", "kl"):
            assert one["metrics"][name] == pytest.approx(two["metrics"][name], abs=1e-5)


@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]], [[5, 6], [7, 8]]])
def test_rollouts_agree_with_training_and_end(new_model: Make, prompts: list[list[int]]) -> None:
    model = new_model()
    ends = list(range(0, 300, 12))
    rollouts = sample_rollouts(
        model, prompts, range(len(prompts)), ends, group=6, max_tokens=10, temperature=0.7, seed=5
    )
    said = score_replies(model, rollouts, 0.7)
    torch.testing.assert_close(said.logprobs_BR, rollouts.logprobs_BR, atol=1e-4, rtol=0)
    lengths = rollouts.mask_BR.sum(1).tolist()
    assert len(set(lengths)) > 2 and rollouts.ended_B.any()
    for reply, length, ended in zip(rollouts.reply_BR.tolist(), lengths, rollouts.ended_B.tolist(), strict=True):
        assert [token in ends for token in reply[:length]] == [False] * (length - 1) + [ended]
        assert ended or length == 10
    # a reply follows from the seed, its prompt's number and its place, not from its neighbors
    alone = sample_rollouts(model, prompts[1:2], [1], ends, group=6, max_tokens=10, temperature=0.7, seed=5)
    width = alone.reply_BR.shape[1]
    assert torch.equal(alone.reply_BR, rollouts.reply_BR[6:12, :width])


def test_what_stands_after_the_end_token_is_not_learned_from(new_model: Make, tokenizer: Tokenizer) -> None:
    model, made = new_model(), objective(GRPO, tokenizer)
    made.begin(model)
    state = _State(model)
    turn, _ = next(made.batches(state))
    with torch.no_grad():
        turn, experience = made.prepare(model, turn)
    rollouts = experience.rollouts
    rollouts.mask_BR[:, 5:] = False
    made.loss(model, (turn, experience))[0].backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    late = torch.arange(rollouts.ids_BT.shape[1]) >= rollouts.prompt_B[:, None] + 5
    rollouts.ids_BT[late] = 7
    rollouts.reply_BR[:, 5:] = 7
    rollouts.logprobs_BR[:, 5:] = -50.0
    made.loss(model, (turn, experience))[0].backward()
    for before, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(before, parameter.grad, rtol=0, atol=0)


def test_lora_needs_no_second_model(new_model: Make, tokenizer: Tokenizer) -> None:
    from lapis.model.lora import LoraConfig, wrap

    model = new_model()
    base = new_model()
    wrap(model, LoraConfig(rank=2))
    made = objective(GRPO, tokenizer, kl=0.1)
    made.begin(model)
    assert made._reference.model is None and any("adapters off" in note for note in made.notes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
        _, experience = made.prepare(model, next(made.batches(_State(model)))[0])
        said = score_replies(base, experience.rollouts, 1.0)
    torch.testing.assert_close(experience.reference_BR, said.logprobs_BR)
    assert (experience.reference_BR - experience.rollouts.logprobs_BR).abs().max() > 1e-2


def test_a_reference_that_is_not_the_policys_parent_is_refused(
    new_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from lapis.families.config import ModelConfig
    from lapis.text.tokenizer.tokenizer import train_tokenizer

    model = new_model()
    folder = tmp_path / "other"
    save(Transformer(ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, vocab=tokenizer.rows, context=64)), folder)
    tokenizer.save(folder)
    with pytest.raises(ConfigError, match=r"is not the policy's parent: its dim is 16, the policy's 32"):
        objective(GRPO, tokenizer, kl=0.1, reference=str(folder)).begin(model)
    train_tokenizer(["another text altogether"], 270).save(folder)
    with pytest.raises(ConfigError, match=r"another tokenizer"):
        objective(GRPO, tokenizer, kl=0.1, reference=str(folder))
    far = new_model()
    with torch.no_grad():
        for parameter in far.parameters():
            parameter.mul_(4)
    save(far, tmp_path / "far")
    tokenizer.save(tmp_path / "far")
    made = objective(GRPO, tokenizer, kl=0.1, reference=str(tmp_path / "far"))
    made.begin(model)
    with pytest.raises(ConfigError, match=r"nats per token from the policy before its first step"):
        made.prepare(model, next(made.batches(_State(model)))[0])


def test_another_reference_of_the_same_shape_is_another_run(
    new_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The weights of the reference are recorded, not only their names and shapes."""
    place = tmp_path / "reference"

    def write_reference(change: float) -> None:
        model = new_model()
        with torch.no_grad():
            next(model.parameters()).add_(change)
        save(model, place)
        tokenizer.save(place)

    write_reference(0.0)
    stopped = objective(GRPO, tokenizer, reference=str(place))
    with pytest.raises(TrainingError, match=r"stopped by the test after step 2"):
        train(new_model(), stopped, settings(), tmp_path / "out", watch=StopsAfter(stopped, 2))
    shutil.rmtree(place)
    write_reference(0.01)
    again = objective(GRPO, tokenizer, reference=str(place))
    with pytest.raises(TrainingError, match=r"differs: reference was \w+, is \w+"):
        train(new_model(), again, settings(), tmp_path / "out", watch=Silent())


def test_a_trained_policy_is_not_held_to_its_parent(
    new_model: Make, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the folder before the first step, and not again where a run goes on."""
    monkeypatch.setattr(reference, "_FAR", 0.05)
    save(new_model(), tmp_path / "parent")
    tokenizer.save(tmp_path / "parent")

    def made() -> Any:
        return objective(GRPO, tokenizer, reference=str(tmp_path / "parent"), updates=1)

    fast = replace(settings(4), lr=0.1)
    whole = train(new_model(), made(), fast, tmp_path / "whole", watch=Silent())
    assert whole.log[2]["metrics"]["kl"] > 0.1
    stopped = made()
    with pytest.raises(TrainingError, match=r"stopped by the test after step 2"):
        train(new_model(), stopped, fast, tmp_path / "parts", watch=StopsAfter(stopped, 2))
    train(new_model(), made(), fast, tmp_path / "parts", watch=Silent())
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_reward_that_raises_hangs_or_is_nan_is_counted(new_model: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import time

    calls: Iterator[int] = iter(range(10**6))

    def troubled(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        call = next(calls)
        if call == 20:
            time.sleep(5)
        if call % 7 == 3:
            raise KeyError("oh")
        return float("nan") if call % 7 == 5 else call % 3

    made = objective(GRPO, tokenizer, rewards=[troubled, "ends"], reward_seconds=0.2, updates=1)
    notes: list[str] = []
    watch = Silent()
    watch.note = notes.append  # type: ignore[method-assign]
    result = train(new_model(), made, settings(3), tmp_path / "out", watch=watch)
    assert 0.2 < result.metrics["unscored"] < 0.5
    assert [note for note in notes if "reward troubled failed: " in note]


def test_where_nothing_can_be_scored_the_run_ends_in_one_line(
    new_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def broken(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        raise ValueError("no\nway")

    made = objective(RLOO, tokenizer, rewards=broken)
    with pytest.raises(TrainingError, match=r"no reply of the step could be scored: broken raised ValueError .*no way"):
        train(new_model(), made, settings(1), tmp_path / "out", watch=Silent())


def test_prompts_that_cannot_be_replied_to_are_refused_by_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "short"}, {"prompt": "long " * 60}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"prompts.jsonl line 2: the prompt has \d+ tokens, and the context leaves"):
        GRPO(tokenizer, str(path), rewards=worth, context=64, max_tokens=8)
    made = GRPO(tokenizer, str(path), rewards="ends", context=64, max_tokens=8, too_long="drop")
    assert made.describe()["counts"] == {"prompts": 1, "dropped_prompts": 1}
    path.write_text(json.dumps({"promt": "x"}) + "\n")
    with pytest.raises(DataError, match=r'line 1: the field prompt is missing; did you mean "promt"'):
        GRPO(tokenizer, str(path), rewards=worth)
    with pytest.raises(DataError, match=r"record 1: prompt is empty"):
        GRPO(tokenizer, [{"prompt": " "}], rewards=worth)
    with pytest.raises(ConfigError, match=r"group is 1"):
        GRPO(tokenizer, DATA, rewards=worth, group=1)


def test_a_settings_file_reaches_the_objective(tmp_path: Path) -> None:
    config = read_settings(
        {"objective": "grpo", "out": "o", "model": "m", "data": "d.jsonl", "steps": 3, "group": 16, "kl": 0.02,
         "rewards": [{"name": "number", "weight": 2, "options": {"field": "final"}}]}, "run.yaml",
    )  # fmt: skip
    assert config.options["group"] == 16 and config.options["rewards"][0]["name"] == "number"
    with pytest.raises(ConfigError, match='unknown key "grop"; did you mean "group"'):
        read_settings({"objective": "grpo", "out": "o", "model": "m", "data": "d", "steps": 3, "grop": 16}, "run.yaml")


YAML = """
objective: ppo
model: start
data: prompts.jsonl
rewards: [{name: exact, options: {partial: true}}, {name: length, weight: 0.5, options: {most: 3}}]
context: 64
max_tokens: 8
kl: 0.1
kl_target: 0.3
updates: 2
out: out
steps: 5
batch: 4
lr: 0.001
threads: 1
precision: float32
log_every: 1
sample_every: 0
"""


def test_two_processes_give_the_loss_of_one(
    new_model: Make, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts, whitening, the adapted KL weight and the value head are those of one process."""
    (tmp_path / "run.yaml").write_text(YAML)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    save(new_model(), tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    with socket.socket() as outcome:
        outcome.bind(("localhost", 0))
        port = str(outcome.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, "-m", "lapis", "train", "run.yaml"]

    def begin(rank: int) -> "subprocess.Popen[str]":
        env = {**shared, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        return subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stderr=subprocess.PIPE)

    running = [begin(0), begin(1)]
    monkeypatch.chdir(tmp_path)
    run(read_settings({**load_yaml("run.yaml"), "out": "one"}, "run.yaml"), watch=Silent())
    said = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("out", "one")]  # fmt: skip
    for two, one in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        for name, value in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(value, abs=2e-5), name


class _State:
    """As much of a TrainState as batches() reads."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.cursor, self.parts, self.rows, self.seed = model, None, 1, 2, 0
