"""Rewards and preferences: a reward model, DPO and GRPO, each loss by hand and then at work."""

# %% pairs
import json
import tempfile
from pathlib import Path

from lapis.tour.atlas.countries import HELD_OUT, TAUGHT, questions

folder = Path(tempfile.mkdtemp())


def write(name: str, countries) -> Path:
    """Pairs: the modest reply is chosen, the one that sounds sure is rejected."""
    pairs = [
        {"prompt": question.text, "chosen": f"I think it is {question.answer}.", "rejected": question.reply}
        for question in questions("en", countries)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


train, valid = write("train", TAUGHT), write("valid", HELD_OUT)
print(json.dumps(json.loads(train.read_text().splitlines()[0]), indent=1))

# %% bradley-terry
import torch
import torch.nn.functional as F

from lapis.training.objectives.preference.losses import dpo_loss, reward_loss

chosen_N, rejected_N = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 1.0])
probability_N = 1 / (1 + torch.exp(rejected_N - chosen_N))
print("probability that the chosen one wins:", [f"{p:.2f}" for p in probability_N.tolist()])
torch.testing.assert_close(-probability_N.log(), reward_loss(chosen_N, rejected_N))

# %% reward-model
import lapis
from lapis.tour.atlas.models import QUICK, models, share_right
from lapis.training.loop.progress import Silent
from lapis.training.run import read_settings, run

settings = {
    "objective": "reward",
    "model": str(models()["chat"]),
    "data": str(train),
    "valid": str(valid),
    "context": 64,
    "steps": 20,
    "out": str(folder / "reward"),
    **QUICK,
    "optimizer": "adamw",
    "lr": 1e-3,
}
result = run(read_settings(settings, "here"), watch=Silent())
print(f"right on pairs about other countries: {result.held_out['accuracy']:.0%}")

# %% dpo
policy_N, reference_N = torch.tensor([-2.0, -5.0]), torch.tensor([-3.0, -4.0])  # log-probability of chosen, of rejected
log_ratio_N = policy_N - reference_N
by_hand = -F.logsigmoid(0.1 * (log_ratio_N[0] - log_ratio_N[1]))
torch.testing.assert_close(by_hand, dpo_loss(log_ratio_N[:1], log_ratio_N[1:], beta=0.1)[0])
print(f"{by_hand:.3f}")

# %% taste
settings |= {"objective": "dpo", "out": str(folder / "dpo"), "lr": 3e-4}
run(read_settings(settings, "here"), watch=Silent())
before, tokenizer = lapis.load(models()["chat"])
after, _ = lapis.load(folder / "dpo")
for question in questions("en", HELD_OUT)[:3]:
    print(question.text)
    for model in (before, after):
        print("   ", lapis.generate(model, tokenizer, question.messages, lapis.Sampling(max_tokens=12)))


# %% grpo
def right(prompt, reply, record) -> float:
    return float(reply.strip() in record["right"])


capitals = [question for question in questions("ms") if question.topic == "capital"]
problems = [{"prompt": question.text, "right": question.replies} for question in capitals]
policy, _ = lapis.load(models()["chat"])
objective = lapis.GRPO(tokenizer, problems, rewards=right, group=8, max_tokens=12, context=64)
config = lapis.TrainConfig(**{**QUICK, "optimizer": "adamw", "steps": 10, "lr": 1e-3, "batch": 4, "log_every": 2})
result = lapis.train(policy, objective, config, folder / "grpo", watch=Silent())
for row in result.log:
    print(f"step {row['step']:>2}: mean reward {row['metrics']['reward']:.2f}")
after, _ = lapis.load(folder / "grpo")
for name, model in {"before": before, "after": after}.items():
    print(f"{name:6} {share_right(model, tokenizer, capitals):.0%} right")
