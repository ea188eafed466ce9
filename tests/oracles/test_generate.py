"""Sampling filters equal transformers' processors, and greedy text equals its `generate`, token for token."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lapis.generation.generate import generate, generate_batch
from lapis.generation.options import Sampling
from lapis.generation.ready import ready
from lapis.generation.sampling import filtered, penalize
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from tests.oracles.test_families import CASES

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@given(
    st.integers(0, 10_000),
    st.sampled_from([5, 60, 3000]),
    st.floats(0.2, 3),
    st.integers(0, 80),
    st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.999, 1.0]),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]),
)
@settings(deadline=None, max_examples=80)
def test_filters_equal_transformers(seed, vocab, temperature, k, p, m):
    logits_BV = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if k:
        theirs.append(TopKLogitsWarper(k))
    if p < 1:
        theirs.append(TopPLogitsWarper(p))
    if m:
        theirs.append(MinPLogitsWarper(m))
    ours = filtered(logits_BV, Sampling(temperature=temperature, top_k=k, top_p=p, min_p=m))
    assert torch.equal(ours, theirs(None, logits_BV))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(4, 50, generator=generator)
    ids_BT = torch.randint(0, 50, (4, 20), generator=generator)
    seen_BV = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids_BT, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids_BT, logits_BV)
    assert torch.equal(penalize(logits_BV, seen_BV, penalty), theirs)


# -- whole replies

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
    "intermediate_size": 80, "vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GROWING = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8,
           "llama_4_scaling_beta": 0.1}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SHAPE),
    "llama-llama3": ("LlamaForCausalLM", {**SHAPE, "rope_parameters": LLAMA3}),
    "llama-tied-mqa": ("LlamaForCausalLM", {**SHAPE, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral-window": ("MistralForCausalLM", {**SHAPE, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", {**SHAPE, "tie_word_embeddings": True}),
    "qwen2-window-later": (
        "Qwen2ForCausalLM",
        {**SHAPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**SHAPE, "head_dim": 16}),
    "ministral3": ("Ministral3ForCausalLM", {**SHAPE, "head_dim": 16, "sliding_window": 9, "rope_parameters": GROWING}),
    "smollm3": ("SmolLM3ForCausalLM", {**SHAPE, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", SHAPE),
    "olmo3": ("Olmo3ForCausalLM", {**SHAPE, "num_hidden_layers": 4, "sliding_window": 6}),
    "exaone4": ("Exaone4ForCausalLM", {**SHAPE, "num_hidden_layers": 4, "sliding_window": 6}),
    "starcoder2": ("Starcoder2ForCausalLM", {**SHAPE, "sliding_window": 9}),
    "granite": (
        "GraniteForCausalLM",
        {**SHAPE, "attention_multiplier": 0.125, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    ),
    "phi3": ("Phi3ForCausalLM", {**SHAPE, "pad_token_id": 0, "sliding_window": 7}),
    "arcee": ("ArceeForCausalLM", {**SHAPE, "hidden_act": "relu2"}),
    "apertus": ("ApertusForCausalLM", SHAPE),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": ("MixtralForCausalLM", {**SHAPE, "num_local_experts": 3, "sliding_window": 9}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 3, "n_head": 3, "vocab_size": 300, "n_positions": 64, "initializer_range": 0.3},
    ),
}
listed = {kind for kind, _ in CAUSAL.values()}
for kind, options in CASES.values():  # the plainest of every other family
    if kind.endswith("CausalLM") and kind not in listed:
        own = {"vocab_size_per_layer_input": 300} if "vocab_size_per_layer_input" in options else {}
        CAUSAL[kind] = kind, {**options, **own, "vocab_size": 300, "initializer_range": 0.3}
        listed.add(kind)
WORDS = "the cat sat on the mat and the dog ate the fish while a bird sang in the old tree by the river"
TEXTS = ["the cat", "a bird sang in the old tree", "dog", "the fish and the mat and the fish and the river"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS] * 4, 300)


def pair(name: str, folder: Path) -> tuple[Any, Transformer]:
    """transformers' model with random weights, and ours from the folder that it saved."""
    kind, options = CAUSAL[name]
    torch.manual_seed(1)
    cls = getattr(transformers, kind)
    theirs = cls(cls.config_class(**options)).eval()
    theirs.save_pretrained(folder)
    return theirs, load(folder)


