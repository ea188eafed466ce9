"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): an encoder with rotary positions, gated MLPs and local attention.

Of every third layer the tokens see the whole text, of the others their neighbours on both sides. The norm after the
embedding is that of the first attention, too. Leaves out: heads that mark tokens or spans.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Family, Rule, refuse_shape, rules
from lapis.families.bert import BOTH, HEAD_NAMES, HEADS
from lapis.families.config import ModelConfig, Rope, complete
from lapis.families.fields import TOKENS, Fields
from lapis.families.gguf import Gguf
from lapis.families.llama import GATE_NAMES, GATES, read_biases, write_biases
from lapis.families.rotary import read_ropes, write_ropes
from lapis.families.shapes import STACK
from lapis.families.windows import FULL, WINDOWED, read_layer_types, write_layer_types

BLOCK, LEAD = "layers.{layer}.", "blocks.{layer}."
RULES = (
    *rules("embeddings.tok_embeddings", "embed"),
    *rules("embeddings.norm", "norm.embed", BOTH),
    *rules(BLOCK + "attn_norm", "norm.attn", BOTH),
    *(
        Rule(f"{BLOCK}{disk}.{kind}", tuple(f"{LEAD}{group}.{part}.{kind}" for part in parts), component, STACK)
        for disk, group, parts, component in (
            ("attn.Wqkv", "attn", ("q", "k", "v"), "attn.qkv"),
            ("mlp.Wi", "mlp", ("gate", "up"), "mlp.gate_up"),
        )
        for kind in BOTH.split()
    ),
    *rules(BLOCK + "attn.Wo", "attn.o", BOTH),
    *rules(BLOCK + "mlp_norm", "norm.mlp", BOTH),
    *rules(BLOCK + "mlp.Wo", "mlp.down", BOTH),
    *rules("final_norm", "norm.final", BOTH),
    *rules("head.dense", "head.transform", BOTH, outside=True),
    *rules("head.norm", "head.norm", BOTH, outside=True),
    *rules("decoder", "head", BOTH, outside=True),
    *rules("classifier", "head.classes", BOTH, outside=True),
)
EVERY = 3  # layers, of which the first sees everything, where config.json does not say
POOLING = {"cls": "token", "mean": "mean"}
DROPOUTS = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")


def read_config(fields: Fields) -> dict[str, Any]:
    head, layers = fields.head(HEADS, "none"), fields.layers("num_hidden_layers")
    classes, context = fields.labels() if head == "classes" else 0, fields.integer("max_position_embeddings")
    bias, mlp = read_biases(fields), fields.choice("hidden_activation", GATES, "gelu")
    fields.only("position_embedding_type", "absolute", "rope")  # older folders have BERT's field, which nothing reads
    fields.only("decoder_bias", True)
    fields.only("classifier_bias", bias == "all")
    fields.only("rope_scaling", None)
    if fields.choice("classifier_activation", GATES, "gelu") != mlp:
        raise CheckpointError(
            f"config.json: classifier_activation is {fields.config.get('classifier_activation')}; lapis reads it where "
            "it is hidden_activation"
        )
    fields.keep(*TOKENS, "cls_token_id", "initializer_range", "initializer_cutoff_factor", *DROPOUTS)
    fields.known.update(("layer_norm_eps", "reference_compile", "repad_logits_with_grad", "deterministic_flash_attn",
                         "sparse_prediction", "sparse_pred_ignore_index"))  # fmt: skip
    window, window_layers = _read_window(fields, layers)
    rope, near = read_ropes(fields, context, 160_000.0, 10_000.0, "local_rope_theta", "global_rope_theta")
    return {
        "family": "modernbert",
        "dim": fields.integer("hidden_size"),
        "layers": layers,
        "heads": fields.integer("num_attention_heads"),
        "ffn_dim": fields.integer("intermediate_size"),
        "vocab": fields.integer("vocab_size"),
        "context": context,
        "norm": "layer",
        "norm_eps": fields.number("norm_eps", 1e-5),
        "norm_place": "embed",
        "norm_bias": fields.flag("norm_bias", False),
        "mlp": mlp,
        "rope": rope,
        "window_rope": near,
        "window": window,
        "window_layers": window_layers,
        "causal": False,
        "bias": bias,
        "tied": fields.flag("tie_word_embeddings", True),
        "head": "scalar" if classes == 1 else head,
        "classes": classes,
        "class_dense": "masked",
        "pooling": fields.choice("classifier_pooling", POOLING, "cls"),
    }


