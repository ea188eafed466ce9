"""Attention, step by step: a weighted sum, queries and keys, a causal mask, heads, and the real module."""

# %% sequence
import torch

torch.manual_seed(0)
words = ["the", "cat", "sat", "on", "the", "mat"]
T, D = len(words), 8
vectors = {word: torch.randn(D) for word in sorted(set(words))}
x_TD = torch.stack([vectors[word] for word in words])
print(tuple(x_TD.shape))

# %% one-word
scores_T = x_TD @ x_TD[1]
weights_T = torch.softmax(scores_T, 0)
mixed_D = sum(weight * vector for weight, vector in zip(weights_T, x_TD))
for word, score, weight in zip(words, scores_T, weights_T):
    print(f"{word:4} score {score:6.2f}   weight {weight:.3f}")

# %% all-words
weights_TT = torch.softmax(x_TD @ x_TD.T, -1)
mixed_TD = weights_TT @ x_TD
torch.testing.assert_close(mixed_TD[1], mixed_D)
print("weights", tuple(weights_TT.shape), "result", tuple(mixed_TD.shape))

# %% linear
f_TD = x_TD @ x_TD.T @ x_TD
print("X", tuple(x_TD.shape), "f(X)", tuple(f_TD.shape), "rank", int(torch.linalg.matrix_rank(f_TD)))
for m, n in ((3, 8), (6, 8), (20, 8)):
    X = torch.randn(m, n)
    print(f"{m} tokens, {n} numbers each: the rank of f(X) is {int(torch.linalg.matrix_rank(X @ X.T @ X))}")

# %% order
shuffled = torch.tensor([5, 0, 3, 1, 4, 2])
again_TD = torch.softmax(x_TD[shuffled] @ x_TD[shuffled].T, -1) @ x_TD[shuffled]
print("the same results in another order:", torch.allclose(again_TD, mixed_TD[shuffled]))

# %% projections
w_q, w_k, w_v = (torch.randn(D, D) / D**0.5 for _ in range(3))
q_TD, k_TD, v_TD = x_TD @ w_q, x_TD @ w_k, x_TD @ w_v
scores_TT = q_TD @ k_TD.T
print("cat asks sat:", round(float(scores_TT[1, 2]), 2), "  sat asks cat:", round(float(scores_TT[2, 1]), 2))

# %% scale
print("width   spread of the scores   largest weight of 16   the same, scaled")
for E in (4, 64, 1024):
    scores = torch.randn(2000, 1, E) @ torch.randn(2000, E, 16)
    plain, scaled = (torch.softmax(s, -1).amax(-1).mean() for s in (scores, scores / E**0.5))
    print(f"{E:5}{scores.std():18.1f}{plain:22.2f}{scaled:22.2f}")

# %% causal
later_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
masked_TT = (scores_TT / D**0.5).masked_fill(later_TT, -torch.inf)
weights_TT = torch.softmax(masked_TT, -1)
for word, row in zip(words, weights_TT):
    print(f"{word:4}", "  ".join(f"{weight:.2f}" for weight in row))

# %% future
changed_TD = x_TD.clone()
changed_TD[5] = torch.randn(D)


def causal_attention(x_TD):
    scores_TT = (x_TD @ w_q) @ (x_TD @ w_k).T / D**0.5
    return torch.softmax(scores_TT.masked_fill(later_TT, -torch.inf), -1) @ (x_TD @ w_v)


difference_T = (causal_attention(changed_TD) - causal_attention(x_TD)).abs().amax(-1)
print([round(float(difference), 2) for difference in difference_T])

# %% heads
H, E = 2, 4
q_HTE, k_HTE, v_HTE = (m_TD.view(T, H, E).transpose(0, 1) for m_TD in (q_TD, k_TD, v_TD))
scores_HTT = (q_HTE @ k_HTE.transpose(1, 2) / E**0.5).masked_fill(later_TT, -torch.inf)
mixed_HTE = torch.softmax(scores_HTT, -1) @ v_HTE
w_o = torch.randn(D, D) / D**0.5
out_TD = mixed_HTE.transpose(0, 1).reshape(T, D) @ w_o
print("by head", tuple(mixed_HTE.shape), "together", tuple(out_TD.shape))

# %% real
from lapis.families.config import ModelConfig
from lapis.model.blocks.attention import Attention, Shared, View

config = ModelConfig(dim=D, layers=1, heads=H, ffn_dim=16, vocab=10, context=16, positions="none")
attention = Attention(config, layer=0)
with torch.no_grad():
    for linear, weight in zip((attention.q, attention.k, attention.v, attention.o), (w_q, w_k, w_v, w_o)):
        linear.weight.copy_(weight.T)  # a linear layer keeps its matrix transposed
    view = View(mask=None, causal=True)
    real_TD = attention(x_TD[None], Shared(view, view), None)[0]
torch.testing.assert_close(real_TD, out_TD)
print("equal to the module of lapis")

# %% groups
config = ModelConfig(dim=D, layers=1, heads=4, kv_heads=2, ffn_dim=16, vocab=10, context=16, positions="none")
grouped = Attention(config, layer=0)
with torch.no_grad():
    q_THE, k_TKE, v_TKE = (m[0] for m in grouped.project(x_TD[None]))
    k_THE, v_THE = (m.repeat_interleave(2, 1) for m in (k_TKE, v_TKE))
    scores_HTT = torch.einsum("the,she->hts", q_THE, k_THE) / 2**0.5
    weights_HTT = torch.softmax(scores_HTT.masked_fill(later_TT, -torch.inf), -1)
    by_hand_TD = grouped.o(torch.einsum("hts,she->the", weights_HTT, v_THE).reshape(T, D))
    torch.testing.assert_close(grouped(x_TD[None], Shared(view, view), None)[0], by_hand_TD)
print("queries", tuple(q_THE.shape), "keys and values", tuple(k_TKE.shape))

# %% map
from lapis.report import plots

maps = [{"head": f"head {head}", "weights": weights.tolist()} for head, weights in enumerate(weights_HTT)]
plots.attention_map(maps, words, "Four heads: each word reads itself and what stands before it")
