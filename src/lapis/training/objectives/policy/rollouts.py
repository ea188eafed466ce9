"""Replies of the policy to prompts, as tensors to learn from; and what the model in training says of their tokens.

A prompt goes through the model once, and its cache is copied for each of its replies. A reply's mask ends with its end
token, so that nothing after it is ever learned from. Replies are sampled from the policy itself, without top-k or
top-p, so that what is sampled is what is optimized.

Shapes: P prompts, B replies (each prompt's stand together), T prompt and reply, R reply, D model dim, V vocabulary, N
real tokens of replies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lapis.generation.generate import Decoding
from lapis.generation.options import Sampling
from lapis.model.cache import Cache
from lapis.model.transformer import Transformer


@dataclass(frozen=True)
class Rollouts:
    """Replies to prompts.

    Attributes:
        ids_BT: int64, prompt then reply, 0 after that.
        prompt_B: int64, lengths of the prompts.
        reply_BR: int64, the reply alone, with its end token.
        mask_BR: bool, True where there is a token.
        logprobs_BR: float32, nats, of the tokens when they were sampled, at the temperature of sampling.
        ended_B: bool, whether the model ended the reply.
    """

    ids_BT: Tensor
    prompt_B: Tensor
    reply_BR: Tensor
    mask_BR: Tensor
    logprobs_BR: Tensor
    ended_B: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class ReplyScores:
    """What the model in training says of the tokens of replies, float32, 0 outside the mask.

    Attributes:
        logprobs_BR: Nats.
        entropy_BR: Nats.
        hidden_ND: The states from which the tokens are predicted, in the order of the mask.
    """

    logprobs_BR: Tensor
    entropy_BR: Tensor
    hidden_ND: Tensor


def sample_rollouts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    ends: Sequence[int],
    *,
    group: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Rollouts:
    """`group` replies to each prompt.

    Args:
        model: In evaluating mode.
        prompts: Ids of each.
        numbers: Of the prompts within the step. A reply depends on the seed, its prompt's number and its place in the
            group, and on no other reply.
        ends: The tokens that end a reply.
        group: Replies to a prompt.
        max_tokens: Of a reply.
        temperature: Of sampling; 0 takes the likeliest token.
        seed: Of sampling.
        progress: Called with the tokens that each reply has by then.
    """
    rows = [number * group + copy for number in numbers for copy in range(group)]
    repeated = [list(prompt) for prompt in prompts for _ in range(group)]
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)
    decoding = Decoding(model, repeated, sampling, rows, cache=_prompt_cache(model, prompts, group, max_tokens))
    replies: list[list[int]] = [[] for _ in rows]
    chances: list[list[float]] = [[] for _ in rows]
    live, stop = list(range(len(rows))), frozenset(ends)
    for count in range(1, max_tokens + 1):
        tokens, logprobs = decoding.step(), decoding.logprobs(temperature or 1.0)
        going = []
        for place, (row, token, logprob) in enumerate(zip(live, tokens, logprobs, strict=True)):
            if replies[row] and replies[row][-1] in stop:
                continue  # carried along: dropping rows copies the cache
            replies[row].append(token)
            chances[row].append(logprob)
            if token not in stop:
                going.append(place)
        progress(count)
        if not going or count == max_tokens:
            break
        if len(going) <= len(live) * 3 // 4:
            decoding.keep(going)
            live = [live[place] for place in going]
    return _as_tensors(repeated, replies, chances, stop, model.embed.weight.device)


@torch.inference_mode()
def _prompt_cache(model: Transformer, prompts: Sequence[Sequence[int]], group: int, max_tokens: int) -> Cache | None:
    """A cache of the prompts without their last tokens, for `group` copies of each; None where that would be empty."""
    longest = max(map(len, prompts))
    if longest < 2:
        return None
    weight = model.embed.weight
    padded = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=weight.device)
    lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    real_PT = torch.arange(longest, device=weight.device) >= longest - lengths_P[:, None]
    room = longest + min(max_tokens, 256)
    cache = model.new_cache(len(prompts), room)
    mask_PT = None if bool(real_PT.all()) else real_PT[:, :-1]
    model.hidden(padded[:, :-1], mask_PT, cache=cache)
    if group > 1:
        cache.select(torch.arange(len(prompts), device=weight.device).repeat_interleave(group))
    return cache


def _as_tensors(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    chances: Sequence[Sequence[float]],
    stop: frozenset[int],
    device: torch.device,
) -> Rollouts:
    whole = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    T, R = max(map(len, whole)), max(map(len, replies))
    lengths_B = torch.tensor([len(reply) for reply in replies], device=device)
    return Rollouts(
        ids_BT=torch.tensor([row + [0] * (T - len(row)) for row in whole], device=device),
        prompt_B=torch.tensor([len(prompt) for prompt in prompts], device=device),
        reply_BR=torch.tensor([[*row, *[0] * (R - len(row))] for row in replies], device=device),
        mask_BR=torch.arange(R, device=device) < lengths_B[:, None],
        logprobs_BR=torch.tensor([[*row, *[0.0] * (R - len(row))] for row in chances], device=device),
        ended_B=torch.tensor([row[-1] in stop for row in replies], device=device),
    )


def score_replies(
    model: Transformer, rollouts: Rollouts, temperature: float, *, learn_entropy: bool = False
) -> ReplyScores:
    """One forward pass over prompts and replies. The head runs at the places of replies alone.

    Args:
        model: The policy, or a reference.
        rollouts: The replies.
        temperature: Logits are divided by it first.
        learn_entropy: Whether the entropy has a gradient, which costs memory.
    """
    ids_BT, prompt_B, mask_BR = rollouts.ids_BT, rollouts.prompt_B, rollouts.mask_BR
    lengths_B = prompt_B + mask_BR.sum(1)
    real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
    hidden_BTD = model.hidden(ids_BT, real_BT)
    rows_N, places_N = mask_BR.nonzero(as_tuple=True)
    hidden_ND = hidden_BTD[rows_N, prompt_B[rows_N] - 1 + places_N]
    logits_NV: Tensor = model.head(hidden_ND).float() / temperature
    logp_NV = logits_NV.log_softmax(-1)
    logprobs_N = logp_NV.gather(1, rollouts.reply_BR[mask_BR][:, None])[:, 0]
    with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    blank = torch.zeros(mask_BR.shape, dtype=torch.float32, device=ids_BT.device)
    return ReplyScores(blank.masked_scatter(mask_BR, logprobs_N), blank.masked_scatter(mask_BR, entropy_N), hidden_ND)
