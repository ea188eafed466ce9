"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's block, without token types and without the pooler."""

from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import Family, refuse_shape, rules
from lapis.families.bert import ACTIVATION_NAMES, ACTIVATIONS, BOTH, COMPUTES, ENCODER, HEAD_NAMES, HEADS, OLD_NAMES
from lapis.families.config import ModelConfig, complete
from lapis.families.fields import TOKENS, Fields
from lapis.families.gguf import Gguf

BLOCK = "transformer.layer.{layer}."
EPS = 1e-12  # of every norm; config.json does not say it
RULES = (
    *rules("embeddings.word_embeddings", "embed"),
    *rules("embeddings.position_embeddings", "embed.position"),
    *rules("embeddings.LayerNorm", "norm.embed", BOTH),
    *rules(BLOCK + "attention.q_lin", "attn.q", BOTH),
    *rules(BLOCK + "attention.k_lin", "attn.k", BOTH),
    *rules(BLOCK + "attention.v_lin", "attn.v", BOTH),
    *rules(BLOCK + "attention.out_lin", "attn.o", BOTH),
    *rules(BLOCK + "sa_layer_norm", "norm.attn", BOTH),
    *rules(BLOCK + "ffn.lin1", "mlp.up", BOTH),
    *rules(BLOCK + "ffn.lin2", "mlp.down", BOTH),
    *rules(BLOCK + "output_layer_norm", "norm.mlp", BOTH),
    *rules("vocab_transform", "head.transform", BOTH, outside=True),
    *rules("vocab_layer_norm", "head.norm", BOTH, outside=True),
    *rules("vocab_projector", "head", BOTH, outside=True),
    *rules("pre_classifier", "head.dense", BOTH, outside=True),
    *rules("classifier", "head.classes", BOTH, outside=True),
)


def read_config(fields: Fields) -> dict[str, Any]:
    head = fields.head(HEADS, "none")
    classes = fields.labels() if head == "classes" else 0
    fields.keep(*TOKENS, "initializer_range", "dropout", "attention_dropout", "seq_classif_dropout")
    fields.known.update(("qa_dropout", "sinusoidal_pos_embds", "tie_weights_"))  # the positions lie in the folder
    return {
        **ENCODER,
        "family": "distilbert",
        "dim": fields.integer("dim"),
        "layers": fields.layers("n_layers"),
        "heads": fields.integer("n_heads"),
        "ffn_dim": fields.integer("hidden_dim"),
        "vocab": fields.integer("vocab_size"),
        "context": fields.integer("max_position_embeddings"),
        "norm_eps": EPS,
        "norm_place": "post",
        "mlp": fields.choice("activation", ACTIVATIONS),
        "tied": fields.flag("tie_word_embeddings", True),
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
        "class_dense": "relu",
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    refuse_shape(config, {
        "norm": ("layer",), "norm_place": ("post",), "positions": ("learned",), "causal": (False,), "qk_norm": (False,),
        "mlp": tuple(ACTIVATION_NAMES), "bias": ("all",), "image": (None,), "window": (None,), "types": (0,),
        "head": tuple(HEAD_NAMES), "kv_heads": (config.heads,), "norm_eps": (EPS,), "class_dense": ("relu",),
        "pooler": (False,),
    })  # fmt: skip
    if config.head_dim * config.heads != config.dim:
        raise ConfigError(f"head_dim {config.head_dim} has no place in a distilbert folder; it is dim / heads there")
    written = {
        "architectures": ["DistilBert" + HEAD_NAMES[config.head]],
        "model_type": "distilbert",
        "vocab_size": config.vocab,
        "dim": config.dim,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "hidden_dim": config.ffn_dim,
        "activation": ACTIVATION_NAMES[config.mlp],
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
    }
    return complete(config, written)


_PRESET = {
    "model_type": "distilbert", "architectures": ["DistilBertModel"], "dim": 768, "n_layers": 6, "n_heads": 12,
    "hidden_dim": 3072, "activation": "gelu", "max_position_embeddings": 512,
}  # fmt: skip

FAMILY = Family(
    name="distilbert",
    model_types=("distilbert",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="distilbert.",
    ignored=(r"embeddings\.position_ids$",),
    shapes=lambda config: {"head.transform": (config.dim, config.dim)},
    defaults={"distilbert": {**ENCODER, "norm_place": "post", "tied": True, "class_dense": "relu"}},
    gguf={"distilbert": Gguf("bert", inner=("masked",), imported=False, computes=COMPUTES)},
    presets={
        "distilbert-base-uncased": {**_PRESET, "vocab_size": 30522},
        "distilbert-base-multilingual-cased": {**_PRESET, "vocab_size": 119547},
    },
    spellings=OLD_NAMES,
)
