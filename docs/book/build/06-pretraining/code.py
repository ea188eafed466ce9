"""Pre-training: a loop by hand, a run with train and held-out curves, a folder, and public weights."""

# %% data
from pathlib import Path

import torch

from lapis.text.corpus.corpus import Document
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.tour.world import World

texts = list(World().documents("en", 1000, seed=1))
unseen = list(World().documents("en", 12, seed=2))
tokenizer = train_tokenizer(texts, vocab=600)


def rows_of(texts):
    documents = [Document(text, Path("stories"), line) for line, text in enumerate(texts, 1)]
    return pack(documents, tokenizer, length=64)


rows = rows_of(texts)
print(len(texts), "stories are", len(rows), "rows of 64 tokens;", len(unseen), "other stories are held out")

# %% model
from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer


def new_model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(
        dim=64, layers=2, heads=4, ffn_dim=256, vocab=tokenizer.rows, context=64,
        family="gpt2", norm="layer", mlp="gelu_tanh", positions="learned", bias="all", tied=True,
    ))  # fmt: skip


model = new_model()
print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")

# %% loop
import torch.nn.functional as F

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
cursor = rows.start(seed=0)
for step in range(31):
    batch, cursor = rows.batch(cursor, 8)
    logits_BTV = model(batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.1f}")

# %% train
import tempfile

import lapis

place = Path(tempfile.mkdtemp())


def train(rows, name, steps):
    model = new_model()
    learned = lapis.Causal(tokenizer=tokenizer, data=rows, context=64, valid=rows_of(unseen))
    config = lapis.TrainConfig(
        steps=steps, batch=8, optimizer="muon", lr=0.01, warmup=10, eval_every=10, log_every=2,
        precision="float32", threads=1, compile="off", sample_every=0,
    )  # fmt: skip
    lapis.train(model, learned, config, place / name)
    return model.eval()


model = train(rows, "many", steps=90)
print(sorted(file.name for file in (place / "many").iterdir()))

# %% curves
import json

from lapis.report import plots


def curves(name):
    """What a run noted in its log.jsonl: the loss of what it learned from, and of the stories that it never saw."""
    entries = [json.loads(line) for line in (place / name / "log.jsonl").read_text().splitlines()]
    learned = [{"run": name, "step": entry["step"], "loss": entry["loss"]} for entry in entries]
    held_out = [
        {"run": name, "split": "held-out", "step": entry["step"], "loss": entry["held_out"]["valid_loss"]}
        for entry in entries
        if "held_out" in entry
    ]
    return learned, held_out


learned, held_out = curves("many")
print("train loss at the end:    ", round(learned[-1]["loss"], 1))
print("held-out loss at the end: ", round(held_out[-1]["loss"], 1))
plots.learning_curves(learned + held_out, "Both curves fall: what is learned is true of other stories too", x="step")

# %% by-heart
train(rows_of(texts[:6]), "six", steps=30)
few, few_held_out = curves("six")
print("train loss at the end:    ", round(few[-1]["loss"], 1))
print("held-out loss, by steps:  ", {row["step"]: round(row["loss"], 1) for row in few_held_out})
plots.learning_curves(few + few_held_out, "Six stories are learned by heart: the curves part", x="step")

# %% write
for name, writer in (("before", new_model().eval()), ("after", model)):
    text = lapis.generate(writer, tokenizer, "The children were at", lapis.Sampling(max_tokens=20))
    print(f"{name + ':':8} The children were at{text}")

# %% folder
from safetensors.torch import load_file

tensors = load_file(place / "many" / "model.safetensors")
for name, tensor in tensors.items():
    if ".h.1." not in name:
        print(f"{name:40} {tuple(tensor.shape)}")

# %% names
attention = model.blocks[0].attn
joined = torch.cat((attention.q.weight, attention.k.weight, attention.v.weight))
torch.testing.assert_close(tensors["transformer.h.0.attn.c_attn.weight"].T, joined)
print("c_attn holds queries, keys and values, side by side and transposed")

# %% load
again, its_tokenizer = lapis.load(place / "many")
ids_BT = torch.tensor([its_tokenizer.encode("The teacher asked the children.")])
torch.testing.assert_close(again(ids_BT), model(ids_BT))
print("the folder gives the same model;", lapis.open(place / "many").family.name)

# %% public
from lapis.families import PRESETS, find
from lapis.model.size import measure

for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
    size = measure(find(PRESETS[name]).read_config(PRESETS[name]))
    print(f"{name:12} {size.config.layers:2} layers of width {size.config.dim:4}: {size.total:13,} parameters")
