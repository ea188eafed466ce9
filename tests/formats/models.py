"""Small random models of every family, each with a tokenizer of its own, as folders."""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lapis.formats.vocabulary.probe import LINES
from lapis.formats.vocabulary.reading import loses_letters
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

from ..text.test_sentence_piece import write_folder

transformers.logging.set_verbosity_error()

DECODER = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "initializer_range": 0.15,
}  # fmt: skip
LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}  # fmt: skip
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
                            "original_max_position_embeddings": 32}}  # fmt: skip
GEMMA = {**DECODER, "num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
         "num_key_value_heads": 1, "initializer_range": 0.05}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.4}
BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "max_position_embeddings": 128, "initializer_range": 0.1}  # fmt: skip
DISTIL = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 128,
          "initializer_range": 0.1}  # fmt: skip
MODERN = {**BERT, "num_hidden_layers": 5, "local_attention": 8, "initializer_range": 0.06}

GEMMA4 = {**DECODER, "num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8,
          "layer_types": ["sliding_attention", "full_attention"] * 3, "hidden_size_per_layer_input": 32,
          "initializer_range": 0.03}  # fmt: skip
FULL = {**DECODER, "sliding_window": None, "layer_types": ["full_attention"] * 3}
GROWING = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "mscale": 1.0,
                               "original_max_position_embeddings": 16, "mscale_all_dim": 1.0,
                               "llama_4_scaling_beta": 0.1}}  # fmt: skip
GRANITE = {"attention_multiplier": 0.125, "residual_multiplier": 0.22, "logits_scaling": 8.0,
           "embedding_multiplier": 12.0}  # fmt: skip

EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
DELTA = {
    **DECODER, "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "initializer_range": 0.08,
}  # fmt: skip
DELTA_EXPERTS = {**DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
                 "shared_expert_intermediate_size": 64, "initializer_range": 0.05}  # fmt: skip
NEOX = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}

