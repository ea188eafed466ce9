"""The architecture: norms, MLPs, blocks and the whole model by hand, and how a model writes text."""

# %% model
import torch
import torch.nn.functional as F

from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer

torch.manual_seed(0)
config = ModelConfig(
    dim=32, layers=2, heads=4, ffn_dim=128, vocab=600, context=64,
    family="gpt2", norm="layer", mlp="gelu_tanh", positions="learned", bias="all", tied=True,
)  # fmt: skip
model = Transformer(config).eval().requires_grad_(False)
weights = dict(model.named_parameters())
for name, weight in weights.items():
    if "blocks.1" not in name:
        print(f"{name:24} {tuple(weight.shape)}")


# %% norm
def layer_norm(x_TD, name):
    """Mean 0 and spread 1 for the numbers of each token, then a learned factor and shift."""
    centered_TD = x_TD - x_TD.mean(-1, keepdim=True)
    spread_T1 = (centered_TD.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return centered_TD / spread_T1 * weights[name + ".weight"] + weights[name + ".bias"]


x_TD = 5 + 3 * torch.randn(4, 32)
normed_TD = layer_norm(x_TD, "norm.final")
print("before: mean", round(float(x_TD[0].mean()), 1), "spread", round(float(x_TD[0].std()), 1))
print("after:  mean", round(abs(float(normed_TD[0].mean())), 1), "spread", round(float(normed_TD[0].std()), 1))
torch.testing.assert_close(normed_TD, model.norm.final(x_TD))


# %% mlp
def linear(x_TD, name):
    return x_TD @ weights[name + ".weight"].T + weights[name + ".bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def mlp(x_TD, block):
    return linear(gelu(linear(x_TD, block + ".mlp.up")), block + ".mlp.down")


print("gelu of -2 ... 2:", [round(v, 2) for v in gelu(torch.arange(-2.0, 3.0)).tolist()])
torch.testing.assert_close(mlp(x_TD, "blocks.0"), model.blocks[0].mlp(x_TD))


# %% attention
def attention(x_TD, block):
    T = len(x_TD)
    q, k, v = (linear(x_TD, f"{block}.attn.{m}").view(T, config.heads, -1).transpose(0, 1) for m in "qkv")
    scores_HTT = q @ k.transpose(1, 2) / config.head_dim**0.5
    later_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    mixed_HTE = torch.softmax(scores_HTT.masked_fill(later_TT, -torch.inf), -1) @ v
    return linear(mixed_HTE.transpose(0, 1).reshape(T, -1), block + ".attn.o")


# %% whole
def gpt2(ids_T):
    """Logits for the token after each token, [T, V]."""
    x_TD = weights["embed.weight"][ids_T] + weights["embed.position.weight"][: len(ids_T)]
    for i in range(config.layers):
        block = f"blocks.{i}"
        x_TD = x_TD + attention(layer_norm(x_TD, block + ".norm.attn"), block)
        x_TD = x_TD + mlp(layer_norm(x_TD, block + ".norm.mlp"), block)
    return layer_norm(x_TD, "norm.final") @ weights["embed.weight"].T


ids_T = torch.randint(config.vocab, (10,))
logits_TV = gpt2(ids_T)
torch.testing.assert_close(logits_TV, model(ids_T[None])[0])
print("logits", tuple(logits_TV.shape), "equal to the model of lapis")

# %% untrained
loss = F.cross_entropy(logits_TV[:-1], ids_T[1:])
print(
    f"loss {loss:.2f}; guessing among {config.vocab} tokens costs ln {config.vocab} = {torch.tensor(600.0).log():.2f}"
)

# %% count
D, V, C, inner = config.dim, config.vocab, config.context, config.ffn_dim
attention_parameters = 4 * (D * D + D)
mlp_parameters = D * inner + inner + inner * D + D
block_parameters = attention_parameters + mlp_parameters + 2 * 2 * D
total = V * D + C * D + config.layers * block_parameters + 2 * D
print(f"{total:,} by hand, {sum(weight.numel() for weight in model.parameters()):,} in the model")


# %% modern
def rms_norm(x_TD, weight_D):
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight_D


def swiglu(x_TD, gate, up, down):
    return (F.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T


llama = Transformer(ModelConfig(dim=32, layers=1, heads=4, ffn_dim=96, vocab=600, context=64)).requires_grad_(False)
block = llama.blocks[0]
torch.testing.assert_close(rms_norm(x_TD, block.norm.mlp.weight), block.norm.mlp(x_TD))
by_hand_TD = swiglu(x_TD, block.mlp.gate.weight, block.mlp.up.weight, block.mlp.down.weight)
torch.testing.assert_close(by_hand_TD, block.mlp(x_TD))
print("RMSNorm and SwiGLU are equal to the modules of lapis")


# %% greedy
def write(ids, count):
    """The likeliest token, again and again."""
    ids = list(ids)
    for _ in range(count):
        logits_V = gpt2(torch.tensor(ids))[-1]
        ids.append(int(logits_V.argmax()))
    return ids


start = [5, 17, 300]
print(write(start, 8)[3:])

# %% generate
from lapis import Sampling
from lapis.generation.generate import generate_batch
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.tour.world import World

tokenizer = train_tokenizer(list(World().documents("en", 400, seed=1)), vocab=600)
(reply,) = generate_batch(model, tokenizer, [start], Sampling(max_tokens=8))
print(list(reply.ids))
assert list(reply.ids) == write(start, 8)[3:]
print(repr(reply.text))

# %% cache
from lapis.model.cache import Cache

cache = Cache(config, batch=1)
first_TV = model(ids_T[None, :6], cache=cache)[0]
rest_TV = torch.cat([model(ids_T[None, i : i + 1], cache=cache)[0] for i in range(6, 10)])
torch.testing.assert_close(torch.cat((first_TV, rest_TV)), logits_TV)
print("one token at a time with a cache gives the same logits;", cache.length, "tokens are remembered")

# %% sampling
from lapis.generation.sampling import filtered

words = ["rice", "noodles", "soup", "bread", "stones"]
logits_BV = torch.tensor([[3.0, 2.5, 1.5, 0.5, -2.0]])
print(" " * 26 + "".join(f"{word:>9}" for word in words))
for settings in (
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(temperature=1.0, top_k=2),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.05),
):
    shares = torch.softmax(filtered(logits_BV, settings), -1)[0].tolist()
    name = f"temperature {settings.temperature} "
    name += f"top_k {settings.top_k}" if settings.top_k else f"top_p {settings.top_p}" if settings.top_p < 1 else ""
    name += f"min_p {settings.min_p}" if settings.min_p else ""
    print(f"{name:26}" + "".join(f"{share:9.3f}" for share in shares))
