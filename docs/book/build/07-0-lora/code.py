"""LoRA: a detour beside a matrix by hand, an adapter that learns to answer, and one model again."""

# %% by-hand
import torch
from torch import nn

torch.manual_seed(0)
inputs, outputs, rank = 64, 64, 4
alpha = 8.0

linear = nn.Linear(inputs, outputs, bias=False)
A_RI = torch.randn(rank, inputs) / inputs**0.5
B_OR = torch.randn(outputs, rank)

x_BI = torch.randn(3, inputs)
y_BO = linear(x_BI) + alpha / rank * (x_BI @ A_RI.T) @ B_OR.T

print(f"the weight: {inputs * outputs:,} numbers; A and B: {A_RI.numel() + B_OR.numel():,}")

# %% real-module
from lapis.model.lora import LoraLinear

module = LoraLinear(linear, nn.Parameter(A_RI), nn.Parameter(B_OR), scale=alpha / rank)
torch.testing.assert_close(module(x_BI), y_BO)
print("LoraLinear gives the same")

# %% folded
added_OI = alpha / rank * B_OR @ A_RI
torch.testing.assert_close(x_BI @ (linear.weight + added_OI).T, y_BO)
print(f"what is added is {tuple(added_OI.shape)}, and its rank is {torch.linalg.matrix_rank(added_OI)}")

# %% model
import json
import tempfile
from pathlib import Path

import lapis
from lapis.tour.atlas.countries import HELD_OUT, TAUGHT, chats, questions
from lapis.tour.atlas.models import QUICK, models, share_right
from lapis.training.loop.progress import Silent
from lapis.training.run import read_settings, run

base = models()["base"]
folder = Path(tempfile.mkdtemp())
data = folder / "chats.jsonl"
data.write_text("".join(json.dumps(chat) + "\n" for chat in chats("en", 400, seed=2)))
print(data.read_text().splitlines()[0])

# %% train
settings = {
    "objective": "chat",
    "model": str(base),
    "data": str(data),
    "context": 96,
    "steps": 40,
    "lora": {"rank": 8, "tokens": ["<|im_start|>", "<|im_end|>"]},
    "out": str(folder / "adapter"),
    **QUICK,
    "lr": 1e-2,
    "optimizer": "adamw",
}
result = run(read_settings(settings, "here"), watch=Silent())
for step in (10, 20, 30, 40):
    print(f"step {step}: loss {next(row['loss'] for row in result.log if row['step'] == step):.1f}")

# %% size
adapted, tokenizer = lapis.load(folder / "adapter")
trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
frozen = sum(p.numel() for p in adapted.parameters()) - trained
print(f"trained {trained:,}, frozen {frozen:,}")
for name in sorted(path.name for path in (folder / "adapter").iterdir() if path.name.startswith("adapter")):
    print(name)

# %% answers
for name, countries in {"asked about in the chats": TAUGHT, "held out": HELD_OUT}.items():
    print(f"{name:25} {share_right(adapted, tokenizer, questions('en', countries)):.0%} right")
print(lapis.generate(adapted, tokenizer, questions("en", HELD_OUT)[0].messages))

# %% fuse
from lapis.weights.fuse.fuse import fuse

fuse(folder / "adapter", folder / "fused")
fused, _ = lapis.load(folder / "fused")
ids_BT = torch.tensor([tokenizer.encode("The capital of Malaysia is")])
with torch.no_grad():
    torch.testing.assert_close(fused(ids_BT), adapted(ids_BT), rtol=1e-4, atol=1e-4)
print(f"the fused model has {sum(p.numel() for p in fused.parameters()):,} parameters, as the base has")
