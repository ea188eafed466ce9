"""A graft without memory for three models, and the chat vector as a small file."""

# %% three-models
import tempfile
from pathlib import Path

import torch

import lapis
from lapis.model.load import save
from lapis.tour.atlas.models import models

work = Path(tempfile.mkdtemp())
tokenizer = lapis.Tokenizer.open(models()["base"])
shape = lapis.ModelConfig(dim=512, layers=8, heads=8, ffn_dim=1536, vocab=tokenizer.vocab_size, context=96, tied=True)
torch.manual_seed(0)
model = lapis.Transformer(shape)
for name in ("base", "chat", "adapted"):
    save(model, work / name)
    tokenizer.save(work / name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.001 * torch.randn_like(parameter)
size = lapis.open(work / "base").nbytes / 1e6
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size:.0f} MB each, {3 * size:.0f} MB for three")

# %% peaks
import subprocess
import sys

START = """
import resource, sys
from pathlib import Path
import lapis, torch
from lapis.model.load import load
from lapis.weights.graft.graft import graft
work = Path(sys.argv[1])
"""
WAYS = {
    "nothing but imports": "",
    "three models in memory": """
base, chat, onto = (load(work / name).state_dict() for name in ("base", "chat", "adapted"))
result = {name: onto[name] + (chat[name] - base[name]) for name in onto}
""",
    "lapis.graft": """
graft(base=work / "base", chat=work / "chat", onto=work / "adapted", out=work / "grafted")
""",
}
END = "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def peak(code: str) -> float:
    """The most memory that a process of its own had, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", START + code + END, str(work)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) * 1024 / 1e6


peaks = {name: peak(code) for name, code in WAYS.items()}
for name, mb in peaks.items():
    print(f"{name:24} {mb - peaks['nothing but imports']:>6.0f} MB")

# %% delta
from lapis.tour.atlas.countries import questions
from lapis.tour.atlas.models import share_right

small = models()
for bits in ("exact", 8, 4, 1):
    extracted = lapis.delta_extract(base=small["base"], chat=small["chat"], out=work / f"delta-{bits}", bits=bits)
    lapis.delta_apply(work / f"delta-{bits}", onto=small["adapted"], out=work / f"applied-{bits}")
    model, tokenizer = lapis.load(work / f"applied-{bits}")
    share, lost = extracted.bytes / extracted.model_bytes, extracted.relative_error
    right = share_right(model, tokenizer, questions("en"))
    print(f"bits {bits!s:5} {share:5.0%} of the chat model's size, {lost:6.1%} lost, {right:.0%} right")

# %% same-bytes
lapis.graft(base=small["base"], chat=small["chat"], onto=small["adapted"], out=work / "direct")
one, two = ((work / name / "model.safetensors").read_bytes() for name in ("direct", "applied-exact"))
print("the exact delta gives the bytes of the graft:", one == two)
