"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each half, GELU, one tied head.

On disk q, k and v are one matrix, and all matrices are transposed (its Conv1D). The folder "gpt2" itself has no
"transformer." before its names, and keeps its causal masks as tensors. Leaves out: scaling by layer, cross-attention.
"""

from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import Family, Rule, refuse_shape, rules
from lapis.families.config import ModelConfig, complete
from lapis.families.fields import TOKENS, Fields
from lapis.families.gguf import LEARNED, Gguf
from lapis.families.shapes import STACK, STACK_TRANSPOSE, TRANSPOSE

BLOCK = "h.{layer}."
QKV = tuple(f"blocks.{{layer}}.attn.{name}." for name in "qkv")
RULES = (
    *rules("wte", "embed"),
    *rules("wpe", "embed.position"),
    *rules(BLOCK + "ln_1", "norm.attn", "weight bias"),
    Rule(BLOCK + "attn.c_attn.weight", tuple(name + "weight" for name in QKV), "attn.qkv", STACK_TRANSPOSE),
    Rule(BLOCK + "attn.c_attn.bias", tuple(name + "bias" for name in QKV), "attn.qkv", STACK),
    *rules(BLOCK + "attn.c_proj", "attn.o", "weight bias", TRANSPOSE),
    *rules(BLOCK + "ln_2", "norm.mlp", "weight bias"),
    *rules(BLOCK + "mlp.c_fc", "mlp.up", "weight bias", TRANSPOSE),
    *rules(BLOCK + "mlp.c_proj", "mlp.down", "weight bias", TRANSPOSE),
    *rules("ln_f", "norm.final", "weight bias"),
    *rules("lm_head", "head", outside=True),
    *rules("score", "head.classes", outside=True),
)

ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "relu2",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu"}
HEADS = {"LMHeadModel": "lm", "ForSequenceClassification": "classes", "Model": "none"}
HEAD_NAMES = {"lm": "LMHeadModel", "classes": "ForSequenceClassification", "scalar": "ForSequenceClassification",
              "none": "Model"}  # fmt: skip


def read_config(fields: Fields) -> dict[str, Any]:
    dim = fields.integer("n_embd")
    head = fields.head(HEADS, "lm")
    classes = fields.labels() if head == "classes" else 0
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    fields.keep(*TOKENS, "initializer_range", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    fields.known.update(name for name in fields.config if name.startswith("summary_"))
    fields.known.add("reorder_and_upcast_attn")  # a question of precision, and scores are in float32 here anyway
    return {
        "family": "gpt2",
        "dim": dim,
        "layers": fields.layers("n_layer"),
        "heads": fields.integer("n_head"),
        "ffn_dim": fields.optional("n_inner") or 4 * dim,
        "vocab": fields.integer("vocab_size"),
        "context": fields.integer("n_positions"),
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_epsilon"),
        "mlp": fields.choice("activation_function", ACTIVATIONS),
        "positions": "learned",
        "bias": "all",
        "tied": fields.flag("tie_word_embeddings", True),
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    refuse_shape(config, {
        "norm": ("layer",), "norm_place": ("pre",), "positions": ("learned",), "causal": (True,), "qk_norm": (False,),
        "mlp": tuple(ACTIVATION_NAMES), "bias": ("all",), "types": (0,), "image": (None,), "window": (None,),
        "head": tuple(HEAD_NAMES), "kv_heads": (config.heads,),
    })  # fmt: skip
    if config.head_dim * config.heads != config.dim:
        raise ConfigError(f"head_dim {config.head_dim} has no place in a gpt2 folder; it is dim / heads there")
    written = {
        "architectures": ["GPT2" + HEAD_NAMES[config.head]],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.dim,
        "n_inner": config.ffn_dim,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "activation_function": ACTIVATION_NAMES[config.mlp],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
    return complete(config, written)


def _preset(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": dim,
        "n_layer": layers, "n_head": heads, "n_positions": 1024, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="transformer.",
    ignored=(r"(?:^|\.)h\.\d+\.attn\.(?:bias|masked_bias)$",),
    defaults={
        "gpt2": {
            "norm": "layer",
            "norm_eps": 1e-5,
            "positions": "learned",
            "bias": "all",
            "mlp": "gelu_tanh",
            "tied": True,
        }
    },
    gguf={
        "gpt2": Gguf(
            "gpt2",
            computes={**LEARNED, "norm_place": ("pre",), "causal": (True,), "head": ("lm",), "mlp": ("gelu_tanh",)},
        )
    },
    presets={
        "gpt2": _preset(768, 12, 12),
        "gpt2-medium": _preset(1024, 24, 16),
        "gpt2-large": _preset(1280, 36, 20),
        "gpt2-xl": _preset(1600, 48, 25),
    },
)
