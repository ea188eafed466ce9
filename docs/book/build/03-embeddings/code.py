"""Embeddings: rows of a matrix for tokens and for positions, arithmetic with words, and rotary positions."""

# %% lookup
import torch
import torch.nn.functional as F

torch.manual_seed(0)
V, D = 6, 4
table_VD = torch.randn(V, D)
ids_T = torch.tensor([2, 5, 2])
looked_up_TD = table_VD[ids_T]
multiplied_TD = F.one_hot(ids_T, V).float() @ table_VD
print(F.one_hot(ids_T, V))
torch.testing.assert_close(looked_up_TD, multiplied_TD)
print("looking up = multiplying by rows with a single 1")

# %% sentences
import random
from collections import Counter

people = {  # word -> (he or she, where, what)
    "king": ("he", "palace", "office"), "queen": ("she", "palace", "office"),
    "prince": ("he", "palace", "school"), "princess": ("she", "palace", "school"),
    "man": ("he", "village", "office"), "woman": ("she", "village", "office"),
    "boy": ("he", "village", "school"), "girl": ("she", "village", "school"),
}  # fmt: skip
endings = {
    "he": ["he shaves his beard", "they call him sir", "he ties his bow"],
    "she": ["she braids her hair", "they call her lady", "she lifts her skirt"],
    "palace": ["wears a golden crown", "sits on the throne", "lives in the castle", "waves to the crowd"],
    "village": ["rides an old bicycle", "sells eggs at the market", "lives in a hut", "waits for the bus"],
    "office": ["works until late", "pays the bills", "reads the newspaper", "drinks coffee"],
    "school": ["plays with a ball", "learns to count", "climbs a tree", "drinks milk"],
}
rng = random.Random(0)
sentences = []
for _ in range(3000):
    word = rng.choice(list(people))
    middle, end = rng.sample([rng.choice(endings[trait]) for trait in people[word]], 2)
    sentences.append(f"the {word} {middle} and {end}".split())
for sentence in sentences[:3]:
    print(" ".join(sentence))

# %% neighbors
vocabulary = sorted({word for sentence in sentences for word in sentence})
index = {word: i for i, word in enumerate(vocabulary)}
pairs = Counter(
    (word, other)
    for sentence in sentences
    for i, word in enumerate(sentence)
    for other in sentence[max(0, i - 5) : i] + sentence[i + 1 : i + 6]
)
counts_VV = torch.tensor([[float(pairs[word, other]) for other in vocabulary] for word in vocabulary])
print(len(vocabulary), "words; near king:", {other: pairs["king", other] for other in ("crown", "his", "her")})

# %% train
vectors_VD = torch.nn.Parameter(0.1 * torch.randn(len(vocabulary), 12))
outputs_VD = torch.nn.Parameter(0.1 * torch.randn(len(vocabulary), 12))
optimizer = torch.optim.Adam([vectors_VD, outputs_VD], lr=0.03)
for step in range(401):
    loss = -(counts_VV * F.log_softmax(vectors_VD @ outputs_VD.T, -1)).sum() / counts_VV.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3}: loss {loss.item():.2f}")

# %% analogies
unit_VD = F.normalize(vectors_VD.detach() - vectors_VD.detach().mean(0), dim=-1)


def nearest(a, b, c, count=2):
    """The words whose vectors point most where a - b + c points, without the three themselves."""
    goal_D = F.normalize(unit_VD[index[a]] - unit_VD[index[b]] + unit_VD[index[c]], dim=0)
    ranked = (unit_VD @ goal_D).argsort(descending=True).tolist()
    return [vocabulary[i] for i in ranked if vocabulary[i] not in (a, b, c)][:count]


for question in ("king man woman", "prince boy girl", "queen princess girl", "man king prince"):
    a, b, c = question.split()
    print(f"{a} - {b} + {c} = {', '.join(nearest(a, b, c))}")


# %% all-analogies
def partner(word, trait):
    """The word that differs in this trait only."""
    return next(w for w in people if all((people[w][i] == people[word][i]) != (i == trait) for i in range(3)))


questions = [
    (a, partner(a, trait), partner(partner(a, trait), other), partner(a, other))
    for a in people
    for trait in range(3)
    for other in range(3)
    if trait != other
]
right = sum(nearest(a, b, c)[0] == answer for a, b, c, answer in questions)
print(right, "of", len(questions), "analogies right")
goal_D = unit_VD[index["king"]] - unit_VD[index["man"]] + unit_VD[index["woman"]]
print("king - man + woman, nothing left out:", [vocabulary[i] for i in (unit_VD @ goal_D).argsort(descending=True)[:2]])

# %% picture
import plotly.graph_objects as go

from lapis.report import theme

points = unit_VD[[index[word] for word in people]]
_, _, axes = torch.linalg.svd(points - points.mean(0))
flat = (points - points.mean(0)) @ axes[:2].T
figure = theme.new_figure("Steps between words are alike: king to queen as man to woman", legend=False, max_width=640)
x, y = flat.T.tolist()
figure.add_trace(go.Scatter(x=x, y=y, text=list(people), mode="markers+text", textposition="top center"))
figure

# %% positions
context = 8
positions_CD = torch.randn(context, D)
x_TD = table_VD[ids_T] + positions_CD[:3]
print("token 2 at place 0:", [round(v, 2) for v in x_TD[0].tolist()])
print("token 2 at place 2:", [round(v, 2) for v in x_TD[2].tolist()])

# %% real
from lapis.families.config import ModelConfig
from lapis.model.transformer import Embed

config = ModelConfig(dim=D, layers=1, heads=1, ffn_dim=4, vocab=V, context=context, positions="learned")
embed = Embed(config)
with torch.no_grad():
    embed.weight.copy_(table_VD)
    embed.position.weight.copy_(positions_CD)
    torch.testing.assert_close(embed(ids_T[None], torch.arange(3), None)[0], x_TD)
print("equal to the embedding of lapis")

# %% rotary
E = 8
speeds_P = 10_000.0 ** (-torch.arange(0, E, 2) / E)
print("radians per place:", [round(speed, 4) for speed in speeds_P.tolist()])


def turn(x_TE, places_T):
    """Each pair of numbers, as a point in the plane, turned by an angle that grows with the place."""
    angles_TP = places_T[:, None] * speeds_P
    a_TP, b_TP = x_TE.chunk(2, -1)
    cos, sin = angles_TP.cos(), angles_TP.sin()
    return torch.cat((a_TP * cos - b_TP * sin, b_TP * cos + a_TP * sin), -1)


q_E, k_E = torch.randn(E), torch.randn(E)
for place, other in ((3, 1), (5, 3), (102, 100), (5, 1)):
    q, k = turn(torch.stack((q_E, k_E)), torch.tensor([place, other]))
    print(f"query at {place:3}, key at {other:3}: score {q @ k:.3f}")

# %% real-rotary
from lapis.model.blocks.rope import rope_tables, rotate

config = ModelConfig(dim=E, layers=1, heads=1, ffn_dim=4, vocab=V, context=context)
places_T = torch.arange(5)
x_TE = torch.randn(5, E)
tables = rope_tables(config.rope, config, places_T, torch.float32, 5)
torch.testing.assert_close(rotate(x_TE[None, :, None], tables)[0, :, 0], turn(x_TE, places_T))
print("equal to the rotary positions of lapis")
