"""Real models, token for token: what lapis says greedily in six languages is what transformers says."""

import os
from pathlib import Path

import pytest
import torch

from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling
from lapis.model.load import load
from lapis.text.tokenizer.tokenizer import Tokenizer

PROMPTS = (
    "The capital of Malaysia is", "Once upon a time there was a fisherman who", "To make good bread you need",
    "Water boils at 100 degrees because", "def mean(numbers):\n    ",
    "Ibu kota Malaysia ialah", "Pada suatu hari, seorang nelayan", "Untuk memasak nasi lemak,",
    "马来西亚的首都是", "从前有一个渔夫,", "做好面包需要",
    "Столиця України —", "Жив собі дід та баба, і", "Щоб спекти хліб, треба",
    "대한민국의 수도는", "옛날 옛적에 한 어부가", "맛있는 빵을 만들려면",
    "La capitale de la France est", "Il était une fois un pêcheur", "Pour faire du bon pain, il faut",
)  # fmt: skip
TOKENS = 40
TIE = 1e-3  # two logits as near as this are a tie that either sum may break


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2-it", "gemma3"])
def test_forty_greedy_tokens_equal_transformers(name: str) -> None:
    """All prompts at once, padded, here; each alone there."""
    folder = Path(os.environ.get("LAPIS_MODELS", "/nowhere")) / name
    if not folder.is_dir():
        pytest.skip("LAPIS_MODELS names no folder of real models")
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.open(folder)
    prompts = [tokenizer.encode(prompt, add_special_tokens=True) for prompt in PROMPTS]
    ours = load(folder, torch.float32)
    replies = generate_batch(ours, tokenizer, prompts, Sampling(max_tokens=TOKENS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = sorted(tokenizer.end_ids)
    for text, prompt, reply in zip(PROMPTS, prompts, replies, strict=True):
        ids_BT = torch.tensor([prompt])
        whole = theirs.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=TOKENS, do_sample=False, eos_token_id=ends,
            repetition_penalty=1.0,
        )  # fmt: skip
        expected, got = whole[0, len(prompt) :].tolist(), list(reply.ids)
        if got == expected:
            continue
        first = next(i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1])
        with torch.inference_mode():
            logits_V = theirs(whole[:, : len(prompt) + first]).logits[0, -1]
        apart = float(logits_V[expected[first]] - logits_V[got[first]])
        assert 0 <= apart <= TIE, (text, first, apart)
