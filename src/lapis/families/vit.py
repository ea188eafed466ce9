"""ViT (Dosovitskiy et al. 2020): a picture as patches, a class token before them, an encoder like BERT's, pre-norm.

Leaves out: pictures of another size than config.json's, mask tokens, reading image files (bring pixels).
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Family, Rule, refuse_shape, rules
from lapis.families.bert import ACTIVATION_NAMES, ACTIVATIONS, ENCODER
from lapis.families.config import ModelConfig, complete
from lapis.families.fields import Fields
from lapis.families.shapes import BATCH_OF_ONE, Shape
from lapis.parsing import quoted

BLOCK = "encoder.layer.{layer}."
BOTH = "weight bias"
RULES = (
    Rule("embeddings.cls_token", ("embed.cls",), "embed.cls"),
    Rule("embeddings.position_embeddings", ("embed.position.weight",), "embed.position", BATCH_OF_ONE),
    *rules("embeddings.patch_embeddings.projection", "embed.patch", BOTH),
    *rules(BLOCK + "layernorm_before", "norm.attn", BOTH),
    *rules(BLOCK + "attention.attention.query", "attn.q", BOTH),
    *rules(BLOCK + "attention.attention.key", "attn.k", BOTH),
    *rules(BLOCK + "attention.attention.value", "attn.v", BOTH),
    *rules(BLOCK + "attention.output.dense", "attn.o", BOTH),
    *rules(BLOCK + "layernorm_after", "norm.mlp", BOTH),
    *rules(BLOCK + "intermediate.dense", "mlp.up", BOTH),
    *rules(BLOCK + "output.dense", "mlp.down", BOTH),
    *rules("layernorm", "norm.final", BOTH),
    *rules("pooler.dense", "head.pooler", BOTH),
    *rules("classifier", "head.classes", BOTH, outside=True),
)
_OWN = {  # in a layer: name in a folder -> what transformers 5 calls it
    "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}  # fmt: skip
SPELLINGS = tuple((rf"(^|\.)layers\.(\d+)\.{new}\.", rf"\1encoder.layer.\2.{old}.") for old, new in _OWN.items())
MODULES = tuple((rf"(^|\.)encoder\.layer\.(\d+)\.{old}\.", rf"\1layers.\2.{new}.") for old, new in _OWN.items())
HEADS = {"ForImageClassification": "classes", "Model": "none"}
HEAD_NAMES = {"classes": "ForImageClassification", "scalar": "ForImageClassification", "none": "Model"}


def read_config(fields: Fields) -> dict[str, Any]:
    head = fields.head(HEADS, "none")
    classes = fields.labels() if head == "classes" else 0
    size, patch = square(fields, "image_size"), square(fields, "patch_size")
    if size % patch:
        raise CheckpointError(f"config.json: image_size {size} is not a multiple of patch_size {patch}")
    dim = fields.integer("hidden_size")
    fields.only("qkv_bias", True)
    fields.only("pooler_output_size", dim, None)
    fields.only("pooler_act", "tanh")
    fields.keep("initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob")
    return {
        "family": "vit",
        "dim": dim,
        "layers": fields.layers("num_hidden_layers"),
        "heads": fields.integer("num_attention_heads"),
        "ffn_dim": fields.integer("intermediate_size"),
        "vocab": 0,
        "context": (size // patch) ** 2 + 1,
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_eps"),
        "mlp": fields.choice("hidden_act", ACTIVATIONS),
        "positions": "learned",
        "causal": False,
        "bias": "all",
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
        "pooler": head == "none",
        "image": {"size": size, "patch": patch, "channels": fields.integer("num_channels", 3)},
    }


def square(fields: Fields, name: str) -> int:
    """A side in pixels, written as one number or as two that are equal."""
    value = fields.config.get(name)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        if value[0] != value[1]:
            raise CheckpointError(f"config.json: {name} is {quoted(value)}; lapis reads squares only")
        return Fields({name: value[0]}).integer(name)
    return fields.integer(name)


def write_config(config: ModelConfig) -> dict[str, Any]:
    refuse_shape(config, {
        "norm": ("layer",), "norm_place": ("pre",), "positions": ("learned",), "causal": (False,), "qk_norm": (False,),
        "mlp": tuple(ACTIVATION_NAMES), "bias": ("all",), "types": (0,), "window": (None,), "head": tuple(HEAD_NAMES),
        "kv_heads": (config.heads,),
    })  # fmt: skip
    if config.image is None or config.head_dim * config.heads != config.dim:
        raise ConfigError("a vit folder has an image, and head_dim = dim / heads")
    written = {
        "architectures": ["ViT" + HEAD_NAMES[config.head]],
        "model_type": "vit",
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        "hidden_act": ACTIVATION_NAMES[config.mlp],
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image.size,
        "patch_size": config.image.patch,
        "num_channels": config.image.channels,
        "qkv_bias": True,
    }
    return complete(config, written, absent=())


def _preset(dim: int, layers: int, heads: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": dim, "num_labels": 1000,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * dim, "hidden_act": "gelu",
        "image_size": 224, "patch_size": patch, "num_channels": 3, "layer_norm_eps": 1e-12,
    }  # fmt: skip


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    image, dim = config.image, config.dim
    if image is None:
        return {}
    return {
        "embed.cls": (1, 1, dim), "embed.patch": (dim, image.channels, image.patch, image.patch),
        "embed.position": (image.patches + 1, dim),
    }  # fmt: skip


FAMILY = Family(
    name="vit",
    model_types=("vit",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="vit.",
    spellings=SPELLINGS,
    modules=MODULES,
    ignored=(r"embeddings\.mask_token$",),
    shapes=_shapes,
    defaults={"vit": ENCODER},
    presets={
        "vit-base-patch16-224": _preset(768, 12, 12, 16),
        "vit-large-patch16-224": _preset(1024, 24, 16, 16),
        "vit-huge-patch14-224": _preset(1280, 32, 16, 14),
    },
)
