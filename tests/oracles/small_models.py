"""One small model of every model_type, as transformers makes it, with random weights.

The tests of families have more cases of each, and benchmarks/gpu.py holds these against transformers on a GPU: so this
file needs nothing but torch and transformers.
"""

import copy
from typing import Any

import torch

DECODER = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
    "intermediate_size": 80, "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 3, "vocab_size": 97, "n_positions": 40}
BERT = dict(**ENCODER, vocab_size=97, max_position_embeddings=40)
ROBERTA = {**BERT, "pad_token_id": 2, "type_vocab_size": 1}
DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 80, "vocab_size": 97, "max_position_embeddings": 40}
MODERN = {**ENCODER, "num_hidden_layers": 4, "vocab_size": 97, "max_position_embeddings": 40, "local_attention": 8,
          "pad_token_id": 96, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "sdpa"}  # fmt: skip
VIT = dict(**ENCODER, image_size=24, patch_size=8)


def rope(kind: str, **numbers: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **numbers}}


GEMMA = {**DECODER, "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5,
         "sliding_window_pattern": 3, "pad_token_id": 96}  # fmt: skip
TWO_ROPES = {"rope_parameters": {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}}  # fmt: skip

GEMMA4 = {**DECODER, "num_hidden_layers": 6, "head_dim": 8, "global_head_dim": 12, "sliding_window": 5,
          "layer_types": ["sliding_attention", "full_attention"] * 3, "hidden_size_per_layer_input": 10,
          "vocab_size_per_layer_input": 100, "pad_token_id": 96}  # fmt: skip

LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_FULL = rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0, mscale=0.7,
                 mscale_all_dim=1.2, truncate=False)  # fmt: skip

LINEAR = rope("linear", factor=3.0)
GROWING = rope("yarn", factor=4.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=1.0,
               llama_4_scaling_beta=0.1)  # fmt: skip
SMOLLM3 = {**DECODER, "num_hidden_layers": 4, "pad_token_id": 96, "bos_token_id": 1, "eos_token_id": 2}
GEMMA2 = {**GEMMA, "attn_implementation": "eager", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
del GEMMA2["sliding_window_pattern"]
COHERE = {**DECODER, "sliding_window": 5, "pad_token_id": 96}
NEOX = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
GRANITE = {"attention_multiplier": 0.125, "residual_multiplier": 0.22, "logits_scaling": 8.0,
           "embedding_multiplier": 12.0}  # fmt: skip
ARCEE = {"hidden_act": "relu2"}
EXPERTS = {**DECODER, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 40}
OLMOE = {"num_experts": 5, "num_experts_per_tok": 2, "pad_token_id": 96, "eos_token_id": 2}
OSS = {**DECODER, **rope("yarn", factor=8.0, original_max_position_embeddings=8, truncate=False), "head_dim": 8,
       "sliding_window": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "pad_token_id": 96}  # fmt: skip
DELTA = {**DECODER, "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8, "pad_token_id": 96}  # fmt: skip
MIXED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "shared_expert_intermediate_size": 40}  # fmt: skip

# model_type -> (model class in transformers, its config's options)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
                                   "head_dim": 20}),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 5, "tie_word_embeddings": True}),
    "ministral": ("MinistralForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": 5,
                                           "layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    "ministral3": ("Ministral3ForCausalLM", {**DECODER, **GROWING, "head_dim": 16, "pad_token_id": 96}),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "gemma3_text": ("Gemma3ForCausalLM", GEMMA),
    "gemma4_text": ("Gemma4ForCausalLM", GEMMA4),
    "smollm3": ("SmolLM3ForCausalLM", SMOLLM3),
    "olmo2": ("Olmo2ForCausalLM", DECODER),
    "olmo3": ("Olmo3ForCausalLM", {**DECODER, "num_hidden_layers": 5, "sliding_window": 5}),
    "exaone4": ("Exaone4ForCausalLM", {**DECODER, "num_hidden_layers": 5, "sliding_window": 5}),
    "starcoder2": ("Starcoder2ForCausalLM", DECODER),
    "granite": ("GraniteForCausalLM", {**DECODER, **GRANITE}),
    "glm4": ("Glm4ForCausalLM", {**DECODER, "head_dim": 8, "pad_token_id": 96}),
    "cohere2": ("Cohere2ForCausalLM", {**COHERE, "num_hidden_layers": 5}),
    "stablelm": ("StableLmForCausalLM", DECODER),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX),
    "phi3": ("Phi3ForCausalLM", {**DECODER, "pad_token_id": 96}),
    "arcee": ("ArceeForCausalLM", {**DECODER, **ARCEE}),
    "apertus": ("ApertusForCausalLM", DECODER),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**EXPERTS, **SHARED}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", {**DECODER, **OLMOE}),
    "gpt_oss": ("GptOssForCausalLM", OSS),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", {**DELTA, **MIXED}),
    "qwen3_next": ("Qwen3NextForCausalLM", {**DELTA, **MIXED}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForMaskedLM", {**BERT, "hidden_act": "gelu_new"}),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {**ROBERTA, "num_attention_heads": 1, "layer_norm_eps": 1e-5}),
    "distilbert": ("DistilBertForMaskedLM", {**DISTIL, "activation": "relu"}),
    "modernbert": ("ModernBertForMaskedLM", {**MODERN, "norm_bias": True, "attention_bias": True}),
    "vit": ("ViTForImageClassification", {**VIT, "num_labels": 7}),
}  # fmt: skip


@torch.no_grad()
def make_theirs(kind: str, options: dict[str, Any]) -> Any:
    """A model of transformers with random weights: norms and biases away from 1 and 0, so that a mix-up shows.

    Args:
        kind: Its class.
        options: Of its config.
    """
    import transformers

    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    theirs = model_class(model_class.config_class(**copy.deepcopy(options))).eval()  # it writes into them
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.04))
    for name, buffer in theirs.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.add_(torch.randn_like(buffer) * 0.1)
    return theirs
