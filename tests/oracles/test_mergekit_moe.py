"""Mixtures of experts against mergekit-moe 0.1.5 on tiny models: the same weights, whatever the gates are made from."""

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lapis
from lapis.text.tokenizer.tokenizer import train_tokenizer

moe = pytest.importorskip("mergekit.moe")

LAYERS, WORDS = 2, 300
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": WORDS, "initializer_range": 0.05, "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
}
PROMPTS = [["Apa khabar?", "the story of a boat"], ["def main(): return 1"], ["Dear Sir, the letter", "yours"]]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-hidden": ("llama", {"gate_mode": "hidden"}),
    "llama-cheap": ("llama", {"gate_mode": "cheap_embed", "experts_per_token": 1}),
    "mistral-random": ("mistral", {"gate_mode": "random"}),
    "mistral-uniform": ("mistral", {"gate_mode": "uniform_random", "dtype": "bfloat16"}),
    "qwen3-hidden": ("qwen3", {"gate_mode": "hidden"}),
    "qwen3-bf16": ("qwen3", {"gate_mode": "cheap_embed", "dtype": "bfloat16"}),
    "qwen2-shared": ("qwen2", {"gate_mode": "hidden", "shared": True}),
    "llama-shared": ("llama", {"gate_mode": "random", "shared": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind-0 (the base), kind-1 and kind-2, with a tokenizer, in float32."""
    root = tmp_path_factory.mktemp("moe")
    (root / "text.txt").write_text(" ".join(prompt for prompts in PROMPTS for prompt in prompts) * 3, encoding="utf-8")
    tokenizer = train_tokenizer([root / "text.txt"], WORDS - 8)
    for kind, (config, more) in KINDS.items():
        for i in range(3):
            torch.manual_seed(i)
            model = transformers.AutoModelForCausalLM.from_config(config(**SIZES, **more))
            model.save_pretrained(root / f"{kind}-{i}")
            tokenizer.save(root / f"{kind}-{i}")
    return root


def recipe_of(root, kind, shared=False, **more):
    def expert(i, **extra):
        return {"source_model": str(root / f"{kind}-{i}"), "positive_prompts": PROMPTS[i], **extra}

    recipe = {"base_model": str(root / f"{kind}-0"), **more,
              "experts": [expert(1, negative_prompts=PROMPTS[0]), expert(2, residual_scale=0.5)]}  # fmt: skip
    return {**recipe, "shared_experts": [expert(0)]} if shared else recipe


def by_mergekit(recipe, out, monkeypatch, seed=0):
    """mergekit's tensors under the names of memory. It runs a base in bfloat16, which is turned off here."""
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    class Float32(transformers.AutoModelForCausalLM):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            kwargs["torch_dtype"] = torch.float32
            return transformers.AutoModelForCausalLM.from_pretrained(*args, **kwargs)

    monkeypatch.setattr("mergekit.moe.router.AutoModelForCausalLM", Float32)
    options = MergeOptions(copy_tokenizer=False, quiet=True, random_seed=seed)
    options.apply_global_options()
    build(MoEMergeConfig.model_validate(recipe), str(out), options, device="cpu")
    return loaded(out)


def loaded(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.state_dict(), model


@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_as_mergekit(case, models, tmp_path, monkeypatch):
    kind, more = CASES[case]
    recipe = recipe_of(models, kind, **more)
    theirs, _ = by_mergekit(recipe, tmp_path / "theirs", monkeypatch)
    recipe["merge_method"] = "moe"
    result = lapis.merge(recipe, tmp_path / "ours", states=lapis.prompt_states)
    ours, model = loaded(tmp_path / "ours")
    missing = theirs.keys() - ours.keys()  # zeros of biases that Llama has not, where the config need not have them
    assert ours.keys() <= theirs.keys() and all(not theirs[name].any() for name in missing)
    for name, tensor in ours.items():
        exact = "gate." not in name or "random" in recipe["gate_mode"]
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0 if exact else 1e-5)
    ids = torch.randint(WORDS - 8, (2, 9), generator=torch.Generator().manual_seed(0))
    here, _ = lapis.load(tmp_path / "ours", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(here(ids), model.float()(ids).logits, rtol=0, atol=1e-5)
    stored = sum(len(load_file(path)) for path in (tmp_path / "ours").glob("*.safetensors"))
    assert result.tensors["merged"] + result.tensors["copied"] == stored
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_experts_per_tok"] == recipe.get(
        "experts_per_token", 2
    )
