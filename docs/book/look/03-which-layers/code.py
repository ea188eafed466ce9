"""Which layers to tune or to merge: each layer's difference put in, and a plan with its control."""

# %% put-in

import lapis
from lapis.evaluation.chats import score_chats
from lapis.evaluation.text import score_text
from lapis.tour.atlas.countries import chats, texts
from lapis.tour.atlas.models import models

folder = models()
model, tokenizer = lapis.load(folder["base"])
chat, _ = lapis.load(folder["chat"])
talks = [record["messages"] for record in chats("en", 20, seed=9)]
pages = texts("en", 20, seed=9)


def measure() -> tuple[float, float]:
    """How unlikely replies are, and how hard plain text is."""
    replies = score_chats(model, tokenizer, talks, replies=[None] * len(talks))["response_nll"]
    return replies, score_text(model, tokenizer, pages)["bits_per_byte"]


start_replies, start_text = measure()
print(f"base: replies {start_replies:.2f} nats per token, text {start_text:.3f} bits per byte")
for number, block in enumerate(model.blocks):
    own = {name: value.clone() for name, value in block.state_dict().items()}
    block.load_state_dict(chat.blocks[number].state_dict())
    replies, text = measure()
    print(f"with chat's layer {number}: replies {replies - start_replies:+.2f}, text {text - start_text:+.3f}")
    block.load_state_dict(own)

# %% plan
import json
import tempfile
from pathlib import Path

work = Path(tempfile.mkdtemp())
(work / "text.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
(work / "chats.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
material = {"chats": work / "chats.jsonl", "text": work / "text.jsonl", "limit": 8, "replies": False}
plan = lapis.plan(folder["base"], folder["chat"], goal="style", budget=0.25, draws=3, sweeps="in", **material)
for line in plan.finding().replace(". ", ".\n").splitlines():
    print(line)

# %% pieces
measured = [row for row in plan.pieces if row.get("style") is not None]
for row in sorted(measured, key=lambda row: -row["style"])[:10]:
    mark = "chosen" if row["chosen"] else ""
    print(f"{row['layer']!s:14} style {row['style']:6.1%}, text {row['knowledge']:+6.1%} harder  {mark}")


# %% use-it
plan.save(work / "plan.yaml")
lines = (work / "plan.yaml").read_text().splitlines()
print("\n".join(lines[lines.index("tune:") :][:12]))
