"""The logit lens: what every layer would say, and how the ranks of three countries move."""

# %% prompt
import torch

import lapis
from lapis.tour.atlas.models import models

model, tokenizer = lapis.load(models()["base"])
prompt = "Kuala Lumpur is the capital of"
ids_BT = torch.tensor([tokenizer.encode(prompt)])
print("|".join(tokenizer.text(id) for id in ids_BT[0].tolist()))
print("->", lapis.generate(model, tokenizer, prompt, lapis.Sampling(max_tokens=1)))

# %% by-hand
countries = ["Malaysia", "Indonesia", "Myanmar"]
tokens = [tokenizer.encode(f" {name}")[0] for name in countries]

with torch.no_grad():
    x_BTD, shared = model.start(ids_BT)
    states = {"embedding": x_BTD}
    for number, block in enumerate(model.blocks):
        x_BTD = block(x_BTD, shared, None)
        states[f"layer {number}"] = x_BTD

    ranks = {}
    for name, x_BTD in states.items():
        logits_V = model.head(model.norm.final(x_BTD))[0, -1]
        best = tokenizer.text(logits_V.argmax().item())
        ranks[name] = [int((logits_V > logits_V[token]).sum()) + 1 for token in tokens]
        print(f"{name:10} would say {best!r:14}", "  ".join(f"{c}: {r:>3}" for c, r in zip(countries, ranks[name])))

# %% real-lens
trace = lapis.lens(model, tokenizer, prompt, track=countries)
assert [list(reading.ranks.values()) for reading in trace.layers] == list(ranks.values())[1:]
print(trace.finding())
print(trace.ranks_finding())

# %% figure
trace.plot()

# %% who-wrote-it
rows = trace.contribution_rows("Malaysia")
for row in sorted(rows, key=lambda row: -row["logit"])[:5]:
    print(f"{row['label']:24} {row['logit']:+.1f}")
print(f"{'all parts together':24} {sum(row['logit'] for row in rows):+.1f}")

# %% every-country
from lapis.tour.atlas.countries import COUNTRIES

decided = []
for country in COUNTRIES:
    trace = lapis.lens(model, tokenizer, f"{country.capital} is the capital of", track=[country.name])
    decided.append(trace.decided)
    print(f"{country.name:10} rank after each layer: {[reading.ranks[country.name] for reading in trace.layers]}")
