"""Merging by formula and by recipe."""

# %% formula
import tempfile
from pathlib import Path

import torch

import lapis
from lapis.evaluation.text import score_text
from lapis.tour.atlas.countries import questions, texts
from lapis.tour.atlas.models import models, share_right

work, folder = Path(tempfile.mkdtemp()), models()
base, chat, adapted = (folder[name] for name in ("base", "chat", "adapted"))
result = lapis.merge(f"{adapted} + 1.0*({chat} - {base})", out=work / "formula")
name = "model.layers.0.self_attn.q_proj.weight"
a, b, c = (lapis.open(place).read(name) for place in (adapted, chat, base))
torch.testing.assert_close(lapis.open(work / "formula").read(name), a + (b - c))
print(result.tensors)

# %% recipes
RECIPES = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": str(chat), "parameters": {"weight": 0.5}},
            {"model": str(adapted), "parameters": {"weight": 0.5}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": str(chat),
        "models": [{"model": str(adapted)}],
        "parameters": {"t": 0.5},
    },
    "task arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(chat), "parameters": {"weight": 1.0}},
            {"model": str(adapted), "parameters": {"weight": 1.0}},
        ],
    },
    "ties": {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [
            {"model": str(chat), "parameters": {"weight": 1.0, "density": 0.5}},
            {"model": str(adapted), "parameters": {"weight": 1.0, "density": 0.5}},
        ],
    },
}
pages = texts("ms", 60, seed=9)


def row(name: str, place) -> None:
    model, tokenizer = lapis.load(place)
    right, bits = share_right(model, tokenizer, questions("en")), score_text(model, tokenizer, pages)["bits_per_byte"]
    print(f"{name:16} {right:>16.0%} {bits:>18.2f}")


print(f"{'':16} {'questions right':>16} {'Malay, bits/byte':>18}")
for name, place in {"chat": chat, "adapted": adapted, "formula": work / "formula"}.items():
    row(name, place)
for name, recipe in RECIPES.items():
    lapis.merge(recipe, out=work / name)
    row(name, work / name)
