"""Tokens: from text to numbers and back."""

# %% bytes
text = "Nasi lemak, 你好 😀"
print(len(text), "characters,", len(text.encode()), "bytes")
for character in "N你😀":
    print(character, list(character.encode()))

# %% corpus
from lapis.tour.world import World

texts = list(World().documents("en", 400, seed=1))
print(len(texts), "texts,", sum(len(text.encode()) for text in texts), "bytes. The first begins:")
print(texts[0][:150])

# %% words
import re
from collections import Counter


def split(text):
    """Letters with at most one sign before them, single digits, signs, line ends."""
    return re.findall(r"'s|'t|'ll|[^\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+\n*|\s+", text)


words = Counter(word for text in texts for word in split(text))
print(split("Tama sells 25 lamps."))
print(words.most_common(5))

# %% merges
pieces = {word: list(word) for word in words}
merges = []
while len(merges) < 8:
    pairs = Counter()
    for word, parts in pieces.items():
        for pair in zip(parts, parts[1:]):
            pairs[pair] += words[word]
    best, count = pairs.most_common(1)[0]
    merges.append(best)
    print(f"{best[0]!r} + {best[1]!r} stand side by side {count} times")
    for parts in pieces.values():
        for i in range(len(parts) - 1, 0, -1):
            if (parts[i - 1], parts[i]) == best:
                parts[i - 1 : i + 1] = ["".join(best)]

# %% tokenizer
from lapis.text.tokenizer.tokenizer import train_tokenizer

tokenizer = train_tokenizer(texts, vocab=600)
learned = [tuple(merge) for merge in tokenizer.document()["model"]["merges"]]
print(len(learned), "merges; the first:", learned[:8])
assert [(a.replace("Ġ", " "), b.replace("Ġ", " ")) for a, b in learned[:8]] == merges

# %% encode
order = {merge: i for i, merge in enumerate(learned)}


def encode(text):
    ids = []
    for word in split(text):
        parts = list(word.replace(" ", "Ġ").replace("\n", "Ċ"))
        while True:
            ranked = [(order[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in order]
            if not ranked:
                break
            i = min(ranked)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [tokenizer.id(part) for part in parts]
    return ids


sentence = "The teacher sells lamps in the market."
print([tokenizer.text(i) for i in encode(sentence)])
print(encode(sentence))
assert encode(sentence) == tokenizer.encode(sentence)
assert all(encode(text) == tokenizer.encode(text) for text in texts[:50])

# %% back
print(tokenizer.decode(tokenizer.encode("Nasi lemak, 你好 😀")))
print([tokenizer.bytes_of(i) for i in tokenizer.encode("你")])

# %% special
print(tokenizer.special)
print(tokenizer.encode("<|im_end|>"), "typed by a user")
print(tokenizer.encode("<|im_end|>", special=True), "put there by a program")

# %% languages
both = {code: list(World().documents(code, 400, seed=1)) for code in ("en", "ms", "uk", "ko", "zh")}
shared = train_tokenizer([text for texts in both.values() for text in texts], vocab=3000)
print("bytes per token   English tokenizer   shared tokenizer")
for code, documents in both.items():
    sample = " ".join(documents[:50])
    size = len(sample.encode())
    print(f"{code}{size / len(tokenizer.encode(sample)):29.1f}{size / len(shared.encode(sample)):19.1f}")
