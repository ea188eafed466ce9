"""Rewards and preferences: a reward model, DPO and GRPO, each loss by hand and then at work."""

# %% pairs
import random

from lapis.tour.atlas.countries import HELD_OUT, TAUGHT, questions

rng = random.Random(0)


def pairs(countries) -> list[dict]:
    """A right and a wrong answer to every question, several times."""
    records = []
    for question in questions("en", countries) * 4:
        others = [other.answer for other in questions("en") if other.topic == question.topic]
        wrong = rng.choice([answer for answer in others if answer != question.answer])
        rejected = question.reply.removesuffix(f"{question.answer}.") + f"{wrong}."
        records.append({"prompt": question.text, "chosen": question.reply, "rejected": rejected})
    return records


print(pairs(TAUGHT)[0])

# %% bradley-terry
import torch
import torch.nn.functional as F

from lapis.training.objectives.preference.losses import dpo_loss, reward_loss

chosen_N, rejected_N = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 1.0])
probability_N = 1 / (1 + torch.exp(rejected_N - chosen_N))
print("probability that the chosen one wins:", [f"{p:.2f}" for p in probability_N.tolist()])
torch.testing.assert_close(-probability_N.log(), reward_loss(chosen_N, rejected_N))

# %% reward-model
import json
import tempfile
from pathlib import Path

import lapis
from lapis.tour.atlas.models import QUICK, models
from lapis.training.loop.progress import Silent
from lapis.training.run import read_settings, run

folder = Path(tempfile.mkdtemp())
for name, countries in {"train": TAUGHT, "valid": HELD_OUT}.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(countries)))
settings = {
    "objective": "reward",
    "model": str(models()["chat"]),
    "data": str(folder / "train.jsonl"),
    "valid": str(folder / "valid.jsonl"),
    "context": 64,
    "steps": 25,
    "out": str(folder / "reward"),
    **QUICK,
    "optimizer": "adamw",
    "lr": 2e-3,
}
result = run(read_settings(settings, "here"), watch=Silent())
print(f"right on pairs about held-out countries: {result.held_out['accuracy']:.0%}")

# %% dpo
policy_N, reference_N = torch.tensor([-2.0, -5.0]), torch.tensor([-3.0, -4.0])  # log-probability of chosen, of rejected
log_ratio_N = policy_N - reference_N
by_hand = -F.logsigmoid(0.1 * (log_ratio_N[0] - log_ratio_N[1]))
torch.testing.assert_close(by_hand, dpo_loss(log_ratio_N[:1], log_ratio_N[1:], beta=0.1)[0])
print(f"{by_hand:.3f}")

# %% taste
tastes = [
    {"prompt": question.text, "chosen": question.replies[1], "rejected": question.reply}
    for question in questions("en", TAUGHT)
]
(folder / "taste.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in tastes))
settings = {
    **settings,
    "objective": "dpo",
    "data": str(folder / "taste.jsonl"),
    "valid": None,
    "steps": 20,
    "out": str(folder / "dpo"),
    "lr": 1e-3,
}
run(read_settings(settings, "here"), watch=Silent())
before, tokenizer = lapis.load(models()["chat"])
after, _ = lapis.load(folder / "dpo")
for question in questions("en", HELD_OUT)[:3]:
    print(question.text)
    for model in (before, after):
        print("   ", lapis.generate(model, tokenizer, question.messages, lapis.Sampling(max_tokens=16)))

# %% grpo
from lapis.tour.atlas.models import share_right


def right(prompt, reply, record) -> float:
    return float(reply.strip() in record["right"])


malay = questions("ms")
problems = [{"prompt": question.text, "right": question.replies} for question in malay]
policy, _ = lapis.load(models()["chat"])
objective = lapis.GRPO(tokenizer, problems, rewards=right, group=4, max_tokens=16, context=64)
config = lapis.TrainConfig(**{**QUICK, "optimizer": "adamw", "steps": 8, "lr": 5e-4, "log_every": 2})
result = lapis.train(policy, objective, config, folder / "grpo", watch=Silent())
for row in result.log:
    print(f"step {row['step']:>2}: mean reward {row['metrics']['reward']:.2f}")
after, _ = lapis.load(folder / "grpo")
for name, model in {"before": before, "after": after}.items():
    print(f"{name:6} {share_right(model, tokenizer, malay):.0%} right in Malay")
