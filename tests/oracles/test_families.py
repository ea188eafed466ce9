"""Every family against transformers: small random models, the same logits, the same keys on disk, both ways."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from lapis.errors import CheckpointError
from lapis.families import ModelConfig, family_of, find
from lapis.model.blocks.experts import Router
from lapis.model.cache import Cache
from lapis.model.load import load, save
from lapis.model.transformer import Transformer

from .small_models import (
    ARCEE,
    BERT,
    COHERE,
    DECODER,
    DELTA,
    DISTIL,
    EXPERTS,
    GEMMA,
    GEMMA2,
    GEMMA4,
    GPT2,
    GRANITE,
    GROWING,
    LINEAR,
    LLAMA3,
    MIXED,
    MODELS,
    MODERN,
    NEOX,
    OLMOE,
    OSS,
    ROBERTA,
    SHARED,
    SMOLLM3,
    TWO_ROPES,
    VIT,
    YARN,
    YARN_FULL,
    make_theirs,
    rope,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# name -> (model class in transformers, its config's options)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "llama-plain": ("LlamaForCausalLM", {**DECODER}),
    "llama-odd-heads-mqa": (
        "LlamaForCausalLM",
        {**DECODER, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "mlp_bias": True},
    ),
    "llama-mha-gelu": (
        "LlamaForCausalLM",
        {**DECODER, "num_key_value_heads": 6, "hidden_act": "gelu", "attention_bias": True},
    ),
    "llama-rope-llama3": ("LlamaForCausalLM", {**DECODER, **LLAMA3}),
    "llama-rope-linear": ("LlamaForCausalLM", {**DECODER, **LINEAR}),
    "llama-rope-dynamic": (
        "LlamaForCausalLM",
        {**DECODER, **rope("dynamic", factor=4.0), "max_position_embeddings": 8},
    ),
    "llama-rope-yarn": ("LlamaForCausalLM", {**DECODER, **YARN}),
    "llama-rope-yarn-all": ("LlamaForCausalLM", {**DECODER, **YARN_FULL}),
    "llama-bare": ("LlamaModel", {**DECODER}),
    "llama-classes": ("LlamaForSequenceClassification", {**DECODER, "num_labels": 3, "pad_token_id": 96}),
    "llama-scalar": ("LlamaForSequenceClassification", {**DECODER, "num_labels": 1, "pad_token_id": 96}),
    "mistral-without-window": ("MistralForCausalLM", {**DECODER, "sliding_window": None}),
    "mistral-headdim": ("MistralForCausalLM", {**DECODER, "sliding_window": 12, "head_dim": 24}),
    "qwen2-window-of-later-layers": (
        "Qwen2ForCausalLM",
        {**DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2ForCausalLM", {**DECODER, **YARN, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen3-biases": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 10, "attention_bias": True}),
    "qwen3-window": (
        "Qwen3ForCausalLM",
        {**DECODER, "head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "gemma3-untied-biases": ("Gemma3ForCausalLM", {**GEMMA, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma3-ropes-mqa": (
        "Gemma3ForCausalLM",
        {**GEMMA, **TWO_ROPES, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12},
    ),
    "gemma3-layer-types": (
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
            "sliding_window": 3,
            "query_pre_attn_scalar": 16,
            "hidden_activation": "silu",
        },
    ),
    "gemma3-all-windows": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window_pattern": 6, "sliding_window": 9}),
    "gemma3-bare": ("Gemma3TextModel", {**GEMMA, "num_key_value_heads": 6}),
    "gemma3-classes": ("Gemma3TextForSequenceClassification", {**GEMMA, "num_labels": 3}),
    "gemma4-keys-as-values": (
        "Gemma4ForCausalLM",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ),
    "gemma4-borrowing": (
        "Gemma4ForCausalLM",
        {**GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "final_logit_softcapping": 1.5},
    ),
    "gemma4-borrowing-keys-as-values": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4-experts": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
    ),
    "gemma4-experts-inputs": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 3,
            "top_k_experts": 3,
            "moe_intermediate_size": 40,
            "num_kv_shared_layers": 1,
            "hidden_activation": "silu",
        },
    ),
    "gemma4-ropes-mqa": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.5,
                    "rope_theta": 5e5,
                    "factor": 2.0,
                },
                "sliding_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0},
            },
            "num_key_value_heads": 1,
        },
    ),
    "gemma4-full-layers": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "layer_types": ["full_attention"] * 6,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
    "gemma4-bare": (
        "Gemma4TextModel",
        {**GEMMA4, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "ministral-all-windows": ("MinistralForCausalLM", {**DECODER, "sliding_window": 7, "head_dim": 24}),
    "ministral-full": (
        "MinistralForCausalLM",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 9,
            "layer_types": ["full_attention"] * 3,
            "tie_word_embeddings": True,
        },
    ),
    "ministral3-window": (
        "Ministral3ForCausalLM",
        {**DECODER, **GROWING, "head_dim": 10, "sliding_window": 6, "pad_token_id": 96},
    ),
    "ministral3-classes": (
        "Ministral3ForSequenceClassification",
        {**DECODER, **GROWING, "head_dim": 16, "num_labels": 3, "pad_token_id": 96},
    ),
    "smollm3-interval": ("SmolLM3ForCausalLM", {**SMOLLM3, "no_rope_layer_interval": 2, "num_hidden_layers": 5}),
    "smollm3-named-layers": (
        "SmolLM3ForCausalLM",
        {**SMOLLM3, "no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False, "attention_bias": True},
    ),
    "smollm3-window": (
        "SmolLM3ForCausalLM",
        {**SMOLLM3, "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 6},
    ),
    "smollm3-biases-yarn": ("SmolLM3ForCausalLM", {**SMOLLM3, **YARN, "attention_bias": True, "mlp_bias": True}),
    "smollm3-classes": ("SmolLM3ForSequenceClassification", {**SMOLLM3, "num_labels": 3}),
    "olmo2-mha-biases": (
        "Olmo2ForCausalLM",
        {**DECODER, "num_key_value_heads": 6, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo2-yarn": ("Olmo2ForCausalLM", {**DECODER, **YARN, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "olmo2-bare": ("Olmo2Model", {**DECODER}),
    "olmo2-classes": ("Olmo2ForSequenceClassification", {**DECODER, "num_labels": 3, "pad_token_id": 96}),
    "olmo3-layer-types": (
        "Olmo3ForCausalLM",
        {
            **DECODER,
            "sliding_window": 7,
            "layer_types": ["full_attention", *["sliding_attention"] * 2],
            "attention_bias": True,
        },
    ),
    "olmo3-ropes": (
        "Olmo3ForCausalLM",
        {**DECODER, **TWO_ROPES, "sliding_window": 5, "num_hidden_layers": 4, "num_key_value_heads": 6},
    ),
    "olmo3-full": ("Olmo3ForCausalLM", {**DECODER, "sliding_window": 4, "layer_types": ["full_attention"] * 3}),
    "olmo3-classes": ("Olmo3ForSequenceClassification", {**DECODER, "num_labels": 3, "pad_token_id": 96}),
    "exaone4-full": (
        "Exaone4ForCausalLM",
        {**DECODER, **LLAMA3, "sliding_window": None, "layer_types": ["full_attention"] * 3, "num_key_value_heads": 1},
    ),
    "exaone4-pattern": (
        "Exaone4ForCausalLM",
        {**DECODER, "sliding_window": 6, "sliding_window_pattern": 2, "tie_word_embeddings": True, "head_dim": 10},
    ),
    "exaone4-without-positions": (
        "Exaone4ForCausalLM",
        {**DECODER, "sliding_window": 6, "layer_types": ["full_attention"] * 3},
    ),
    "exaone4-classes": ("Exaone4ForSequenceClassification", {**DECODER, "num_labels": 3, "pad_token_id": 96}),
    "starcoder2-window": ("Starcoder2ForCausalLM", {**DECODER, "sliding_window": 6, "num_key_value_heads": 6}),
    "starcoder2-untied-no-bias": (
        "Starcoder2ForCausalLM",
        {**DECODER, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "relu"},
    ),
    "starcoder2-classes": ("Starcoder2ForSequenceClassification", {**DECODER, "num_labels": 3, "pad_token_id": 96}),
    "granite-tied-biases": (
        "GraniteForCausalLM",
        {**DECODER, **GRANITE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "granite-odd-numbers": (
        "GraniteForCausalLM",
        {
            **DECODER,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 3.3,
            "embedding_multiplier": 1.7,
            "num_key_value_heads": 1,
        },
    ),
    "granite-plain": ("GraniteForCausalLM", {**DECODER, **YARN}),
    "granite-bare": ("GraniteModel", {**DECODER, **GRANITE}),
    "gemma2-untied-biases": ("Gemma2ForCausalLM", {**GEMMA2, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma2-uncapped-mqa": (
        "Gemma2ForCausalLM",
        {
            **GEMMA2,
            "num_key_value_heads": 1,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma2-layer-types": (
        "Gemma2ForCausalLM",
        {**GEMMA2, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2, "hidden_activation": "silu"},
    ),
    "gemma2-bare": ("Gemma2Model", {**GEMMA2, "num_key_value_heads": 6}),
    "gemma2-classes": ("Gemma2ForSequenceClassification", {**GEMMA2, "num_labels": 3}),
    "glm4-no-bias-share": (
        "Glm4ForCausalLM",
        {**DECODER, "head_dim": 16, "pad_token_id": 96, "attention_bias": False, "partial_rotary_factor": 0.75},
    ),
    "glm4-whole-tied": (
        "Glm4ForCausalLM",
        {
            **DECODER,
            **rope("linear", factor=3.0, partial_rotary_factor=1.0),
            "head_dim": 12,
            "pad_token_id": 96,
            "tie_word_embeddings": True,
        },
    ),
    "glm4-yarn-mqa": (
        "Glm4ForCausalLM",
        {**DECODER, **YARN, "head_dim": 16, "pad_token_id": 96, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ),
    "glm4-bare": ("Glm4Model", {**DECODER, "head_dim": 8, "pad_token_id": 96}),
    "glm4-classes": ("Glm4ForSequenceClassification", {**DECODER, "head_dim": 8, "num_labels": 3, "pad_token_id": 96}),
    "cohere2-biases-scale": (
        "Cohere2ForCausalLM",
        {**COHERE, "sliding_window": 6, "attention_bias": True, "logit_scale": 0.7, "num_key_value_heads": 6},
    ),
    "cohere2-layer-types": (
        "Cohere2ForCausalLM",
        {**COHERE, "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "cohere2-all-windows-mqa": (
        "Cohere2ForCausalLM",
        {**COHERE, **LLAMA3, "sliding_window": 9, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ),
    "cohere2-untied": ("Cohere2ForCausalLM", {**COHERE, "tie_word_embeddings": False}),
    "cohere2-bare": ("Cohere2Model", {**COHERE}),
    "stablelm-parallel-biases": (
        "StableLmForCausalLM",
        {**DECODER, "use_parallel_residual": True, "use_qkv_bias": True, "tie_word_embeddings": True},
    ),
    "stablelm-share": (
        "StableLmForCausalLM",
        {**DECODER, "hidden_size": 96, "partial_rotary_factor": 0.5, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ),
    "stablelm-whole-linear": (
        "StableLmForCausalLM",
        {**DECODER, **rope("linear", factor=2.0, partial_rotary_factor=1.0), "num_key_value_heads": 6},
    ),
    "stablelm-bare": ("StableLmModel", {**DECODER}),
    "stablelm-classes": ("StableLmForSequenceClassification", {**DECODER, "num_labels": 3, "pad_token_id": 96}),
    "neox-in-turn-tied": (
        "GPTNeoXForCausalLM",
        {**NEOX, "use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    ),
    "neox-no-attention-bias": (
        "GPTNeoXForCausalLM",
        {**NEOX, "attention_bias": False, "num_attention_heads": 3, "rotary_pct": 0.5},
    ),
    "neox-whole-linear": ("GPTNeoXForCausalLM", {**NEOX, **rope("linear", factor=2.0, partial_rotary_factor=1.0)}),
    "neox-bare": ("GPTNeoXModel", {**NEOX}),
    "neox-classes": ("GPTNeoXForSequenceClassification", {**NEOX, "num_labels": 3, "pad_token_id": 96}),
    "phi3-window": ("Phi3ForCausalLM", {**DECODER, "pad_token_id": 96, "sliding_window": 6, "num_key_value_heads": 6}),
    "phi3-tied-mqa": (
        "Phi3ForCausalLM",
        {**DECODER, "pad_token_id": 96, "tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ),
    "phi3-classes": ("Phi3ForSequenceClassification", {**DECODER, "num_labels": 3, "pad_token_id": 96}),
    "arcee-yarn-biases": (
        "ArceeForCausalLM",
        {**DECODER, **ARCEE, **YARN, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "arcee-mqa-wide": ("ArceeForCausalLM", {**DECODER, **ARCEE, "num_key_value_heads": 1, "head_dim": 10}),
    "arcee-bare": ("ArceeModel", {**DECODER, **ARCEE}),
    "arcee-classes": ("ArceeForSequenceClassification", {**DECODER, **ARCEE, "num_labels": 3, "pad_token_id": 96}),
    "apertus-mha-biases": (
        "ApertusForCausalLM",
        {**DECODER, **YARN, "num_key_value_heads": 6, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "apertus-mqa": ("ApertusForCausalLM", {**DECODER, **LLAMA3, "num_key_value_heads": 1, "num_hidden_layers": 2}),
    "apertus-bare": ("ApertusModel", {**DECODER}),
    "qwen3_moe-normalized-biases": (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "norm_topk_prob": True, "attention_bias": True, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "qwen3_moe-window": ("Qwen3MoeForCausalLM", {**EXPERTS, "use_sliding_window": True, "sliding_window": 6}),
    "qwen3_moe-one-of-two": (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, **YARN, "num_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ),
    "qwen3_moe-dense-layers": ("Qwen3MoeForCausalLM", {**EXPERTS, "decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen2_moe-dense-layers": ("Qwen2MoeForCausalLM", {**EXPERTS, **SHARED, "mlp_only_layers": [1]}),
    "qwen3_moe-all": ("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 3, "num_experts_per_tok": 3}),
    "qwen3_moe-classes": ("Qwen3MoeForSequenceClassification", {**EXPERTS, "num_labels": 3, "pad_token_id": 96}),
    "qwen2_moe-normalized": (
        "Qwen2MoeForCausalLM",
        {**EXPERTS, **SHARED, "norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True},
    ),
    "qwen2_moe-window": (
        "Qwen2MoeForCausalLM",
        {**EXPERTS, **SHARED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen2_moe-layer-types": (
        "Qwen2MoeForCausalLM",
        {
            **EXPERTS,
            **SHARED,
            **LLAMA3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", *["sliding_attention"] * 2],
        },
    ),
    "qwen2_moe-one-of-two": (
        "Qwen2MoeForCausalLM",
        {**EXPERTS, **SHARED, "num_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 6},
    ),
    "qwen2_moe-bare": ("Qwen2MoeModel", {**EXPERTS, **SHARED}),
    "mixtral-window": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 5, "sliding_window": 6, "head_dim": 10}),
    "mixtral-one-of-three": (
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "mixtral-linear": ("MixtralForCausalLM", {**DECODER, **LINEAR, "num_local_experts": 3, "num_key_value_heads": 1}),
    "mixtral-all": (
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 3, "hidden_act": "gelu"},
    ),
    "mixtral-classes": (
        "MixtralForSequenceClassification",
        {**DECODER, "num_local_experts": 4, "num_labels": 3, "pad_token_id": 96},
    ),
    "olmoe-normalized-biases": (
        "OlmoeForCausalLM",
        {**DECODER, **OLMOE, "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmoe-mha-yarn": ("OlmoeForCausalLM", {**DECODER, **OLMOE, **YARN, "num_key_value_heads": 6}),
    "olmoe-mqa-llama3": ("OlmoeForCausalLM", {**DECODER, **OLMOE, **LLAMA3, "num_key_value_heads": 1}),
    "olmoe-one": ("OlmoeForCausalLM", {**DECODER, **OLMOE, "num_experts_per_tok": 1, "hidden_act": "gelu"}),
    "olmoe-bare": ("OlmoeModel", {**DECODER, **OLMOE}),
    "gpt_oss-mqa-one": (
        "GptOssForCausalLM",
        {**OSS, "num_key_value_heads": 1, "num_experts_per_tok": 1, "attention_bias": False, "sliding_window": 9},
    ),
    "gpt_oss-full-tied": (
        "GptOssForCausalLM",
        {**OSS, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True, "num_key_value_heads": 6},
    ),
    "gpt_oss-all-windows": (
        "GptOssForCausalLM",
        {**OSS, "layer_types": ["sliding_attention"] * 3, "num_experts_per_tok": 5, "head_dim": 10},
    ),
    "gpt_oss-yarn": ("GptOssForCausalLM", {**OSS, **YARN_FULL}),
    "gpt_oss-classes": ("GptOssForSequenceClassification", {**OSS, "num_labels": 3}),
    "qwen3_5-tied-share": (
        "Qwen3_5ForCausalLM",
        {**DELTA, **rope("default", partial_rotary_factor=0.5), "tie_word_embeddings": True, "linear_num_key_heads": 4},
    ),
    "qwen3_5-layer-types": (
        "Qwen3_5ForCausalLM",
        {**DELTA, "layer_types": ["full_attention", "linear_attention"] * 2, "linear_conv_kernel_dim": 3},
    ),
    "qwen3_5-one-delta": (
        "Qwen3_5ForCausalLM",
        {**DELTA, "layer_types": ["full_attention", "linear_attention", *["full_attention"] * 2]},
    ),
    "qwen3_5-mqa-wide": (
        "Qwen3_5ForCausalLM",
        {**DELTA, "num_key_value_heads": 1, "linear_value_head_dim": 14, "linear_key_head_dim": 6},
    ),
    "qwen3_5-bare": ("Qwen3_5TextModel", {**DELTA}),
    "qwen3_5-classes": ("Qwen3_5TextForSequenceClassification", {**DELTA, "num_labels": 3}),
    "qwen3_5_moe-tied-one": (
        "Qwen3_5MoeForCausalLM",
        {**DELTA, **MIXED, "num_experts_per_tok": 1, "tie_word_embeddings": True, "linear_num_key_heads": 4},
    ),
    "qwen3_5_moe-layer-types": (
        "Qwen3_5MoeForCausalLM",
        {**DELTA, **MIXED, "layer_types": ["full_attention", "linear_attention"] * 2, "num_key_value_heads": 1},
    ),
    "qwen3_5_moe-one-delta": (
        "Qwen3_5MoeForCausalLM",
        {**DELTA, **MIXED, "layer_types": ["full_attention", "linear_attention", *["full_attention"] * 2]},
    ),
    "qwen3_5_moe-all-wide": (
        "Qwen3_5MoeForCausalLM",
        {
            **DELTA,
            **MIXED,
            "num_experts": 3,
            "num_experts_per_tok": 3,
            "linear_value_head_dim": 14,
            "linear_key_head_dim": 6,
            "linear_conv_kernel_dim": 3,
        },
    ),
    "qwen3_5_moe-bare": ("Qwen3_5MoeTextModel", {**DELTA, **MIXED}),
    "qwen3_next-dense-layers": (
        "Qwen3NextForCausalLM",
        {**DELTA, **MIXED, "mlp_only_layers": [1], "linear_num_key_heads": 4},
    ),
    "qwen3_next-step-share": (
        "Qwen3NextForCausalLM",
        {
            **DELTA,
            **MIXED,
            **rope("default", partial_rotary_factor=0.5),
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_next-not-normalized": (
        "Qwen3NextForCausalLM",
        {**DELTA, **MIXED, "norm_topk_prob": False, "linear_num_key_heads": 1, "num_key_value_heads": 1},
    ),
    "qwen3_next-layer-types": (
        "Qwen3NextForCausalLM",
        {
            **DELTA,
            **MIXED,
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "linear_value_head_dim": 14,
            "linear_key_head_dim": 6,
            "linear_conv_kernel_dim": 3,
        },
    ),
    "qwen3_next-bare": ("Qwen3NextModel", {**DELTA, **MIXED}),
    "qwen3_next-classes": ("Qwen3NextForSequenceClassification", {**DELTA, **MIXED, "num_labels": 3}),
    "gpt2-untied-inner": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 70}),
    "gpt2-relu2": ("GPT2LMHeadModel", {**GPT2, "activation_function": "relu2", "n_head": 1}),
    "gpt2-bare": ("GPT2Model", {**GPT2}),
    "gpt2-classes": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 4, "pad_token_id": 96}),
    "bert-bare": ("BertModel", {**BERT}),
    "bert-masked-untied": ("BertForMaskedLM", {**BERT, "tie_word_embeddings": False, "type_vocab_size": 3}),
    "bert-classes": ("BertForSequenceClassification", {**BERT, "num_labels": 5, "num_attention_heads": 1}),
    "roberta-bare": ("RobertaModel", {**ROBERTA}),
    "roberta-masked-untied": ("RobertaForMaskedLM", {**ROBERTA, "tie_word_embeddings": False, "pad_token_id": 0}),
    "roberta-classes": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 5, "hidden_act": "gelu_new"}),
    "xlm-roberta-scalar": ("XLMRobertaForSequenceClassification", {**ROBERTA, "num_labels": 1}),
    "distilbert-bare": ("DistilBertModel", {**DISTIL}),
    "distilbert-masked-untied": ("DistilBertForMaskedLM", {**DISTIL, "tie_word_embeddings": False, "n_heads": 1}),
    "distilbert-classes": ("DistilBertForSequenceClassification", {**DISTIL, "num_labels": 5}),
    "distilbert-scalar": ("DistilBertForSequenceClassification", {**DISTIL, "num_labels": 1, "n_layers": 3}),
    "modernbert-bare": ("ModernBertModel", {**MODERN}),
    "modernbert-masked-untied": (
        "ModernBertForMaskedLM",
        {
            **MODERN,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "modernbert-full-silu": (
        "ModernBertForMaskedLM",
        {
            **MODERN,
            "layer_types": ["full_attention"] * 4,
            "hidden_activation": "silu",
            "classifier_activation": "silu",
            "num_attention_heads": 6,
        },
    ),
    "modernbert-classes": ("ModernBertForSequenceClassification", {**MODERN, "num_labels": 5, "local_attention": 5}),
    "modernbert-mean-scalar": (
        "ModernBertForSequenceClassification",
        {**MODERN, "num_labels": 1, "classifier_pooling": "mean", "mlp_bias": True},
    ),
    "vit-bare": ("ViTModel", {**VIT}),
    "vit-gray-scalar": (
        "ViTForImageClassification",
        {**VIT, "num_labels": 1, "num_channels": 1, "patch_size": 4, "hidden_act": "relu"},
    ),
}
MQA, MHA, TIED = {"num_key_value_heads": 1}, {"num_key_value_heads": 6}, {"tie_word_embeddings": True}
ROWS = {"num_labels": 3, "pad_token_id": 96}
GROWN = {**DECODER, **GROWING, "pad_token_id": 96}
# so that every model_type has six at least
CASES |= {
    "mistral-mqa-yarn": ("MistralForCausalLM", {**DECODER, **MQA, **YARN, "sliding_window": 3}),
    "mistral-bare": ("MistralModel", {**DECODER, **MHA, "sliding_window": 5}),
    "mistral-classes": ("MistralForSequenceClassification", {**DECODER, **ROWS, "sliding_window": 5}),
    "qwen2-mha-linear": ("Qwen2ForCausalLM", {**DECODER, **MHA, **LINEAR}),
    "qwen2-bare": ("Qwen2Model", {**DECODER, **MQA}),
    "qwen2-classes": ("Qwen2ForSequenceClassification", {**DECODER, **ROWS}),
    "qwen3-mqa-yarn": ("Qwen3ForCausalLM", {**DECODER, **MQA, **YARN, "head_dim": 12}),
    "qwen3-bare": ("Qwen3Model", {**DECODER, **MHA, "head_dim": 16}),
    "qwen3-classes": ("Qwen3ForSequenceClassification", {**DECODER, **ROWS, "head_dim": 16}),
    "ministral-mqa-tied": ("MinistralForCausalLM", {**DECODER, **MQA, **TIED, "sliding_window": 3, "head_dim": 12}),
    "ministral-bare": ("MinistralModel", {**DECODER, **MHA, "sliding_window": 5, "head_dim": 8}),
    "ministral-classes": (
        "MinistralForSequenceClassification", {**DECODER, **ROWS, "sliding_window": 5, "head_dim": 8},
    ),
    "ministral3-mqa-tied": ("Ministral3ForCausalLM", {**GROWN, **MQA, **TIED, "head_dim": 12}),
    "ministral3-mha": ("Ministral3ForCausalLM", {**GROWN, **MHA, "head_dim": 8, "hidden_act": "gelu"}),
    "ministral3-bare": ("Ministral3Model", {**GROWN, "head_dim": 16}),
    "olmo2-mqa-linear": ("Olmo2ForCausalLM", {**DECODER, **MQA, **LINEAR, "num_hidden_layers": 2}),
    "olmo3-bare": ("Olmo3Model", {**DECODER, **MQA, "sliding_window": 4}),
    "exaone4-bare": ("Exaone4Model", {**DECODER, **MHA, "sliding_window": 5}),
    "starcoder2-mqa-linear": ("Starcoder2ForCausalLM", {**DECODER, **MQA, **LINEAR}),
    "starcoder2-bare": ("Starcoder2Model", {**DECODER, **MHA}),
    "granite-mqa-llama3": ("GraniteForCausalLM", {**DECODER, **GRANITE, **MQA, **LLAMA3}),
    "phi3-mha-linear": ("Phi3ForCausalLM", {**DECODER, **MHA, "pad_token_id": 96, "num_hidden_layers": 2}),
    "phi3-bare": ("Phi3Model", {**DECODER, "pad_token_id": 96}),
    "arcee-mha-linear": ("ArceeForCausalLM", {**DECODER, **ARCEE, **MHA, **LINEAR}),
    "apertus-linear-odd": ("ApertusForCausalLM", {**DECODER, **LINEAR, "hidden_size": 40, "num_attention_heads": 5,
                                                  **MQA}),
    "apertus-relu-one-layer": ("ApertusForCausalLM", {**DECODER, **MHA, "num_hidden_layers": 1}),
    "gpt2-scalar": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 1, "pad_token_id": 96}),
    "bert-masked-relu": ("BertForMaskedLM", {**BERT, "hidden_act": "relu", "num_hidden_layers": 3}),
    "bert-scalar": ("BertForSequenceClassification", {**BERT, "num_labels": 1}),
    "roberta-masked-deep": ("RobertaForMaskedLM", {**ROBERTA, "num_hidden_layers": 4, "num_attention_heads": 1}),
    "roberta-scalar": ("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 1}),
    "xlm-roberta-bare": ("XLMRobertaModel", {**ROBERTA}),
    "xlm-roberta-masked-untied": ("XLMRobertaForMaskedLM", {**ROBERTA, "tie_word_embeddings": False}),
    "xlm-roberta-masked-pads": ("XLMRobertaForMaskedLM", {**ROBERTA, "num_hidden_layers": 3, "pad_token_id": 0}),
    "xlm-roberta-classes": ("XLMRobertaForSequenceClassification", {**ROBERTA, "num_labels": 5}),
    "distilbert-masked-one-layer": ("DistilBertForMaskedLM", {**DISTIL, "n_layers": 1, "hidden_dim": 50}),
    "vit-one-head": ("ViTModel", {**VIT, "num_attention_heads": 1, "hidden_act": "gelu_new"}),
    "vit-wide": ("ViTForImageClassification", {**VIT, "intermediate_size": 120, "num_labels": 2}),
    "vit-large-patches": ("ViTForImageClassification", {**VIT, "patch_size": 12, "num_labels": 4}),
}  # fmt: skip
CAUSAL = [name for name, (kind, _) in CASES.items() if kind.endswith(("CausalLM", "LMHeadModel"))]
HEADED = [name for name, (kind, _) in CASES.items() if name in CAUSAL or "MaskedLM" in kind or "Classification" in kind]


@dataclass
class Pair:
    """A model of transformers, the folder it saved, and ours, loaded from that folder."""

    name: str
    theirs: Any
    ours: Transformer
    folder: Path

    def inputs(self, batch: int = 2, length: int = 20) -> torch.Tensor:
        torch.manual_seed(1)
        image = self.ours.config.image
        if image:
            return torch.randn(batch, image.channels, image.size, image.size)
        return torch.randint(0, 96, (batch, length))

    def expected(self, model: Any, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What transformers gives; positions count real tokens, as its own `generate` and ours do."""
        options: dict[str, Any] = {}
        if mask is not None:
            options["attention_mask"] = mask.long()
            counted = self.ours.config.positions == "learned" or self.ours.config.rope.query_growth
            if "Sequence" not in type(model).__name__ or counted:
                options["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        first = self.ours.config.first_position  # there they count from the tokens, of which any may be the padding
        if first:
            counts = options.get("position_ids", torch.arange(inputs.shape[1]).expand_as(inputs))
            options["position_ids"] = counts + first
        out = model(inputs, **options)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    theirs = make_theirs(*CASES[request.param])
    with torch.no_grad():
        folder = tmp_path_factory.mktemp("model")
        theirs.save_pretrained(folder)
        yield Pair(request.param, theirs, load(folder), folder)


def keys(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def test_logits_equal_transformers(pair: Pair) -> None:
    inputs = pair.inputs()
    if "classes" in pair.name or "scalar" in pair.name:
        inputs = inputs[:1]  # transformers wants a pad token to know where rows of a batch end
    assert gap(pair.ours(inputs), pair.expected(pair.theirs, inputs)) <= 1e-5


def test_padding_on_either_side_changes_nothing(pair: Pair) -> None:
    if pair.ours.config.image:
        return
    ids = pair.inputs()
    for side in ("left", "right"):
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :7] = False
        padded = ids.masked_fill(~mask, 96)
        if side == "right":
            mask, padded = mask.flip(1), padded.flip(1)
        ours, theirs = pair.ours(padded, mask), pair.expected(pair.theirs, padded, mask)
        alone = pair.ours(padded[:1, mask[0]])
        if ours.dim() == 2:
            assert gap(ours[:1], alone) <= 1e-5, side
            if pair.ours.config.causal or side == "right":  # their encoders look at the first token, padding or not
                assert gap(ours, theirs) <= 1e-5, side
        elif "dynamic" in pair.name:  # its angles depend on the longest row of the batch, in transformers too
            assert gap(ours[mask], theirs[mask]) <= 1e-5, side
        else:
            assert gap(ours[mask], theirs[mask]) <= 1e-5 and gap(ours[0, mask[0]], alone[0]) <= 1e-5, side


def test_bf16_stays_close_to_transformers_bf16(pair: Pair) -> None:
    inputs = pair.inputs(1)
    inputs = inputs.bfloat16() if inputs.is_floating_point() else inputs
    ours = load(pair.folder, torch.bfloat16)
    assert ours(inputs).dtype == torch.bfloat16
    theirs = type(pair.theirs).from_pretrained(pair.folder, dtype=torch.bfloat16)
    margins_N = margins(ours, inputs)
    got, expected, exact = ours(inputs), pair.expected(theirs, inputs), pair.expected(pair.theirs, inputs)
    limit = 2e-2 * (got.abs().max().item() if ours.config.head == "none" else 1.0)  # states are large
    if ours.config.delta or any(rule.component == "norm.attn_out" for rule in family_of(ours.config).rules):
        # these round what was rounded: transformers' own distance from float32 is the measure, which ours keeps
        assert gap(got, exact) <= max(limit, 1.5 * gap(expected, exact)) or ours.config.experts is not None
        limit = max(limit, 2 * gap(expected, exact))
    if ours.config.experts is None:
        assert gap(got, expected) <= limit
    else:  # where two experts are nearly as probable, rounding decides, and that token differs more
        gaps_N = (got.float() - expected.float()).abs().amax(-1).flatten()
        assert (gaps_N > limit).float().mean() <= 0.15 and gaps_N.median() <= limit / 2
        if len(margins_N) == len(gaps_N):  # a classifier has one row for a sequence
            near_N = margins_N < NEAR
            assert (gaps_N[~near_N & (near_N.cumsum(0) == 0)] <= limit).all()
            assert (gaps_N[~near_N] <= 2 * limit).all()  # it reads those that stand before it


NEAR = 2**-6  # router logits of about 1, computed with rounded numbers, are apart by a few times 2**-9


def margins(model: Transformer, inputs: torch.Tensor) -> torch.Tensor:
    """By how much the last chosen expert leads the first that is not, for each token; the least of all layers."""
    settings, scores = model.config.experts, list[torch.Tensor]()
    if settings is None:
        return torch.zeros(0)
    routers = [m for m in model.modules() if isinstance(m, Router) and len(m.weight) == settings.count]
    handles = [m.register_forward_hook(lambda _module, _args, out: scores.append(out.float())) for m in routers]
    model(inputs)
    for handle in handles:
        handle.remove()
    none = torch.full((inputs.numel(),), torch.inf)
    sorted_ = [
        each.flatten(0, -2).sort(-1, descending=True).values for each in scores if settings.active < settings.count
    ]
    return torch.stack([none, *(s_NE[:, settings.active - 1] - s_NE[:, settings.active] for s_NE in sorted_)]).amin(0)


def test_a_saved_folder_loads_in_transformers_with_the_same_keys(pair: Pair, tmp_path: Path) -> None:
    save(pair.ours, tmp_path)
    assert keys(tmp_path) == keys(pair.folder)
    again, info = type(pair.theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = pair.inputs(1)
    assert gap(pair.expected(again, inputs), pair.ours(inputs)) <= 1e-5
    assert load(tmp_path).config == pair.ours.config
    assert load(tmp_path).notes == []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, name, None) == getattr(pair.theirs.config, name, None)


@pytest.mark.parametrize("pair", HEADED, indirect=True)
def test_gradients_equal_transformers(pair: Pair, tmp_path: Path) -> None:
    """transformers writes its gradients as weights, and they are read as such: whatever it calls or stacks them."""
    inputs, theirs = pair.inputs(), copy.deepcopy(pair.theirs)
    if not pair.ours.config.image and (pad := theirs.config.pad_token_id) is not None:
        inputs[inputs == pad] = pad + 1  # the row of padding gets no gradient there; it has none where it is masked
    for model in (theirs, pair.ours):
        model.zero_grad()
        with torch.enable_grad():
            out = model(inputs) if model is pair.ours else pair.expected(model, inputs)
            if pair.ours.config.head in ("classes", "scalar"):
                out.square().sum().backward()
            else:
                labels = inputs.roll(-1, 1) if pair.ours.config.causal else inputs
                torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten()).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)
    expected, compared = dict(load(tmp_path).named_parameters()), 0
    for name, parameter in pair.ours.named_parameters():
        if parameter.grad is not None:
            assert gap(parameter.grad, expected[name]) <= 1e-4, name
            compared += bool(expected[name].any())
    assert compared >= 0.8 * len(expected)


