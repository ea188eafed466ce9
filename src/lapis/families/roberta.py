"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2019, arXiv:1911.02116): BERT's block.

Positions begin behind the number of the padding token, and a classifier has a dense layer of its own. Leaves out:
RoBERTa as a decoder, heads that mark tokens or spans.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Family, rules
from lapis.families.bert import (
    BOTH,
    COMPUTES,
    ENCODER,
    OLD_NAMES,
    RULES,
    read_encoder,
    write_encoder,
)
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import Gguf

CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
OWN = (
    *(rule for rule in RULES if not rule.outside),
    *rules("lm_head.dense", "head.transform", BOTH, outside=True),
    *rules("lm_head.layer_norm", "head.norm", BOTH, outside=True),
    *rules("lm_head", "head", "bias", outside=True),
    *rules("lm_head.decoder", "head", outside=True),
    *rules("lm_head.decoder", "head", "bias", outside=True, twin=True),
    *rules("classifier.dense", "head.dense", BOTH, outside=True),
    *rules("classifier.out_proj", "head.classes", BOTH, outside=True),
)


def read_config(fields: Fields) -> dict[str, Any]:
    shape = read_encoder(fields)
    if shape["head"] == "masked":
        fields.only("hidden_act", "gelu")
    first = fields.integer("pad_token_id", 1, least=0) + 1
    if shape["context"] <= first:
        raise CheckpointError(f"config.json: max_position_embeddings is {shape['context']}; positions begin at {first}")
    return {
        **shape,
        "family": str(fields.config["model_type"]),
        "context": shape["context"] - first,
        "first_position": first,
        "pooler": shape["head"] == "none",
        "class_dense": "tanh",
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    if config.head == "masked" and config.mlp != "gelu":
        raise ConfigError(
            f"mlp {config.mlp} has no place in a {config.family} folder with a masked head; its own is gelu"
        )
    first, pad = config.first_position, config.extra.get("pad_token_id")
    if first < 1 or pad not in (None, first - 1):
        raise ConfigError(
            f"first_position is {first}, pad_token_id {pad}; a {config.family} folder has the next number"
        )
    free = {"first_position": (first,), "class_dense": ("tanh",)}
    return {
        **write_encoder(config, CLASSES[config.family], **free),
        "max_position_embeddings": first + config.context,
        "pad_token_id": first - 1,
    }


def _preset(kind: str, dim: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": [CLASSES[kind] + "Model"], "vocab_size": vocab, "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * dim, "hidden_act": "gelu",
        "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
    }  # fmt: skip


_NEW = {
    **ENCODER,
    "norm_eps": 1e-5,
    "norm_place": "post",
    "types": 1,
    "tied": True,
    "first_position": 2,
    "class_dense": "tanh",
}

FAMILY = Family(
    name="roberta",
    model_types=tuple(CLASSES),
    rules=OWN,
    reader=read_config,
    writer=write_config,
    prefix="roberta.",
    ignored=(r"embeddings\.(?:position_ids|token_type_ids)$",),
    shapes=lambda config: {"embed.types": (config.types, config.dim), "head.transform": (config.dim, config.dim)},
    defaults=dict.fromkeys(CLASSES, _NEW),
    gguf=dict.fromkeys(CLASSES, Gguf("bert", inner=("masked",), imported=False, computes=COMPUTES)),
    presets={
        "roberta-base": _preset("roberta", 768, 12, 12, 50265),
        "roberta-large": _preset("roberta", 1024, 24, 16, 50265),
        "xlm-roberta-base": _preset("xlm-roberta", 768, 12, 12, 250002),
        "xlm-roberta-large": _preset("xlm-roberta", 1024, 24, 16, 250002),
    },
    spellings=OLD_NAMES,
)
