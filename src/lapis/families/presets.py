"""Published sizes by name, as their config.json says them, so that counting them needs no download.

Leaves out: weights, tokenizers, and every field that does not shape the model.
"""

from typing import Any


def _gpt2(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": dim,
        "n_layer": layers, "n_head": heads, "n_positions": 1024, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip


def _bert(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * dim, "hidden_act": "gelu",
        "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    }  # fmt: skip


def _vit(dim: int, layers: int, heads: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": dim, "num_labels": 1000,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * dim, "hidden_act": "gelu",
        "image_size": 224, "patch_size": patch, "num_channels": 3, "layer_norm_eps": 1e-12,
    }  # fmt: skip


def _llama(
    kind: str, dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab: int, context: int, *,
    theta: float = 10_000.0, eps: float = 1e-5, tied: bool = False, head_dim: int | None = None, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    return {
        "model_type": kind, "architectures": [f"{name}ForCausalLM"], "hidden_size": dim, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn_dim,
        "vocab_size": vocab, "max_position_embeddings": context, "rope_theta": theta, "rms_norm_eps": eps,
        "tie_word_embeddings": tied, "head_dim": head_dim, "hidden_act": "silu", **fields,
    }  # fmt: skip


def _stretched(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base-uncased": _bert(768, 12, 12),
    "bert-large-uncased": _bert(1024, 24, 16),
    "vit-base-patch16-224": _vit(768, 12, 12, 16),
    "vit-large-patch16-224": _vit(1024, 24, 16, 16),
    "vit-huge-patch14-224": _vit(1280, 32, 16, 14),
    "llama-2-7b": _llama("llama", 4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-3-8b": _llama("llama", 4096, 32, 32, 8, 14336, 128256, 8192, theta=5e5),
    "llama-3.1-8b": _llama("llama", 4096, 32, 32, 8, 14336, 128256, 131072, theta=5e5, rope_scaling=_stretched(8.0)),
    "llama-3.2-1b": _llama("llama", 2048, 16, 32, 8, 8192, 128256, 131072, theta=5e5, tied=True, head_dim=64,
                           rope_scaling=_stretched(32.0)),
    "mistral-7b": _llama("mistral", 4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096),
    "qwen2.5-0.5b": _llama("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, theta=1e6, eps=1e-6, tied=True),
    "qwen2.5-1.5b": _llama("qwen2", 1536, 28, 12, 2, 8960, 151936, 131072, theta=1e6, eps=1e-6, tied=True),
    "qwen2.5-7b": _llama("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072, theta=1e6, eps=1e-6),
    "qwen3-0.6b": _llama("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, theta=1e6, eps=1e-6, tied=True, head_dim=128),
    "qwen3-1.7b": _llama("qwen3", 2048, 28, 16, 8, 6144, 151936, 40960, theta=1e6, eps=1e-6, tied=True, head_dim=128),
}  # fmt: skip
