"""The parameters of GPT-2, BERT and ViT, counted from their parts."""


# %% parts
def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs  # a weight for each pair, and a bias for each output


def norm(width: int) -> int:
    return 2 * width  # a factor and an offset for each number


def block(width: int, inner: int) -> dict[str, int]:
    return {
        "attention: q, k, v, o": 4 * linear(width, width),
        "MLP: up and down": linear(width, inner) + linear(inner, width),
        "two norms": 2 * norm(width),
    }


def show(parts: dict[str, int]) -> int:
    total = sum(parts.values())
    for name, count in parts.items():
        print(f"{name:24} {count:>13,}  {count / total:6.1%}")
    print(f"{'in all':24} {total:>13,}")
    return total


one_block = show(block(768, 3072))

# %% gpt-2
gpt2 = show(
    {
        "50,257 tokens": 50257 * 768,
        "1,024 places": 1024 * 768,
        "12 blocks": 12 * one_block,
        "the last norm": norm(768),
    }
)

# %% bert
bert = show(
    {
        "30,522 tokens": 30522 * 768,
        "512 places": 512 * 768,
        "2 kinds of sentence": 2 * 768,
        "norm of the embedding": norm(768),
        "12 blocks": 12 * one_block,
        "the pooler": linear(768, 768),
    }
)


# %% vit
def vit(width: int, layers: int, inner: int, patch: int, classes: int = 1000) -> dict[str, int]:
    places = (224 // patch) ** 2 + 1  # the patches of a picture, and one place for the class
    return {
        f"patches of {patch} x {patch} x 3": linear(patch * patch * 3, width),
        "the class token": width,
        f"{places} places": places * width,
        f"{layers} blocks": layers * sum(block(width, inner).values()),
        "the last norm": norm(width),
        "1,000 classes": linear(width, classes),
    }


vit_base = show(vit(768, 12, 3072, 16))

# %% sizes
vit_large = sum(vit(1024, 24, 4096, 16).values())
vit_huge = sum(vit(1280, 32, 5120, 14).values())
for name, count in {"B": vit_base, "L": vit_large, "H": vit_huge}.items():
    print(f"ViT-{name} {count:>12,}")

# %% check
from lapis.families import PRESETS, find
from lapis.model.size import measure


def counted(name: str) -> int:
    fields = PRESETS[name]  # the published config.json
    return measure(find(fields).read_config(fields)).total


mine = {
    "gpt2": gpt2,
    "bert-base-uncased": bert,
    "vit-base-patch16-224": vit_base,
    "vit-large-patch16-224": vit_large,
    "vit-huge-patch14-224": vit_huge,
}
for name, count in mine.items():
    print(f"{name:24} {count:>13,}  the same: {count == counted(name)}")

# %% model
import torch

import lapis

with torch.device("meta"):  # shapes without memory
    fields = PRESETS["gpt2"]
    model = lapis.Transformer(find(fields).read_config(fields))
print(f"{sum(p.numel() for p in model.parameters()):,}")
