"""Instructions: the chat template, the loss mask and the loss by hand, and a base that learns to answer."""

# %% base-answers
import lapis
from lapis.tour.atlas.countries import HELD_OUT, TAUGHT, chats, questions
from lapis.tour.atlas.models import QUICK, models, share_right

base, tokenizer = lapis.load(models()["base"])
for prompt in ("What is the capital of Malaysia?", "Question: What is the capital of Malaysia? Answer:"):
    print(f"{prompt} -> {lapis.generate(base, tokenizer, prompt, lapis.Sampling(max_tokens=12))!r}")

# %% template
from lapis.text.chat.chat import render

chat = chats("en", 1, seed=5)[0]["messages"]
print(render(tokenizer, chat))

# %% mask
ids = tokenizer.encode(render(tokenizer, chat), special=True)
end = tokenizer.id("<|im_end|>")
head = tokenizer.encode("<|im_start|>assistant\n", special=True)

learned = [False] * len(ids)
inside = False
for place in range(len(ids)):
    if ids[place - len(head) : place] == head:
        inside = True
    learned[place] = inside
    if ids[place] == end:
        inside = False

print("".join(f"[{tokenizer.text(id)}]" if yes else tokenizer.text(id) for id, yes in zip(ids, learned)))

# %% the-same
from lapis.text.chat.chat import encode_chat

real_ids, real_mask = encode_chat(tokenizer, chat)
print("ids:", real_ids == ids, " mask:", list(real_mask) == learned)

# %% loss
import torch

from lapis.evaluation.chats import score_chats


def reply_loss(model) -> float:
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids]))[0]
    log_probabilities = logits_TV.log_softmax(dim=-1)
    losses = [-log_probabilities[t - 1, ids[t]].item() for t in range(1, len(ids)) if learned[t]]
    return sum(losses) / len(losses)


by_lapis = score_chats(base, tokenizer, [chat], replies=[None])["response_nll"]
print(f"by hand {reply_loss(base):.3f}, by lapis {by_lapis:.3f} nats per token")

# %% tune
import json
import tempfile
from pathlib import Path

from lapis.training.loop.progress import Silent

work = Path(tempfile.mkdtemp())
data = work / "chats.jsonl"
data.write_text("".join(json.dumps(record) + "\n" for record in chats("en", 400, seed=3)))
tuned, _ = lapis.load(models()["base"])
objective = lapis.Chat(tokenizer, data, context=96)
config = lapis.TrainConfig(**{**QUICK, "optimizer": "adamw", "steps": 40, "lr": 1e-3})
result = lapis.train(tuned, objective, config, work / "chat", watch=Silent())
for row in result.log:
    print(f"step {row['step']:>2}: {row['loss']:.2f} nats per token of the replies")

# %% answers
tuned, tokenizer = lapis.load(work / "chat")
for question in questions("en", HELD_OUT)[:3]:
    print(question.text, "->", lapis.generate(tuned, tokenizer, question.messages))

# %% table
print(f"{'':6} {'asked in chats':>16} {'held out':>10} {'in Malay':>10}")
for name, model in {"base": base, "tuned": tuned}.items():
    lists = questions("en", TAUGHT), questions("en", HELD_OUT), questions("ms")
    taught, held_out, malay = (share_right(model, tokenizer, each) for each in lists)
    print(f"{name:6} {taught:>16.0%} {held_out:>10.0%} {malay:>10.0%}")
