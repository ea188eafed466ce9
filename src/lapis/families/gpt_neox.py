"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia: both halves of a block read the stream, each by a norm.

A quarter of each head turns. On disk q, k and v are one matrix, head by head.
"""

from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import Rule, refuse_shape, rules
from lapis.families.config import ModelConfig, complete
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.gpt2 import ACTIVATION_NAMES, ACTIVATIONS, QKV
from lapis.families.llama import BLOCK, HEAD_NAMES, llama_like, read_decoder
from lapis.families.rotary import read_rope, write_rope, write_share
from lapis.families.shapes import BY_HEAD

SHARE = 0.25  # of a head that turns, where config.json does not say
BOTH = "weight bias"
RULES = (
    *rules("embed_in", "embed"),
    *rules(BLOCK + "input_layernorm", "norm.attn", BOTH),
    *(
        Rule(f"{BLOCK}attention.query_key_value.{kind}", tuple(name + kind for name in QKV), "attn.qkv", BY_HEAD)
        for kind in ("weight", "bias")
    ),
    *rules(BLOCK + "attention.dense", "attn.o", BOTH),
    *rules(BLOCK + "post_attention_layernorm", "norm.mlp", BOTH),
    *rules(BLOCK + "mlp.dense_h_to_4h", "mlp.up", BOTH),
    *rules(BLOCK + "mlp.dense_4h_to_h", "mlp.down", BOTH),
    *rules("final_layer_norm", "norm.final", BOTH),
    *rules("embed_out", "head", outside=True),
    *rules("score", "head.classes", outside=True),
)


def read_config(fields: Fields) -> dict[str, Any]:
    fields.only("is_decoder", False, True)
    fields.keep("hidden_dropout", "classifier_dropout")
    own = {name: fields.config.get(name) for name in ("rotary_emb_base", "rotary_pct")}
    fields.known.update(own)
    spelled = {**fields.config, "rope_theta": own["rotary_emb_base"], "partial_rotary_factor": own["rotary_pct"]}
    fields.known.update(("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"))
    rope = read_rope(Fields(spelled), fields.integer("max_position_embeddings"), share=SHARE)
    attention = fields.flag("attention_bias", True)
    return {
        **read_decoder(fields, eps="layer_norm_eps", rope=rope, mlps=ACTIVATIONS),
        "norm": "layer",
        "bias": "all" if attention else "mlp",
        "parallel": "own" if fields.flag("use_parallel_residual", True) else "none",
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    refuse_shape(config, {
        "norm": ("layer",), "norm_place": ("pre",), "positions": ("rotary",), "causal": (True,), "qk_norm": (False,),
        "mlp": tuple(ACTIVATION_NAMES), "bias": ("all", "mlp"), "types": (0,), "image": (None,), "window": (None,),
        "head": tuple(HEAD_NAMES), "kv_heads": (config.heads,), "parallel": ("own", "none"),
        "rope.share": (config.rope.share,),
    })  # fmt: skip
    if config.head_dim * config.heads != config.dim:
        raise ConfigError(f"head_dim {config.head_dim} has no place in a gpt_neox folder; it is dim / heads there")
    rope = write_share(write_rope(config.rope), config.rope)
    written = {
        "architectures": ["GPTNeoX" + HEAD_NAMES[config.head]],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": ACTIVATION_NAMES[config.mlp],
        "max_position_embeddings": config.context,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.bias == "all",
        "use_parallel_residual": config.parallel == "own",
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": config.rope.share,
        "rope_scaling": rope["rope_scaling"],
        "rope_parameters": rope["rope_parameters"],
    }
    return complete(config, written)


def _pythia(dim: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": vocab, "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * dim, "hidden_act": "gelu",
        "max_position_embeddings": 2048, "rotary_pct": SHARE, "rotary_emb_base": 10_000, "layer_norm_eps": 1e-5,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    }  # fmt: skip


FAMILY = llama_like(
    name="gpt_neox",
    model_types=("gpt_neox",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="gpt_neox.",
    modules=((r"^embed_out\.", "lm_head."),),
    gguf={"gpt_neox": Gguf(
        "gptneox", computes={**ROTARY, "norm": ("layer",), "mlp": ("gelu", "gelu_tanh"), "bias": ("all",)},
        says_parallel=True, partial=True, means={"parallel": "own"},
    )},
    spellings=((r"^lm_head\.", "embed_out."),),
    ignored=(r"attention\.(?:bias|masked_bias|rotary_emb\.inv_freq)$",),
    defaults={"gpt_neox": {"norm": "layer", "norm_eps": 1e-5, "mlp": "gelu", "bias": "all", "parallel": "own",
                           "rope": {"share": SHARE}}},
    presets={
        "pythia-70m": _pythia(512, 6, 8),
        "pythia-160m": _pythia(768, 12, 12),
        "pythia-410m": _pythia(1024, 24, 16),
        "pythia-1b": _pythia(2048, 16, 8),
        "pythia-1.4b": _pythia(2048, 24, 16),
        "pythia-2.8b": _pythia(2560, 32, 32),
        "pythia-6.9b": _pythia(4096, 32, 32, 50432),
        "pythia-12b": _pythia(5120, 36, 40, 50688),
    },
)  # fmt: skip
