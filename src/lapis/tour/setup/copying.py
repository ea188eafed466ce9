"""First weights that can already copy: the two attention heads that let a model repeat what stood in the text before.

Every trained decoder grows them (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al.
2022, arXiv:2209.11895): in one block a head that looks at the token before, and in a later block a head that looks
for the place where the present word stood before, and says what followed it. A small model finds them only after a
million tokens and more, the later the less lucky it is; until then it tells of a black cup where the text has a white
one. Written into the first weights, as in mimetic initialization (Trockman and Kolter 2023, arXiv:2305.09828), they are
there from the first step and are trained like all others. docs/evidence/tour.md has what they give.

Shapes: V vocabulary, D model dim, E head dim, P E x heads that look back.
"""

import math
from typing import cast

import torch
from torch import Tensor

from lapis.errors import ConfigError
from lapis.model.blocks.attention import Attention
from lapis.model.transformer import INIT_STD, Transformer

LOOK_BACK, FOLLOW = 2, 4  # heads of the first block, and of the second
MARGIN = 4.0  # by which the score of the token before is above its neighbours'
MATCH = 4.0  # score of a place that followed the same word
COPY = 3.0  # what the second block writes of a token, in lengths of its embedding
FAST, SLOW = 3 / 8, 5 / 8  # of the pairs of a head: the first tell one place from the next, those behind hardly turn


@torch.no_grad()
def write_copying(model: Transformer) -> None:
    """Writes both kinds of heads into the weights of a model that was just made; all other weights stay.

    Every embedding gets the same value in its first place, which is all that a look at the token before has to know.
    It adds the same to every logit, so it changes no probability.

    Args:
        model: A decoder of at least two blocks with rotary positions and a tied head, in float32.

    Raises:
        ConfigError: For a model without rotary positions, without a second block, or with normed queries and keys.
    """
    config = model.config
    if config.positions != "rotary" or config.layers < 2 or config.qk_norm or not config.tied:
        raise ConfigError(
            "first weights that copy: they need rotary positions, two blocks, a tied head and no q/k norms"
        )
    D, E, half = config.dim, config.head_dim, config.head_dim // 2
    back, follow = min(LOOK_BACK, config.kv_heads), min(FOLLOW, config.kv_heads)
    length = INIT_STD * math.sqrt(D)  # of an embedding
    model.embed.weight[:, 0] = length
    first, second = (cast(Attention, model.blocks[layer].attn) for layer in (0, 1))

    # block 0: q and k read the constant only, turned so that they agree one place apart
    size = math.sqrt(D / 2)  # of the constant, and of the rest, after the norm of block 0
    fast = int(FAST * half)
    turns = config.rope.theta ** (-torch.arange(fast) / half)  # radians from one place to the next
    strength = math.sqrt(MARGIN * math.sqrt(E) / float((1 - turns.cos()).sum())) / size
    read_PD, write_DP = orthogonal(back * E, D), orthogonal(D, back * E)
    read_PD[:, 0] = 0.0
    share = math.sqrt(back * E / D)  # of a vector's length that a random projection keeps
    for head in range(back):
        q_ED, k_ED, v_ED, o_DE = weights(first, head)
        rows = slice(head * E, (head + 1) * E)
        q_ED[:fast, 0], q_ED[half : half + fast, 0] = strength * turns.cos(), -strength * turns.sin()
        k_ED[:fast, 0], k_ED[half : half + fast, 0] = strength, 0.0
        v_ED[:], o_DE[:] = read_PD[rows], write_DP[:, rows] * (length / (size * share))

    # block 1: a query is the present word, a key the word before it; what is found is written as its own embedding
    size = math.sqrt(D / 3)  # of the constant, the word and the word before, after the norm of block 1
    slow = torch.arange(int(SLOW * half), half).repeat(2)
    slow[len(slow) // 2 :] += half
    strength = math.sqrt(MATCH * math.sqrt(E)) / (size * math.sqrt(len(slow) / D))
    words_DD = orthogonal(D, D)
    for head in range(follow):
        q_ED, k_ED, v_ED, o_DE = weights(second, head)
        rows = slice(head * E, (head + 1) * E)
        mix = orthogonal(len(slow), back * E)
        q_ED[slow] += strength * (mix @ read_PD)
        k_ED[slow] += strength * share * (mix @ write_DP.T)
        v_ED[:], o_DE[:] = words_DD[rows], words_DD[rows].T * (COPY * length / size)


def weights(attention: Attention, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one head of keys, and of the first query head that it serves: views of q, k, v [E, D] and of o [D, E]."""
    E = attention.head_dim
    served = attention.q.weight.shape[0] // attention.k.weight.shape[0]
    own, query = slice(head * E, (head + 1) * E), slice(head * served * E, (head * served + 1) * E)
    return attention.q.weight[query], attention.k.weight[own], attention.v.weight[own], attention.o.weight[:, query]


def orthogonal(rows: int, columns: int) -> Tensor:
    """[rows, columns], random: its shorter side's vectors have length 1 and are at right angles."""
    matrix: Tensor = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
    return matrix if rows >= columns else matrix.T
