"""A fully connected layer, a convolution and attention: what they cost, and what reaches what."""

# %% numbers
tokens, features = 512, 768
numbers = tokens * features
print(f"a text as numbers: {numbers:,}")
print(f"fully connected: {numbers * numbers:,} weights")
print(f"that is {numbers * numbers / 124_439_808:,.0f} times GPT-2, for one layer")

# %% layers
import torch
from torch import nn

torch.manual_seed(0)
T, D = 8, 6  # eight tokens of six features


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(T * D, T * D)

    def forward(self, x_TD):
        return self.linear(x_TD.flatten()).view(T, D)


class Convolution(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(D, D, width, padding=width // 2)

    def forward(self, x_TD):
        return self.conv(x_TD.T).T


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x_TD):
        scores_TT = self.q(x_TD) @ self.k(x_TD).T / D**0.5
        return self.o(scores_TT.softmax(dim=-1) @ self.v(x_TD))


layers = {
    "fully connected": Everything(),
    "per token (1x1)": Convolution(1),
    "convolution of 3": Convolution(3),
    "attention": Attention(),
}
for name, layer in layers.items():
    print(f"{name:17} {sum(p.numel() for p in layer.parameters()):>6,} parameters")


# %% reach
@torch.no_grad()
def reached(layer: nn.Module, at: int = 3) -> str:
    x_TD = torch.randn(T, D)
    changed_TD = x_TD.clone()
    changed_TD[at, 0] += 1  # one number of one token
    moved_T = (layer(changed_TD) - layer(x_TD)).abs().sum(dim=1) > 1e-7
    return "".join("#" if moved else "." for moved in moved_T.tolist())


for name, layer in layers.items():
    print(f"{name:17} {reached(layer)}")

# %% stacked
for depth in (1, 2, 3):
    print(f"{depth} convolutions of 3: {reached(nn.Sequential(*(Convolution(3) for _ in range(depth))))}")

# %% order
x_TD, order = torch.randn(T, D), torch.randperm(T)
with torch.no_grad():
    for name, layer in layers.items():
        same = torch.allclose(layer(x_TD[order]), layer(x_TD)[order], atol=1e-6)
        print(f"{name:17} {'the same rows, in the new order' if same else 'something else'}")

# %% longer
with torch.no_grad():
    for name, layer in layers.items():
        try:
            print(f"{name:17} reads 16 tokens, and gives {tuple(layer(torch.randn(16, D)).shape)}")
        except RuntimeError:
            print(f"{name:17} cannot read 16 tokens")

# %% real-sizes
from lapis.model.size import mixers

for mixer in mixers(512, 768):
    print(f"{mixer.name:16} {mixer.parameters:>15,} parameters {mixer.flops / 1e9:>6.1f} GFLOPs  mixes {mixer.mixes}")

small = {mixer.name: mixer.parameters for mixer in mixers(T, D)}
print("as counted above:", all(sum(p.numel() for p in layers[name].parameters()) == small[name] for name in small))