@pytest.mark.parametrize("pair", CAUSAL, indirect=True)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_cached_logits_equal_uncached(pair: Pair, padding: str) -> None:
    """Prefill, a second chunk, then token by token; past the window, where there is one."""
    if "dynamic" in pair.name:
        return  # keys are turned by the angles of the time they came in; transformers does the same
    ids = pair.inputs(length=24)
    mask = None
    if padding != "none":
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[0, slice(0, 4) if padding == "left" else slice(6, 10)] = False
    cache = Cache(pair.ours.config, 2, 4)
    chunks = [slice(0, 10), slice(10, 13), *(slice(i, i + 1) for i in range(13, 24))]
    parts = []
    for chunk in chunks:
        part_mask = mask[:, chunk] if mask is not None and chunk.start == 0 else None
        parts.append(pair.ours(ids[:, chunk], part_mask, cache=cache))
    real = torch.ones(2, 24, dtype=torch.bool) if mask is None else mask
    assert gap(torch.cat(parts, 1)[real], pair.ours(ids, mask)[real]) <= 1e-5


BOTH_ROPES = {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
STRETCHED = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}


@pytest.mark.parametrize("fields", [
    {**BOTH_ROPES, "rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}},
    {**BOTH_ROPES, **STRETCHED, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 8.0}},
    {"rope_theta": 5000.0, "rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}},
    {**STRETCHED, "rope_parameters": {"rope_type": "default"}},
])  # fmt: skip
def test_of_two_spellings_of_rope_the_same_one_counts(fields: dict[str, Any]) -> None:
    """A folder of transformers 5 to which somebody added `rope_scaling`, as one does to stretch the context."""
    config = with_ropes(transformers.LlamaConfig(**DECODER), fields)
    theirs = transformers.LlamaConfig.from_dict(dict(config)).rope_parameters
    ours = read_config_of(config).rope
    assert (ours.kind, ours.theta) == (theirs["rope_type"], theirs["rope_theta"])
    assert ours.factor == theirs.get("factor", ours.factor)


def test_a_theta_that_would_be_lost_is_refused() -> None:
    fields = {**STRETCHED, "rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}
    config = with_ropes(transformers.LlamaConfig(**DECODER), fields)
    with pytest.raises(CheckpointError, match="rope_theta stands in rope_parameters alone"):
        read_config_of(config)


def test_gemma_stretches_its_full_layers_alone() -> None:
    fields = {**TWO_ROPES, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    config = with_ropes(transformers.Gemma3TextConfig(**GEMMA), fields)
    theirs = transformers.Gemma3TextConfig.from_dict(json.loads(json.dumps(config))).rope_parameters["full_attention"]
    ours = read_config_of(config).rope
    assert (ours.kind, ours.theta, ours.factor) == (theirs["rope_type"], theirs["rope_theta"], theirs["factor"])


def with_ropes(made: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """A config.json with these fields for rotary positions, and no others."""
    config = {key: value for key, value in made.to_dict().items() if not key.startswith("rope_")}
    return {**config, **json.loads(json.dumps(fields))}


def read_config_of(config: dict[str, Any]) -> ModelConfig:
    family = find(config)
    assert family is not None
    return family.read_config(config)