def their_ids(theirs: Any, prompts: list[list[int]], ends: tuple[int, ...], **options: Any) -> list[list[int]]:
    """What transformers generates, each row cut after its first end token."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        ids_BT, attention_mask=mask_BT, do_sample=False, pad_token_id=0, eos_token_id=list(ends), **options
    )
    rows = [row[longest:].tolist() for row in out]
    return [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in rows]


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_equals_transformers(name, tmp_path, tokenizer):
    theirs, model = pair(name, tmp_path)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    # the end token is one that random weights say now and then, so that rows end at different times
    ends = tuple({their_ids(theirs, [prompts[0]], (), max_new_tokens=9)[0][-1], *tokenizer.end_ids})
    expected = their_ids(theirs, prompts, ends, max_new_tokens=24)
    tokenizer.__dict__["end_ids"] = ends
    try:
        replies = generate_batch(model, tokenizer, TEXTS, Sampling(max_tokens=24))
        assert [list(reply.ids) for reply in replies] == expected
        assert {reply.stop_reason for reply in replies} == {"end" if row[-1] in ends else "length" for row in expected}
        assert [generate(model, tokenizer, text, Sampling(max_tokens=24)) for text in TEXTS] == [
            reply.text for reply in replies
        ]
        packed = generate_batch(ready(model), tokenizer, TEXTS, Sampling(max_tokens=24))
        assert [list(reply.ids) for reply in packed] == expected
    finally:
        del tokenizer.__dict__["end_ids"]


def test_dynamic_rope_beyond_its_context_equals_transformers(tmp_path, tokenizer):
    CAUSAL["dynamic"] = ("LlamaForCausalLM", {**SHAPE, "max_position_embeddings": 12, "rope_parameters": DYNAMIC})
    theirs, model = pair("dynamic", tmp_path)
    prompt = tokenizer.encode(TEXTS[1])
    (reply,) = generate_batch(model, tokenizer, [prompt], Sampling(max_tokens=20))
    assert list(reply.ids) == their_ids(theirs, [prompt], tokenizer.end_ids, max_new_tokens=20)[0]


def test_repetition_penalty_in_a_reply_equals_transformers(tmp_path, tokenizer):
    theirs, model = pair("llama", tmp_path)
    for text in TEXTS:  # one by one: in a batch transformers also punishes its padding
        prompt = tokenizer.encode(text)
        (expected,) = their_ids(theirs, [prompt], tokenizer.end_ids, max_new_tokens=24, repetition_penalty=1.4)
        (reply,) = generate_batch(model, tokenizer, [prompt], Sampling(max_tokens=24, repetition_penalty=1.4))
        assert list(reply.ids) == expected
    together = generate_batch(model, tokenizer, TEXTS, Sampling(max_tokens=24, repetition_penalty=1.4))
    assert list(together[-1].ids) == expected


def test_logprobs_are_those_of_the_whole_sequence(tmp_path, tokenizer):
    theirs, model = pair("qwen2", tmp_path)
    replies = generate_batch(model, tokenizer, TEXTS, Sampling(max_tokens=12, temperature=1.0, seed=5), logprobs=True)
    for text, reply in zip(TEXTS, replies, strict=True):
        prompt = tokenizer.encode(text)
        with torch.no_grad():
            logits_TV = theirs(torch.tensor([prompt + list(reply.ids)])).logits[0, len(prompt) - 1 : -1]
        expected = logits_TV.log_softmax(-1).gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(reply.logprobs), expected, atol=2e-4)