# name -> class of transformers, options of its config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER),
    "llama-tied-biases": (
        "LlamaForCausalLM",
        {**DECODER, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama-rope-llama3": ("LlamaForCausalLM", {**DECODER, **LLAMA3}),
    "llama-rope-linear": ("LlamaForCausalLM", {**DECODER, **LINEAR}),
    "llama-rope-yarn": ("LlamaForCausalLM", {**DECODER, **YARN}),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": None, "head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", {**DECODER, "sliding_window": 80}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen2-tied": ("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 32}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "gemma3-untied": ("Gemma3ForCausalLM", {**GEMMA, "tie_word_embeddings": False, "num_key_value_heads": 2}),
    "ministral": ("MinistralForCausalLM", {**DECODER, "head_dim": 16, "sliding_window": 128}),
    "smollm3": ("SmolLM3ForCausalLM", {**DECODER, "num_hidden_layers": 5, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2ForCausalLM", {**DECODER, "num_key_value_heads": 4}),
    "olmo2-gqa": ("Olmo2ForCausalLM", DECODER),
    "granite": ("GraniteForCausalLM", {**DECODER, **GRANITE}),
    "granite-tied": ("GraniteForCausalLM", {**DECODER, **GRANITE, "tie_word_embeddings": True}),
    "arcee": ("ArceeForCausalLM", {**DECODER, "hidden_act": "relu2"}),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "norm_topk_prob": True, "head_dim": 32}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 96}),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "olmoe": (
        "OlmoeForCausalLM",
        {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "num_key_value_heads": 2}),
    "gemma4": ("Gemma4ForCausalLM", GEMMA4),
    "gemma4-borrowing": (
        "Gemma4ForCausalLM",
        {**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 5.0},
    ),
    "gemma4-experts": (
        "Gemma4ForCausalLM",
        {
            **GEMMA4,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 96,
        },
    ),
    "exaone4": ("Exaone4ForCausalLM", {**FULL, **LLAMA3}),
    "exaone4-windows": (
        "Exaone4ForCausalLM",
        {**DECODER, "num_hidden_layers": 64, "sliding_window": 8, "initializer_range": 0.05},
    ),
    "olmo3": ("Olmo3ForCausalLM", {**DECODER, "num_hidden_layers": 5, "sliding_window": 8}),
    "olmo3-yarn": (
        "Olmo3ForCausalLM",
        {
            **DECODER,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": YARN["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "apertus": ("ApertusForCausalLM", {**DECODER, **LLAMA3}),
    "ministral3": ("Ministral3ForCausalLM", {**DECODER, **GROWING, "head_dim": 32}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **DECODER,
            **YARN,
            "head_dim": 32,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
        },
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", DELTA),
    "qwen3_5-tied": (
        "Qwen3_5ForCausalLM",
        {
            **DELTA,
            "tie_word_embeddings": True,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {**YARN["rope_parameters"], "partial_rotary_factor": 0.5},
        },
    ),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", DELTA_EXPERTS),
    "qwen3_next": ("Qwen3NextForCausalLM", {**DELTA_EXPERTS, "norm_topk_prob": True}),
    "glm4": ("Glm4ForCausalLM", {**DECODER, "head_dim": 16}),
    "cohere2": ("Cohere2ForCausalLM", {**DECODER, "num_hidden_layers": 4, "sliding_window": 8}),
    "stablelm": ("StableLmForCausalLM", {**DECODER, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmForCausalLM", {**DECODER, "use_parallel_residual": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX),
    "gpt_neox-in-turn": ("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False}),
    "starcoder2": ("Starcoder2ForCausalLM", DECODER),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied-inner": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 96}),
    "bert": ("BertModel", BERT),
    "bert-masked": ("BertForMaskedLM", BERT),
    "distilbert": ("DistilBertModel", DISTIL),
    "distilbert-masked": ("DistilBertForMaskedLM", DISTIL),
    "modernbert": ("ModernBertModel", MODERN),
    "modernbert-masked": ("ModernBertForMaskedLM", {**MODERN, "global_attn_every_n_layers": 2}),
    "roberta": ("RobertaModel", {**BERT, "type_vocab_size": 1}),
    "xlm-roberta-masked": ("XLMRobertaForMaskedLM", {**BERT, "type_vocab_size": 1}),
}
EXPORTED_ONLY = tuple(name for name in CASES if name.split("-")[0] in (
    "gemma4", "exaone4", "apertus", "ministral3", "gpt_oss", "modernbert", "qwen3_5", "qwen3_5_moe", "qwen3_next",
))  # fmt: skip
DELTAS = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
WORD_PIECES = ("bert", "bert-masked", "distilbert", "distilbert-masked")
ENCODERS = (*WORD_PIECES, "roberta", "xlm-roberta-masked", "modernbert", "modernbert-masked")


def make_folder(folder: Path, name: str, tokenizer: Tokenizer | None = None, rows_beyond: int = 3) -> Path:
    """A model and a tokenizer. rows_beyond: rows of the embedding that no token has."""
    kind, options = CASES[name]
    kinds = {**dict.fromkeys(WORD_PIECES, word_piece), "xlm-roberta-masked": unigram}
    tokenizer = tokenizer or kinds.get(name, byte_level)()
    model_class = getattr(transformers, kind)
    torch.manual_seed(7)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    rows = tokenizer.rows + rows_beyond
    ids |= {"vocab_size_per_layer_input": rows} if "global_head_dim" in options else {}
    config = model_class.config_class(**copy.deepcopy(options), vocab_size=rows, **ids)
    model = model_class(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases, which begin at 1 and 0
            norm = "norm" in parameter_name.lower() and "bias" not in parameter_name
            around_0 = name.split("-")[0] in ("gemma2", "gemma3", *DELTAS) and "linear_attn" not in parameter_name
            torch.nn.init.normal_(parameter, 1.0 if norm and not around_0 else 0.0, 0.1 + ("A_log" in parameter_name))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def byte_level(vocab: int = 600) -> Tokenizer:
    """What lapis trains."""
    return train_tokenizer([*LINES, *(line.lower() for line in LINES)], vocab)


def word_piece(lowercase: bool = True) -> Tokenizer:
    """BERT's kind."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator([line for line in LINES if not (lowercase and loses_letters(line))], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"}  # fmt: skip
    return Tokenizer(backend, named, {})


def sentence_piece(prefix: bool = True) -> Tokenizer:
    """Llama 2's kind: every pair of pieces that together are a piece is a merge, by the piece's rank."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"▁{word}" for line in LINES for word in line.split()]
    pieces: dict[str, int] = {}
    for word in words:
        for length in range(2, min(len(word), 9) + 1):
            for start in range(len(word) - length + 1):
                piece = word[start : start + length]
                pieces[piece] = pieces.get(piece, 0) + length
    chosen = sorted(pieces, key=lambda piece: (-pieces[piece], piece))[:900]
    singles = ["▁", *sorted({char for word in words for char in word} - {"▁"})[:300]]
    vocab = {token: i for i, token in enumerate([*special, *bytes_, *chosen, *singles])}
    merges = [
        (piece[:cut], piece[cut:]) for piece in chosen for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]  # fmt: skip
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {})


def unigram(kind: str = "xlm-roberta") -> Tokenizer:
    """XLM-RoBERTa's kind, or T5's: a SentencePiece model as its folder is converted."""
    with TemporaryDirectory() as place:
        write_folder(Path(place), kind, [line.replace("\n", " ") for line in LINES] * 3, 900)
        return Tokenizer.open(place)


def cut_by(steps: Callable[[], list[Any]], *, whole_words: bool = False) -> Tokenizer:
    """A byte-level tokenizer with another splitting."""
    backend = Backend(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps())
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*LINES, *(line.lower() for line in LINES)], trainer)
    return Tokenizer(backend, {"eos_token": "<|endoftext|>"}, {})


def ternary_folder(folder: Path) -> Path:
    """A model whose matrices hold -d, 0 and d, each row its own d, and are 256 wide."""
    tokenizer = byte_level()
    options = {**DECODER, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**options, vocab_size=tokenizer.rows, eos_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "proj" in parameter_name:
                parameter.copy_(parameter.sign() * (parameter.abs() > 0.08) * 0.125)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder
