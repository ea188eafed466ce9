"""Advantages, losses and gradients of GRPO and RLOO against TRL's trainers, on the same tiny model and replies; PPO's
against a plain numpy reference."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.objectives.policy.experience import Experience
from lapis.training.objectives.policy.on_policy import MicroBatch, OnPolicy
from lapis.training.objectives.policy.policy import GRPO, PPO, RLOO

from .gradients import assert_same_gradients

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEXT = " ".join(f"Tree {i} has {i * 3 % 7} birds and {i * 5 % 11} nests." for i in range(300))
DATA = [{"prompt": "Tree 3 has"}, {"prompt": "How many birds and nests has tree 12 today?"}, {"prompt": "Tree"}]
GROUP = 4


def worth(prompt: Any, reply: str, record: Any) -> float:
    return sum(map(ord, reply)) % 7 / 3 - 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train_tokenizer([TEXT], 300)
    vars(made)["end_ids"] = tuple(range(0, 300, 9))  # so that replies of a model that was never trained end at times
    return made


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A reference, the policy that replied, and the policy after some steps; folders of the first and the last."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    shape = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "vocab": tokenizer.rows, "context": 64}
    start = Transformer(ModelConfig(**shape, extra={"pad_token_id": tokenizer.pad_id}))
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(2)  # away from a policy that says anything with equal chance
    made = {"start": start}
    for name, before, much in (("spoke", "start", 0.02), ("moved", "spoke", 0.008)):
        made[name] = copy.deepcopy(made[before])
        with torch.no_grad():
            for parameter in made[name].parameters():
                parameter.add_(torch.randn_like(parameter), alpha=much)
    root = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        save(model, root / name)
        tokenizer.save(root / name)
    return {**made, "root": root}


def collected(objective: OnPolicy, models: dict[str, Any]) -> tuple[MicroBatch, Experience]:
    """Replies of `spoke`, as the second update of them gets them."""
    objective.begin(models["start"])
    turn = MicroBatch(0, 0, 0, 1, len(DATA), 11, list(range(len(DATA))))
    with torch.no_grad():
        objective.prepare(models["spoke"], turn)
    return objective.prepare(models["spoke"], MicroBatch(0, 1, 0, 1, len(DATA), 11, list(range(len(DATA)))))


def ours(objective: OnPolicy, batch: Any, model: Transformer, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss, and its gradients by the names that transformers has for them."""
    model.zero_grad()
    total, count, _ = objective.loss(model, batch)
    (total / count).backward()
    save(model, folder, state={name: p.grad for name, p in model.named_parameters()})
    return total.item() / count, load_file(folder / "model.safetensors")


def theirs(trainer: Any, models: dict[str, Any], experience: Experience) -> dict[str, Any]:
    """What TRL makes of these replies: its masks, advantages and reference log-probabilities."""
    rollouts = experience.rollouts
    lengths = rollouts.mask_BR.sum(1).tolist()
    prompts = [ids[:n].tolist() for ids, n in zip(rollouts.ids_BT, rollouts.prompt_B.tolist(), strict=True)]
    replies = [ids[:n].tolist() for ids, n in zip(rollouts.reply_BR, lengths, strict=True)]
    short = type(trainer).__name__ == "RLOOTrainer"
    made = (prompts, replies, ["x"] * len(replies)) if short else (prompts, replies, None, ["x"] * len(replies), None,
                                                                    {}, None, [])  # fmt: skip
    trainer._generate = lambda prompts: made
    trainer._calculate_rewards = lambda *_: experience.rewards_B[:, None]
    if trainer.beta:
        trainer.ref_model.load_state_dict(load_file(models["root"] / "start" / "model.safetensors"), strict=False)
        trainer.ref_model.tie_weights()
    policy = load_file(models["root"] / "spoke" / "model.safetensors")
    trainer.model.load_state_dict(policy, strict=False)
    inputs = trainer._generate_and_score_completions([DATA[i // GROUP] for i in range(len(replies))])
    trainer.model.load_state_dict(load_file(models["root"] / "moved" / "model.safetensors"), strict=False)
    trainer.current_gradient_accumulation_steps = 1
    return inputs


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "per_device_train_batch_size": GROUP * len(DATA), "num_generations": GROUP,
            "max_completion_length": 12, "report_to": "none", "use_cpu": True, "bf16": False, "num_iterations": 2,
            "gradient_checkpointing": False, "temperature": 0.9, "disable_dropout": False, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("average", "scale", "kl", "loss_type", "unbiased"),
    [
        ("token", "group", 0.0, "dapo", True),
        ("reply", "group", 0.3, "grpo", False),
        ("fixed", "none", 0.1, "dr_grpo", True),
    ],
)
def test_grpo_is_trls(
    average: Any, scale: Any, kl: float, loss_type: str, unbiased: bool, tokenizer: Tokenizer, models: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    from trl import GRPOConfig, GRPOTrainer

    objective = GRPO(
        tokenizer, DATA, rewards=worth, context=64, max_tokens=12, group=GROUP, temperature=0.9, updates=2, kl=kl,
        average=average, scale=scale, kl_unbiased=unbiased, epsilon=0.1, epsilon_high=0.15,
    )  # fmt: skip
    batch = collected(objective, models)
    trainer = GRPOTrainer(
        model=str(models["root"] / "moved"),
        reward_funcs=worth,
        args=GRPOConfig(
            **arguments(
                tmp_path,
                beta=kl,
                loss_type=loss_type,
                scale_rewards=scale,
                epsilon=0.1,
                epsilon_high=0.15,
                use_bias_correction_kl=unbiased,
            )
        ),
        train_dataset=datasets.Dataset.from_list(DATA * GROUP),
    )
    trainer.model.train()
    inputs = theirs(trainer, models, batch[1])
    torch.testing.assert_close(inputs["advantages"], batch[1].advantages, rtol=1e-5, atol=1e-5)
    assert batch[1].advantages.abs().max() > 0.5
    if kl:
        torch.testing.assert_close(
            inputs["ref_per_token_logps"] * batch[1].rollouts.mask_BR, batch[1].reference_BR, rtol=1e-4, atol=1e-4
        )
    mask_BR = batch[1].rollouts.mask_BR
    torch.testing.assert_close(
        inputs["old_per_token_logps"] * mask_BR, batch[1].rollouts.logprobs_BR, rtol=1e-4, atol=1e-4
    )
    loss = trainer._compute_loss(trainer.model, inputs)
    mine = ours(objective, batch, models["moved"], tmp_path / "grads")
    assert objective.loss(models["moved"], batch)[2]["clip_share"] > 0.05
    assert_same_gradients(mine, loss, trainer.model)


@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_rloo_is_trls(kl: float, tokenizer: Tokenizer, models: dict[str, Any], tmp_path: Path) -> None:
    from trl import RLOOConfig, RLOOTrainer

    objective = RLOO(
        tokenizer, DATA, rewards=worth, context=64, max_tokens=12, group=GROUP, temperature=0.9, updates=2, kl=kl
    )
    batch = collected(objective, models)
    trainer = RLOOTrainer(
        model=str(models["root"] / "moved"),
        reward_funcs=worth,
        args=RLOOConfig(**arguments(tmp_path, beta=kl)),
        train_dataset=datasets.Dataset.from_list(DATA * GROUP),
    )
    trainer.model.train()
    inputs = theirs(trainer, models, batch[1])
    torch.testing.assert_close(inputs["advantages"], batch[1].advantages, rtol=1e-5, atol=1e-5)
    loss = trainer._compute_loss(trainer.model, inputs)
    assert_same_gradients(ours(objective, batch, models["moved"], tmp_path / "grads"), loss, trainer.model)


def test_ppo_is_the_formulas_written_out(tokenizer: Tokenizer, models: dict[str, Any]) -> None:
    """Rewards with the KL taken off, GAE, whitening, and both losses, token by token in float64."""
    objective = PPO(
        tokenizer, DATA, rewards=worth, context=64, max_tokens=12, group=2, temperature=0.9, kl=0.3, gamma=0.97,
        lam=0.9, value_epsilon=0.05, value_weight=0.7,
    )  # fmt: skip
    objective.begin(models["start"])
    assert objective.extra_module is not None
    torch.manual_seed(1)
    with torch.no_grad():
        objective.extra_module.weight.normal_(0, 0.3)
    turn = MicroBatch(0, 0, 0, 1, len(DATA), 11, list(range(len(DATA))))
    with torch.no_grad():
        _, experience = objective.prepare(models["spoke"], turn)
    with torch.no_grad():
        objective.extra_module.weight.add_(0.01)
    total, count, figures = objective.loss(models["moved"], (turn, experience))

    def numbers(tensor: Any) -> Any:
        return tensor.detach().double().numpy()

    r = experience.rollouts
    old, reference, before = map(numbers, (r.logprobs_BR, experience.reference_BR, experience.values_BR))
    said = objective._score(models["moved"], experience)
    now, values = numbers(said.logprobs_BR), numbers(objective.values(said.hidden_ND, r.mask_BR))
    lengths, scores = r.mask_BR.sum(1).tolist(), numbers(experience.rewards_B)
    advantages, returns = [], []
    for row, length in enumerate(lengths):
        rewards = [-0.3 * (old[row, t] - reference[row, t]) for t in range(length)]
        rewards[-1] += scores[row]
        deltas = [rewards[t] + 0.97 * (before[row, t + 1] if t + 1 < length else 0.0) - before[row, t]
                  for t in range(length)]  # fmt: skip
        gae = [sum((0.97 * 0.9) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]
        advantages.append(gae)
        returns.append([a + before[row, t] for t, a in enumerate(gae)])
    flat = np.concatenate(advantages)
    loss, stopped = 0.0, 0
    for row, length in enumerate(lengths):
        for t in range(length):
            a = (advantages[row][t] - flat.mean()) / np.sqrt(flat.var() + 1e-8)
            ratio = np.exp(now[row, t] - old[row, t])
            loss += max(-ratio * a, -np.clip(ratio, 0.8, 1.2) * a)
            stopped += (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)
            near = before[row, t] + np.clip(values[row, t] - before[row, t], -0.05, 0.05)
            loss += 0.7 * 0.5 * max((values[row, t] - returns[row][t]) ** 2, (near - returns[row][t]) ** 2)
    assert count == len(flat) and len(set(lengths)) > 1
    assert total.item() / count == pytest.approx(loss / count, abs=1e-5)
    assert figures["clip_share"] == pytest.approx(stopped / count)
