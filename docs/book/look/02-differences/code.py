"""What a fine-tune changed: direction and magnitude, rows of tokens, and two differences compared."""

# %% one-matrix
import lapis
from lapis.tour.atlas.models import models

folder = models()
base, chat = lapis.open(folder["base"]), lapis.open(folder["chat"])
name = "model.layers.1.mlp.down_proj.weight"
a, b = (checkpoint.read(name).double() for checkpoint in (base, chat))

magnitude = ((b - a).norm() / a.norm()).item()
cosine = ((a * b).sum() / (a.norm() * b.norm())).item()
print(f"{name}: magnitude {magnitude:.1%}, cosine {cosine:.4f}")

# %% whole-model
table = lapis.diff(base, chat, rows=True)
line = next(row for row in table.tensors if row["name"] == name)
assert abs(line["relative_norm"] - magnitude) < 1e-6 and abs(line["cosine"] - cosine) < 1e-6
print(table)
print(table.finding())

# %% figure
table.plot()

# %% components
for group in sorted(table.by("component"), key=lambda group: -group["relative_norm"])[:6]:
    print(f"{group['component']:10} {group['relative_norm']:6.1%}")

# %% rows
for name, rows in {"chat": table, "adapted": lapis.diff(base, folder["adapted"], rows=True)}.items():
    most = rows.moved(1000)
    print(f"{name:8} {len(most):>3} of {len(rows.rows)} rows moved; most:", ", ".join(row["token"] for row in most[:6]))

# %% template-rows
import torch

from lapis.tour.atlas.countries import TAUGHT, questions
from lapis.tour.atlas.models import share_right

model, tokenizer = lapis.load(folder["chat"])
first, _ = lapis.load(folder["base"])
ids = [tokenizer.id(token) for token in ("<|im_start|>", "<|im_end|>")]
print(f"chat: {share_right(model, tokenizer, questions('en', TAUGHT)):.0%} right")
with torch.no_grad():
    model.embed.weight[ids] = first.embed.weight[ids]
print(f"with base's rows for two tokens: {share_right(model, tokenizer, questions('en', TAUGHT)):.0%} right")
print(repr(lapis.generate(model, tokenizer, questions("en", TAUGHT)[0].messages, lapis.Sampling(max_tokens=30))))


# %% directions
def difference(one: str, other: str) -> torch.Tensor:
    a, b = lapis.open(folder[one]), lapis.open(folder[other])
    return torch.cat([(b.read(name) - a.read(name)).flatten() for name in a.names if "layers" in name])


def cosine_of(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x @ y / (x.norm() * y.norm())).item()


chat_vector, again = difference("base", "chat"), difference("adapted", "tuned")
moved = difference("base", "adapted")
print(f"chat - base and tuned - adapted: {cosine_of(chat_vector, again):.2f}")
print(f"chat - base and adapted - base:  {cosine_of(chat_vector, moved):.2f}")