def _read_window(fields: Fields, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """local_attention is the width to both sides together, without the token itself."""
    types, every = read_layer_types(fields, layers), fields.integer("global_attn_every_n_layers", EVERY)
    chosen = tuple(i for i in range(layers) if i % every) if types is None else types
    window = fields.integer("local_attention", 128, least=0) // 2 + 1
    return (window, None if len(chosen) == layers else chosen) if chosen else (None, None)


def write_config(config: ModelConfig) -> dict[str, Any]:
    refuse_shape(config, {
        "norm": ("layer",), "norm_place": ("embed",), "positions": ("rotary",), "causal": (False,), "qk_norm": (False,),
        "mlp": tuple(GATE_NAMES), "bias": ("none", "attention", "mlp", "all"), "image": (None,), "types": (0,),
        "head": tuple(HEAD_NAMES), "kv_heads": (config.heads,), "class_dense": ("masked",), "pooler": (False,),
        "norm_bias": (True, False), "pooling": tuple(POOLING.values()), "window_rope": (config.window_rope,),
    })  # fmt: skip
    if config.head_dim * config.heads != config.dim:
        raise ConfigError(f"head_dim {config.head_dim} has no place in a modernbert folder; it is dim / heads there")
    near = config.window_rope or config.rope
    ropes = write_ropes(config.rope, near)
    written = {
        "architectures": ["ModernBert" + HEAD_NAMES[config.head]],
        "model_type": "modernbert",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        "hidden_activation": GATE_NAMES[config.mlp],
        "classifier_activation": GATE_NAMES[config.mlp],
        "max_position_embeddings": config.context,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        **write_biases(config),
        "classifier_bias": config.bias == "all",
        "decoder_bias": True,
        "classifier_pooling": next(name for name, pooling in POOLING.items() if pooling == config.pooling),
        "tie_word_embeddings": config.tied,
        "local_attention": 2 * ((config.window or 65) - 1),
        "layer_types": write_layer_types(config),
        "global_rope_theta": config.rope.theta,
        "local_rope_theta": near.theta,
        "rope_parameters": ropes["rope_parameters"],
    }
    if (every := _every(written["layer_types"])) is not None:
        written["global_attn_every_n_layers"] = every
    return complete(config, written)


def _every(types: list[str]) -> int | None:
    """global_attn_every_n_layers, which older versions of transformers read; None where no number says the same."""
    every = types.index(FULL, 1) if FULL in types[1:] else len(types)
    return every if types == [WINDOWED if i % every else FULL for i in range(len(types))] else None


def _keys(config: ModelConfig) -> dict[str, Any]:
    """What a GGUF file says of windows. Raises ConfigError for others than llama.cpp computes."""
    every, near = _every(write_layer_types(config)), config.window_rope or config.rope
    if every is None or config.window is None or near != Rope(theta=near.theta):
        raise ConfigError(
            "llama.cpp gives modernbert a window in all layers but each so many, from the first on, with rotary "
            "positions of a base of their own; this model has no GGUF file"
        )
    return {"attention.sliding_window": 2 * (config.window - 1), "attention.sliding_window_pattern": every,
            "rope.freq_base_swa": near.theta}  # fmt: skip


def _preset(dim: int, layers: int, heads: int, ffn_dim: int) -> dict[str, Any]:
    return {
        "model_type": "modernbert", "architectures": ["ModernBertModel"], "vocab_size": 50368, "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn_dim,
        "hidden_activation": "gelu", "max_position_embeddings": 8192, "norm_eps": 1e-5, "local_attention": 128,
        "global_attn_every_n_layers": EVERY, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0,
        "classifier_pooling": "mean",
    }  # fmt: skip


FAMILY = Family(
    name="modernbert",
    model_types=("modernbert",),
    rules=RULES,
    reader=read_config,
    writer=write_config,
    prefix="model.",
    block="modernbert",
    shapes=lambda config: {"head.transform": (config.dim, config.dim)},
    defaults={"modernbert": {
        "norm": "layer", "norm_eps": 1e-5, "norm_place": "embed", "norm_bias": False, "causal": False, "mlp": "geglu",
        "tied": True, "rope": {"theta": 160_000.0}, "window_rope": {"theta": 10_000.0}, "class_dense": "masked",
    }},
    gguf={"modernbert": Gguf(
        "modern-bert", inner=("masked",), imported=False, own_windows=True, more=_keys,
        computes={"norm": ("layer",), "norm_place": ("embed",), "norm_bias": (False,), "positions": ("rotary",),
                  "causal": (False,), "head": ("none", "masked"), "bias": ("none",), "rope.kind": ("default",),
                  "mlp": ("geglu",)},
    )},
    presets={
        "modernbert-base": _preset(768, 22, 12, 1152),
        "modernbert-large": _preset(1024, 28, 16, 2624),
    },
)  # fmt: skip
