"""A graft between models whose tokens have other numbers, or more of them."""

# %% new-words
import random
import tempfile
from pathlib import Path

import lapis
from lapis.tour.atlas.countries import questions
from lapis.tour.atlas.models import models, share_right

work, folder = Path(tempfile.mkdtemp()), models()
rng = random.Random(0)
fruits = ["durian", "manggis", "rambutan", "langsat", "cempedak", "belimbing"]
places = ["pasar malam", "kampung nelayan", "kedai runcit", "kebun datuk"]
lines = [f"Nenek membeli {rng.choice(fruits)} di {rng.choice(places)} pada waktu petang." for _ in range(300)]
(work / "market.txt").write_text("\n\n".join(lines))

extended = lapis.extend(folder["adapted"], [work / "market.txt"], work / "extended", add=40)
print("rows of the embedding:", extended.rows)
print("new tokens:", ", ".join(repr(token) for token in extended.examples[:6]))

# %% fewer-pieces
old, new = lapis.Tokenizer.open(folder["adapted"]), lapis.Tokenizer.open(work / "extended")
for tokenizer in (old, new):
    pieces = [tokenizer.text(id) for id in tokenizer.encode(lines[0])]
    print(f"{len(pieces)} tokens: {'|'.join(pieces)}")

# %% graft
result = lapis.graft(base=folder["base"], chat=folder["chat"], onto=work / "extended", out=work / "grafted")
for note in result.notes:
    print(note)
model, tokenizer = lapis.load(work / "grafted")
print(f"{share_right(model, tokenizer, questions('en')):.0%} right")

# %% other-numbers
import json
import shutil

from safetensors.torch import load_file, save_file

shutil.copytree(folder["adapted"], work / "shuffled", ignore=shutil.ignore_patterns("lapis-manifest.json"))
tokenizer_file, weights_file = work / "shuffled" / "tokenizer.json", work / "shuffled" / "model.safetensors"
description = json.loads(tokenizer_file.read_text())
rows = old.rows
number = list(range(rows))
rng.shuffle(number)  # old number -> new number

vocabulary = description["model"]["vocab"]
description["model"]["vocab"] = {token: number[id] for token, id in vocabulary.items()}
for token in description["added_tokens"]:
    token["id"] = number[token["id"]]
tokenizer_file.write_text(json.dumps(description))
tensors = load_file(weights_file)
embedding = tensors["model.embed_tokens.weight"]
tensors["model.embed_tokens.weight"] = embedding[[number.index(row) for row in range(rows)]].clone()
save_file(tensors, weights_file, {"format": "pt"})

shuffled, tokenizer = lapis.load(work / "shuffled")
for token in ("<|im_start|>", "<|im_end|>", "ĠMalaysia"):
    print(f"{token:14} was {old.id(token):>3}, is {tokenizer.id(token):>3}")
print(lapis.generate(shuffled, tokenizer, "Ibu negara Malaysia ialah", lapis.Sampling(max_tokens=3)))

# %% by-number
from lapis.model.load import load

chat = load(folder["chat"])
naive = load(work / "shuffled")
base = load(folder["base"])
import torch

with torch.no_grad():
    for name, parameter in naive.named_parameters():
        if "norm" not in name and name != "embed.weight":
            parameter += chat.get_parameter(name) - base.get_parameter(name)
    ids = [old.id("<|im_start|>"), old.id("<|im_end|>")]
    naive.embed.weight[ids] = chat.embed.weight[ids]  # the numbers of chat, which mean other tokens here
print(f"rows by number: {share_right(naive, tokenizer, questions('en')):.0%} right")

# %% by-token
lapis.graft(base=folder["base"], chat=folder["chat"], onto=work / "shuffled", out=work / "by-token")
model, tokenizer = lapis.load(work / "by-token")
print(f"rows by token:  {share_right(model, tokenizer, questions('en')):.0%} right")
