"""The chat vector: onto + (chat - base), by hand and with lapis, and how much of it is best."""

# %% models
import lapis
from lapis.evaluation.text import score_text
from lapis.tour.atlas.countries import questions, texts
from lapis.tour.atlas.models import models, share_right

folder = models()
asked, pages = questions("en"), texts("ms", 40, seed=9)


def show(name: str, place) -> None:
    model, tokenizer = lapis.load(place)
    right, bits = share_right(model, tokenizer, asked), score_text(model, tokenizer, pages)["bits_per_byte"]
    print(f"{name:9} {right:4.0%} of the questions right, {bits:.2f} bits per byte of Malay")


for name, place in folder.items():
    show(name, place)

# %% by-hand
import torch

base, chat, adapted = (lapis.open(folder[name]) for name in ("base", "chat", "adapted"))
grafted = {}
for name in base.names:
    if name.startswith("model.layers") and "norm" not in name:
        grafted[name] = adapted.read(name) + 1.0 * (chat.read(name) - base.read(name))
    else:
        grafted[name] = adapted.read(name).clone()

tokenizer = lapis.Tokenizer.open(chat)
ids = [tokenizer.id(token) for token in ("<|im_start|>", "<|im_end|>")]
grafted["model.embed_tokens.weight"][ids] = chat.read("model.embed_tokens.weight")[ids]
print(f"{len(grafted)} tensors")

# %% real-graft
import tempfile
from pathlib import Path

work = Path(tempfile.mkdtemp())
result = lapis.graft(base=base, chat=chat, onto=adapted, out=work / "grafted")
written = lapis.open(work / "grafted")
for name in grafted:
    torch.testing.assert_close(written.read(name), grafted[name])
print("the same, tensor by tensor:", result.tensors)

# %% answers
show("grafted", work / "grafted")
before, tokenizer = lapis.load(folder["adapted"])
after, _ = lapis.load(work / "grafted")
print(asked[0].text)
for model in (before, after):
    print("   ", repr(lapis.generate(model, tokenizer, asked[0].messages, lapis.Sampling(max_tokens=16))))

# %% scales
for scale in (0.5, 1.0, 1.5):
    lapis.graft(base=base, chat=chat, onto=adapted, out=work / f"scale-{scale}", scale=scale)
    show(f"scale {scale}", work / f"scale-{scale}")
