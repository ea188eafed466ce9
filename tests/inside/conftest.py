"""Tiny models with large random weights, so that every part says something, and a tokenizer that splits some words."""

import pytest
import torch

from lapis.families.config import Experts, ModelConfig, Rope
from lapis.families.uneven import LayerInputs, Uneven
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

SHAPES = {
    "llama": {"kv_heads": 2},
    "window": {"kv_heads": 2, "window": 3, "family": "mistral"},
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "mlp": "gelu_tanh",
        "bias": "all",
        "tied": True,
        "family": "gpt2",
    },
    "gemma3": {
        "qk_norm": True,
        "family": "gemma3_text",
        "head_dim": 10,
        "window": 3,
        "window_layers": (0, 1),
        "mlp": "geglu_tanh",
        "tied": True,
        "query_scalar": 7.0,
    },
    "gemma4": {
        "family": "gemma4_text", "qk_norm": True, "head_dim": 10, "window": 3, "window_layers": (0, 1), "tied": True,
        "mlp": "geglu_tanh", "query_scalar": 1.0, "rope": Rope(kind="proportional", share=0.5), "window_rope": Rope(),
        "uneven": Uneven(12, 2), "layer_inputs": LayerInputs(6, 330), "logit_cap": 5.0,
    },
    "qwen3": {"qk_norm": True, "family": "qwen3", "head_dim": 10},
    "smollm3": {"family": "smollm3", "nope_layers": (1,), "tied": True},
    "olmo3": {"family": "olmo3", "qk_norm": True, "qk_norm_over": "all", "window": 3, "window_layers": (0, 1)},
    "granite": {"family": "granite", "embed_scale": 3.0, "residual_scale": 0.5, "logit_divisor": 4.0},
    "gemma2": {
        "family": "gemma2", "mlp": "geglu_tanh", "tied": True, "window": 3, "window_layers": (0, 1), "head_dim": 10,
        "attention_cap": 2.0, "logit_cap": 5.0,
    },
    "glm4": {"family": "glm4", "kv_heads": 2, "bias": "qkv", "rope": Rope(share=0.5, neighbors=True)},
    "cohere2": {
        "family": "cohere2", "norm": "layer", "norm_bias": False, "parallel": "shared", "logit_divisor": 4.0,
        "window": 3, "window_layers": (0, 1), "nope_layers": (2,), "tied": True, "rope": Rope(neighbors=True),
    },
    "neox": {"family": "gpt_neox", "norm": "layer", "mlp": "gelu", "bias": "all", "parallel": "own",
             "rope": Rope(share=0.5)},
    "qwen3_moe": {"family": "qwen3_moe", "qk_norm": True, "experts": Experts(4, 2)},
    "gpt_oss": {"family": "gpt_oss", "bias": "all", "experts": Experts(4, 2), "kv_heads": 2, "window": 3,
                "window_layers": (0, 1), "rope": Rope(kind="yarn", factor=2.0, original_context=8)},
    "arcee": {"family": "arcee", "mlp": "relu2"},
    "apertus": {"family": "apertus", "mlp": "xielu", "qk_norm": True},
}  # fmt: skip


def make_model(kind: str = "llama", seed: int = 0, **options) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(
        **{"dim": 32, "layers": 3, "heads": 4, "ffn_dim": 48, "vocab": 330, "context": 40, **SHAPES[kind], **options}
    )).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.2))
    return model


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """ " Malaysia" is one token and "Malaysia" is several, as in the tokenizers of real models."""
    text = "in Malaysia they say Kuala Lumpur is the capital of Malaysia, and Jakarta of Indonesia. "
    return train_tokenizer([text * 40], 320)


@pytest.fixture(params=SHAPES)
def model(request) -> Transformer:
    return make_model(request.param)
