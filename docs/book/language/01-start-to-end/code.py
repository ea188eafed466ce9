"""A language of your own: what it costs, more tokens, training, a graft, the card."""

# %% two-languages
import json
import tempfile
from pathlib import Path

import lapis
from lapis.tour.atlas.countries import texts
from lapis.tour.atlas.models import QUICK, models
from lapis.tour.world import World

work, folder = Path(tempfile.mkdtemp()), models()


def write(name: str, documents: list[str]) -> Path:
    path = work / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return path


ukrainian = write("uk", list(World(people=20).documents("uk", 400, seed=1, kinds={"portrait": 1.0})))
english = write("en", texts("en", 400, seed=7))
print(json.loads(ukrainian.read_text().splitlines()[0])["text"][:110])

# %% fertility
measured = lapis.fertility(folder["base"], [ukrainian], replay=[english], run=False)
for name, figures in measured.languages.items():
    print(f"{name:7} {figures['tokens_per_byte']:.2f} tokens per byte, {figures['tokens_per_word']:.1f} per word")
for row in measured.curve:
    print(f"{row['added']:>5} tokens more: {row['tokens_per_byte']:.2f} tokens per byte")
print(f"recommended: {measured.recommendation['add']:,} more; {measured.recommendation['reason']}")

# %% adapt
talks = write("chats", [])
talks.write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in World(people=20).chats("uk", 16, seed=3)))
plan = {
    "base": str(folder["base"]),
    "chat": str(folder["chat"]),
    "text": [str(ukrainian)],
    "replay": [str(english)],
    "chats": [str(talks)],
    "language": "uk",
    "vocab": 300,
    "tokens": 24_000,
    "embedded": 0.25,
    "replay_share": 0.3,
    "lr": 2e-3,
    "rows_lr": 1e-2,
    "cost": 0.5,
    "context": 96,
    "batch": 8,
    "scored": 2_000,
    "train": {**{key: value for key, value in QUICK.items() if key != "batch"}, "optimizer": "adamw"},
    "out": str(work / "ukrainian"),
}
result = lapis.adapt(plan)
print("steps:", ", ".join(result["steps"]))

# %% scores
for step, scores in result["scores"].items():
    target, replay = (scores[side]["bits_per_byte"]["value"] for side in ("target", "replay"))
    tokens = scores["target"]["tokens_per_byte"]["value"]
    print(f"{step:9} Ukrainian {target:5.2f} bits per byte, {tokens:.2f} tokens per byte; English {replay:5.2f}")

# %% writes
for step in ("base", "adapted"):
    model, tokenizer = lapis.load(folder["base"] if step == "base" else result["steps"]["adapted"])
    text = lapis.generate(model, tokenizer, "Вона живе", lapis.Sampling(max_tokens=24))
    print(f"{step:8} Вона живе{text}")

# %% chats
from lapis.tour.atlas.countries import HELD_OUT, questions
from lapis.tour.atlas.models import share_right

model, tokenizer = lapis.load(result["steps"]["grafted"])
print(f"English questions: {share_right(model, tokenizer, questions('en')):.0%} right")
print(questions("en", HELD_OUT)[0].text, "->", lapis.generate(model, tokenizer, questions("en", HELD_OUT)[0].messages))

# %% card
card = Path(result["steps"]["card"])
print(sorted(path.name for path in card.iterdir()))
print("\n".join((card / "README.md").read_text().splitlines()[:12]))
