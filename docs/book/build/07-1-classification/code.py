"""Classification: a linear layer on a base model's last state, and the whole model tuned with it."""

# %% sentences
from lapis.tour.atlas.countries import COUNTRIES, FACTS, HELD_OUT, TAUGHT


def sentences(language: str, countries) -> list[tuple[str, str]]:
    """(text, label) for every country, every topic, and both ways to say it."""
    return [
        (form.format(**country.facts(language)), topic)
        for country in countries
        for topic, forms in FACTS[language].items()
        for form in forms
    ]


train, others, malay = sentences("en", TAUGHT), sentences("en", HELD_OUT), sentences("ms", COUNTRIES)
for name, examples in {"train": train, "other countries": others, "Malay": malay}.items():
    print(f"{name:16} {len(examples):>3} sentences, such as: {examples[0][0]} -> {examples[0][1]}")

# %% features
import torch
import torch.nn.functional as F

import lapis
from lapis.tour.atlas.models import QUICK, models

base, tokenizer = lapis.load(models()["base"])
topics = list(FACTS["en"])


@torch.no_grad()
def features(model, examples):
    rows = [model.hidden(torch.tensor([tokenizer.encode(text)]))[0, -1] for text, _ in examples]
    return torch.stack(rows), torch.tensor([topics.index(label) for _, label in examples])


x_ND, y_N = features(base, train)
print(tuple(x_ND.shape), "->", len(topics), "classes")


# %% linear
def fit(x_ND, y_N, steps=200):
    torch.manual_seed(0)
    linear = torch.nn.Linear(x_ND.shape[1], len(topics))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(linear(x_ND), y_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return linear


def accuracy(linear, model, examples):
    x_ND, y_N = features(model, examples)
    return (linear(x_ND).argmax(dim=1) == y_N).float().mean().item()


torch.manual_seed(1)
untrained = lapis.Transformer(base.config).eval()
for name, model in {"untrained": untrained, "base": base}.items():
    linear = fit(*features(model, train))
    scores = [accuracy(linear, model, examples) for examples in (train, others, malay)]
    print(f"{name:10} train {scores[0]:4.0%}, other countries {scores[1]:4.0%}, Malay {scores[2]:4.0%}")

# %% real-objective
import tempfile
from pathlib import Path

from lapis.training.loop.progress import Silent
from lapis.training.run import read_settings, run

folder = Path(tempfile.mkdtemp())
for name, examples in {"train": train, "others": others, "malay": malay}.items():
    (folder / f"{name}.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in examples))
settings = {
    "objective": "classify",
    "model": str(models()["base"]),
    "data": str(folder / "train.tsv"),
    "valid": str(folder / "others.tsv"),
    "context": 32,
    "steps": 30,
    "out": str(folder / "classifier"),
    **QUICK,
    "optimizer": "adamw",
    "lr": 1e-3,
}
result = run(read_settings(settings, "here"), watch=Silent())
print(f"accuracy on other countries: {result.held_out['accuracy']:.0%}")

# %% classify
from lapis.evaluation.classification import classify

model, tokenizer = lapis.load(folder / "classifier")
for text in (
    "Hanoi is the capital of Vietnam.",
    "People in Japan like to eat ramen.",
    "Orang di Laos bertutur bahasa Lao.",
):
    prediction = classify(model, tokenizer, [text])[0]
    print(f"{prediction.label:9} {text}")
predictions = classify(model, tokenizer, [text for text, _ in malay])
right = sum(prediction.label == label for prediction, (_, label) in zip(predictions, malay))
print(f"Malay: {right / len(malay):.0%} right")
