"""BERT (Devlin et al. 2018): sees both ways, norms after each half, token types, a pooler, a masked-word head.

Old folders spell the norms' weights gamma and beta. Leaves out: BERT as a decoder, relative positions, the
next-sentence head (known, and left out), heads that mark tokens or spans.
"""

from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import Family, refuse_shape, rules
from lapis.families.config import ModelConfig, complete
from lapis.families.fields import TOKENS, Fields
from lapis.families.gguf import LEARNED, Gguf

BLOCK = "encoder.layer.{layer}."
BOTH = "weight bias"
RULES = (
    *rules("embeddings.word_embeddings", "embed"),
    *rules("embeddings.position_embeddings", "embed.position"),
    *rules("embeddings.token_type_embeddings", "embed.types"),
    *rules("embeddings.LayerNorm", "norm.embed", BOTH),
    *rules(BLOCK + "attention.self.query", "attn.q", BOTH),
    *rules(BLOCK + "attention.self.key", "attn.k", BOTH),
    *rules(BLOCK + "attention.self.value", "attn.v", BOTH),
    *rules(BLOCK + "attention.output.dense", "attn.o", BOTH),
    *rules(BLOCK + "attention.output.LayerNorm", "norm.attn", BOTH),
    *rules(BLOCK + "intermediate.dense", "mlp.up", BOTH),
    *rules(BLOCK + "output.dense", "mlp.down", BOTH),
    *rules(BLOCK + "output.LayerNorm", "norm.mlp", BOTH),
    *rules("pooler.dense", "head.pooler", BOTH),
    *rules("cls.predictions.transform.dense", "head.transform", BOTH, outside=True),
    *rules("cls.predictions.transform.LayerNorm", "head.norm", BOTH, outside=True),
    *rules("cls.predictions", "head", "bias", outside=True),
    *rules("cls.predictions.decoder", "head", outside=True),
    *rules("cls.predictions.decoder", "head", "bias", outside=True, twin=True),
    *rules("classifier", "head.classes", BOTH, outside=True),
)

OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "relu2": "relu2", "silu": "silu", "swish": "silu"}  # fmt: skip
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2", "silu": "silu"}
HEADS = {"ForMaskedLM": "masked", "ForPreTraining": "masked", "ForSequenceClassification": "classes", "Model": "none"}
HEAD_NAMES = {"masked": "ForMaskedLM", "classes": "ForSequenceClassification", "scalar": "ForSequenceClassification",
              "none": "Model"}  # fmt: skip


def read_config(fields: Fields) -> dict[str, Any]:
    return read_encoder(fields)


def read_encoder(fields: Fields) -> dict[str, Any]:
    """What config.json says alike in BERT and in those who followed it; ModelConfig's fields."""
    head = fields.head(HEADS, "none")
    classes = fields.labels() if head == "classes" else 0
    fields.only("position_embedding_type", "absolute")
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    fields.keep(*TOKENS, "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob")
    fields.known.update(name for name in fields.config if name.startswith("pooler_"))
    fields.known.update(("directionality", "classifier_dropout", "vocab_size"))
    return {
        "family": "bert",
        "dim": fields.integer("hidden_size"),
        "layers": fields.layers("num_hidden_layers"),
        "heads": fields.integer("num_attention_heads"),
        "ffn_dim": fields.integer("intermediate_size"),
        "vocab": fields.integer("vocab_size"),
        "context": fields.integer("max_position_embeddings"),
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_eps"),
        "norm_place": "post",
        "mlp": fields.choice("hidden_act", ACTIVATIONS),
        "positions": "learned",
        "causal": False,
        "bias": "all",
        "tied": fields.flag("tie_word_embeddings", True),
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
        "types": fields.integer("type_vocab_size"),
        "pooler": head in ("none", "classes"),
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_encoder(config, "Bert")


def write_encoder(config: ModelConfig, name: str, **allowed: tuple[Any, ...]) -> dict[str, Any]:
    """The reverse of `read_encoder`. Raises ConfigError for a shape that such a folder cannot say.

    Args:
        config: Of the model.
        name: What the classes of transformers begin with.
        allowed: Field of ModelConfig -> the values that the family has, where they are not BERT's.
    """
    refuse_shape(config, {
        "norm": ("layer",), "norm_place": ("post",), "positions": ("learned",), "causal": (False,), "qk_norm": (False,),
        "mlp": tuple(ACTIVATION_NAMES), "bias": ("all",), "image": (None,), "window": (None,),
        "head": tuple(HEAD_NAMES), "kv_heads": (config.heads,), **allowed,
    })  # fmt: skip
    if config.head_dim * config.heads != config.dim or not config.types:
        raise ConfigError(f"a {config.family} folder has head_dim = dim / heads, and at least one token type")
    written = {
        "architectures": [name + HEAD_NAMES[config.head]],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        "hidden_act": ACTIVATION_NAMES[config.mlp],
        "max_position_embeddings": config.context,
        "type_vocab_size": config.types,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "position_embedding_type": "absolute",
    }
    return complete(config, written, absent=("pad_token_id",))


def _preset(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * dim, "hidden_act": "gelu",
        "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    }  # fmt: skip


ENCODER = {"norm": "layer", "norm_eps": 1e-12, "positions": "learned", "causal": False, "bias": "all", "mlp": "gelu"}

# what llama.cpp computes of BERT and of those built like it
COMPUTES = {**LEARNED, "norm_place": ("post",), "causal": (False,), "head": ("none", "masked"),
            "mlp": ("gelu", "gelu_tanh")}  # fmt: skip

FAMILY = Family(
    name="bert",
    model_types=("bert",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="bert.",
    ignored=(r"embeddings\.position_ids$", r"^cls\.seq_relationship\.(?:weight|bias)$"),
    shapes=lambda config: {"embed.types": (config.types, config.dim), "head.transform": (config.dim, config.dim)},
    defaults={"bert": {**ENCODER, "norm_place": "post", "types": 2, "tied": True}},
    presets={"bert-base-uncased": _preset(768, 12, 12), "bert-large-uncased": _preset(1024, 24, 16)},
    gguf={"bert": Gguf("bert", inner=("masked",), computes=COMPUTES)},
    spellings=OLD_NAMES,
)
