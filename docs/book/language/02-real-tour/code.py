"""The tour on a real model: what `lapis tour --real` does, run on tiny models in place of public ones."""

# %% models
import json
import shutil
import tempfile
from pathlib import Path

import lapis
from lapis.tour.atlas.models import models

work = Path(tempfile.mkdtemp())
for name in ("base", "chat"):
    shutil.copytree(models()[name], work / name)
    file = work / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 256}))
model, tokenizer = lapis.load(work / "base")
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size} tokens")

# %% data
from lapis.tour.atlas.countries import chats, texts


def write(name: str, records: list[dict]) -> None:
    path = work / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


for code in ("en", "ms"):
    write(f"corpus/{code}/train.jsonl", [{"text": text} for text in texts(code, 600, seed=4)])
    write(f"corpus/{code}/valid.jsonl", [{"text": text} for text in texts(code, 100, seed=5)])
    write(f"instruct/{code}.valid.jsonl", chats(code, 80, seed=5))
write("instruct/en.jsonl", chats("en", 400, seed=4))
print("\n".join(sorted(path.relative_to(work / "data").as_posix() for path in work.glob("data/**/*.jsonl"))))

# %% tour
from lapis.tour.real.run import RealTour, real_tour

places = {"model": str(work / "base"), "chat": str(work / "chat"), "data": work / "data", "out": work / "run"}
result = real_tour(RealTour(**places, language="ms", tokens=30_000, precision="float32"))
for name, place in result["models"].items():
    print(f"{name:8} {result['tokens'].get(name, 0):6,} tokens learned, in {Path(place).relative_to(work).as_posix()}")

# %% sweep
for row in result["sweep"]:
    gap, bits = row["gap_closed"], row["bits_per_byte"]
    print(f"scale {row['scale']:<5}  gap closed {gap:.1f}, Malay {bits:.2f} bits per byte")
print("chosen:", result["scale"])

# %% graft
import torch

base, chat, adapted, grafted = (lapis.open(result["models"][name]) for name in ("base", "chat", "adapted", "grafted"))
name = "model.layers.3.mlp.down_proj.weight"
by_hand = adapted.read(name) + result["scale"] * (chat.read(name) - base.read(name))
torch.testing.assert_close(grafted.read(name), by_hand)
print("the same by hand:", name)

# %% scores
for code in ("en", "ms"):
    print(f"{result['names'][code]:10} bits per byte  response NLL  stop rate")
    for name, part in result["scores"].items():
        bits, nll, stop = (part[code][key] for key in ("bits_per_byte", "response_nll", "stop_rate"))
        print(f"  {name:8} {bits:13.2f}  {nll:12.1f} {stop:10.0%}")

# %% gap
for code, gap in result["gap_closed"].items():
    print(f"{code}: gap closed {gap:.1f}")
print(f"cost in Malay text: {result['cost']:+.0%}")
print("page:", Path(result["report"]).name)

# %% replies
for code in ("en", "ms"):
    shown = next(row for row in result["replies"] if row["language"] == code)
    print(shown["prompt"])
    for name, reply in shown["replies"].items():
        print(f"  {name:9} {reply.partition(chr(10))[0]}")
