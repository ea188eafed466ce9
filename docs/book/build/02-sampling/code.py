"""Windows and stride: how a long text becomes the rows that a model learns from."""

# %% ids
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.tour.world import World

texts = list(World().documents("en", 400, seed=1))
tokenizer = train_tokenizer(texts, vocab=600)
ids = tokenizer.encode(texts[0])
print(len(ids), "tokens:", ids[:12], "...")

# %% pairs
for n in range(1, 9):
    print(f"{tokenizer.decode(ids[:n])!r} -> {tokenizer.text(ids[n])!r}")

# %% windows
import torch


def windows(ids, length, stride):
    """Inputs and targets, both [number of windows, length]; a target is the token one place further on."""
    firsts = range(0, len(ids) - length, stride)
    inputs = torch.tensor([ids[first : first + length] for first in firsts])
    targets = torch.tensor([ids[first + 1 : first + 1 + length] for first in firsts])
    return inputs, targets


inputs, targets = windows(ids, length=8, stride=8)
print(inputs[:2])
print(targets[:2])

# %% strides
print("stride   windows   how often a token in the middle is a target")
for stride in (1, 2, 4, 8, 16):
    inputs, targets = windows(list(range(200)), length=8, stride=stride)
    print(f"{stride:6}{len(inputs):10}{int((targets == 100).sum()):10}")

# %% rows
from pathlib import Path

from lapis.text.corpus.corpus import Document
from lapis.text.rows.packing import pack

documents = [Document(text, Path("stories"), line) for line, text in enumerate(texts, 1)]
rows = pack(documents, tokenizer, length=16)
batch = rows.take([2, 3, 4])
print(len(rows), "rows of 16, without a gap between them")
print("row 3:    ", [tokenizer.text(i) for i in batch.ids_BT[1]])
print("document: ", batch.segments_BT[1].tolist())
print("position: ", batch.positions_BT[1].tolist())

# %% equal
story = " ".join(texts[:20])
stream = [tokenizer.eos_id, *tokenizer.encode(story)]
inputs, targets = windows(stream, length=64, stride=64)
packed = pack([Document(story, Path("story"), 1)], tokenizer, length=64).take(list(range(len(inputs))))
torch.testing.assert_close(packed.ids_BT, inputs)
torch.testing.assert_close(packed.targets_BT, targets)
print(len(inputs), "windows are equal to the rows of lapis")

# %% order
generator = torch.Generator().manual_seed(0)
print("epoch 1:", torch.randperm(len(rows), generator=generator)[:8].tolist())
print("epoch 2:", torch.randperm(len(rows), generator=generator)[:8].tolist())

cursor = rows.start(seed=0)
numbers, cursor = rows.indices(cursor, 4)
print("lapis: ", numbers.tolist(), "then", cursor)

# %% scored
from lapis.evaluation.text import windows_of

for window in windows_of(list(range(21)), context=8):
    print("reads", window.ids, "scores", [place for place, scored in zip(window.ids, window.scored) if scored])
