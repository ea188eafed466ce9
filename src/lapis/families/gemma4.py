"""Gemma 4, text (Google DeepMind 2026, as published): Gemma 3's layers of two kinds, whose sizes differ here.

Layers that see everything have wider heads, turn a quarter of each, and may take their keys as values. The last layers
may read the keys and values of earlier ones; each layer may read a vector of each token's own; experts may stand beside
the MLP. Of a folder with pictures or sound (model_type "gemma4") the language model is run; what lapis saves of it is
"gemma4_text". Leaves out: attention in both directions over all tokens, classifiers.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import WRAPPED, Family, Rule, refuse_shape, rules
from lapis.families.config import MOST_EXPERTS, ModelConfig, Rope, complete
from lapis.families.fields import TOKENS, Fields
from lapis.families.gemma2 import read_cap
from lapis.families.gemma3 import BLOCK, PATTERN
from lapis.families.gemma3 import RULES as GEMMA3
from lapis.families.gguf import ROTARY, Gguf
from lapis.families.llama import GATE_NAMES, GATES, HEADS, read_biases, write_biases, write_sizes
from lapis.families.rotary import ROPE_KINDS, read_rope, write_rope, write_share
from lapis.families.shapes import Shape
from lapis.families.windows import FULL, WINDOWED, read_layer_types, write_window
from lapis.parsing import quoted

LEAD = "blocks.{layer}."
RULES = (
    *(rule for rule in GEMMA3 if rule.component != "head.classes"),
    Rule("embed_tokens_per_layer.weight", ("embed.layers.weight",), "embed.layers"),
    *rules("per_layer_model_projection", "embed.layers.project"),
    *rules("per_layer_projection_norm", "embed.layers.norm"),
    *rules(BLOCK + "per_layer_input_gate", "inputs.gate"),
    *rules(BLOCK + "per_layer_projection", "inputs.out"),
    *rules(BLOCK + "post_per_layer_input_norm", "norm.inputs_out"),
    *rules(BLOCK + "router.proj", "mlp.router"),
    Rule(BLOCK + "router.scale", (LEAD + "mlp.router.scale",), "mlp.router.scale"),
    Rule(BLOCK + "router.per_expert_scale", (LEAD + "mlp.router.gains",), "mlp.router.gains"),
    Rule(BLOCK + "experts.gate_up_proj", (LEAD + "mlp.experts.gate_up.weight",), "mlp.experts.gate_up"),
    Rule(BLOCK + "experts.down_proj", (LEAD + "mlp.experts.down.weight",), "mlp.experts.down"),
    *rules(BLOCK + "post_feedforward_layernorm_1", "norm.mlp_dense"),
    *rules(BLOCK + "pre_feedforward_layernorm_2", "norm.experts"),
    *rules(BLOCK + "post_feedforward_layernorm_2", "norm.experts_out"),
    Rule(BLOCK + "layer_scalar", (LEAD + "scale",), "scale"),
)
CLASSES = {"lm": "Gemma4ForCausalLM", "none": "Gemma4TextModel"}
THETA, NEAR_THETA, SHARE, FULL_HEAD = 1e6, 1e4, 0.25, 512  # where config.json does not say


def read_config(fields: Fields) -> dict[str, Any]:
    layers, head = fields.layers("num_hidden_layers"), fields.head(HEADS, "lm")
    heads, dim = fields.integer("num_attention_heads", 8), fields.integer("hidden_size")
    context, window = fields.integer("max_position_embeddings", 131_072), fields.integer("sliding_window", 512)
    fields.only("use_bidirectional_attention", None, "vision")  # over pictures, of which there are none in text
    fields.keep(*TOKENS, "initializer_range", "attention_dropout", "use_bidirectional_attention")
    types = read_layer_types(fields, layers)
    types = tuple(i for i in range(layers) if (i + 1) % PATTERN) if types is None else types
    chosen = tuple(i for i in types if i < layers - 1)  # transformers makes the last layer see everything
    ropes = fields.mapping("rope_parameters")
    if ropes and not {FULL} <= set(ropes) <= {FULL, WINDOWED}:
        raise CheckpointError(f"config.json: rope_parameters must be given for {FULL} and {WINDOWED}")
    full_rope = ropes.get(FULL) or {"rope_type": "proportional", "partial_rotary_factor": SHARE}
    vocab, kv_heads = fields.integer("vocab_size", 262_144), fields.integer("num_key_value_heads", 4)
    return {
        "family": "gemma4_text",
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": fields.integer("head_dim", 256),
        "query_scalar": 1.0,
        "vocab": vocab,
        "context": context,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "mlp": fields.choice("hidden_activation", GATES, "gelu_pytorch_tanh"),
        "rope": _read_rope(full_rope, context, THETA),
        "window_rope": _read_rope(ropes.get(WINDOWED) or {}, context, NEAR_THETA),
        "window": window if chosen else None,
        "window_layers": chosen or None,
        "bias": read_biases(fields, mlp=False),
        "qk_norm": True,
        "logit_cap": read_cap(fields, "final_logit_softcapping"),
        "tied": fields.flag("tie_word_embeddings", True),
        "head": head,
        "uneven": _read_uneven(fields, layers, kv_heads, chosen),
        "layer_inputs": _read_inputs(fields, vocab),
        **_read_mlp(fields),
    }


def _read_rope(written: Any, context: int, theta: float) -> dict[str, Any]:
    fields = Fields({"rope_theta": theta, "rope_parameters": written})
    rope = read_rope(fields, context, theta, 1.0, (*ROPE_KINDS, "proportional"))
    if rope["share"] != 1 and rope["kind"] != "proportional":
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {rope['share']} where rope_type is {quoted(rope['kind'])}; in "
            "gemma4_text only proportional positions turn a part"
        )
    return rope


def _read_uneven(fields: Fields, layers: int, kv_heads: int, windowed: tuple[int, ...]) -> dict[str, Any]:
    """What full layers have of their own: by layer in folders of newer transformers, else in fields for all of them."""
    same = fields.flag("attention_k_eq_v", False)
    own = fields.optional("num_global_key_value_heads") if same else None
    fields.known.add("num_global_key_value_heads")
    sizes = {"head_dim": fields.integer("global_head_dim", FULL_HEAD), "num_key_value_heads": own or kv_heads}
    if by_layer := fields.mapping("per_layer_config"):
        full = {str(layer) for layer in range(layers)} - {str(layer) for layer in windowed}
        each = list(by_layer.values())
        if set(by_layer) != full or any(entry != each[0] for entry in each) or not set(each[0]) <= set(sizes):
            raise CheckpointError(
                f"config.json: per_layer_config is {quoted(dict(by_layer))}; lapis reads one head_dim and one "
                f"num_key_value_heads for all layers of {FULL}, and none for others"
            )
        inner = Fields(each[0])
        sizes = {"head_dim": inner.integer("head_dim", fields.integer("head_dim", 256)),
                 "num_key_value_heads": inner.integer("num_key_value_heads", kv_heads)}  # fmt: skip
    borrowing = fields.integer("num_kv_shared_layers", 0, least=0, most=layers - 1)
    return {
        "head_dim": sizes["head_dim"],
        "kv_heads": sizes["num_key_value_heads"],
        "keys_as_values": same,
        "borrowing": borrowing,
        "double": fields.flag("use_double_wide_mlp", False) and borrowing > 0,
    }


def _read_inputs(fields: Fields, vocab: int) -> dict[str, int] | None:
    width = fields.integer("hidden_size_per_layer_input", 256, least=0)
    rows = fields.integer("vocab_size_per_layer_input", 262_144, least=0)
    if not width:
        return None
    if rows < vocab:
        raise CheckpointError(
            f"config.json: vocab_size_per_layer_input is {rows:,}, fewer than vocab_size {vocab:,}; each token needs a "
            "row in embed_tokens_per_layer, too"
        )
    return {"width": width, "vocab": rows}


def _read_mlp(fields: Fields) -> dict[str, Any]:
    """The MLP, and experts beside it where there are some."""
    width, names = fields.integer("intermediate_size"), ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not fields.flag("enable_moe_block", False):
        fields.known.update(names)
        return {"ffn_dim": width}
    if fields.flag("use_double_wide_mlp", False):
        raise CheckpointError("config.json: use_double_wide_mlp with enable_moe_block is not published; lapis has no "
                              "such block")  # fmt: skip
    count, active, inner = (fields.integer(name, most=MOST_EXPERTS) for name in names)
    return {
        "ffn_dim": inner,
        "experts": {"count": count, "active": active, "dense_dim": width, "beside": True},
    }


def write_config(config: ModelConfig) -> dict[str, Any]:
    uneven, inputs, experts = config.uneven, config.layer_inputs, config.experts
    if uneven is None:
        raise ConfigError(f"a {config.family} folder says sizes of full layers; give uneven: {{head_dim: ...}}")
    refuse_shape(config, {
        "norm": ("rms",), "norm_place": ("pre",), "positions": ("rotary",), "causal": (True,), "qk_norm": (True,),
        "mlp": tuple(GATE_NAMES), "bias": ("none", "attention"), "types": (0,), "image": (None,),
        "head": tuple(CLASSES), "query_scalar": (1.0,), "window_rope": (config.window_rope,), "uneven": (uneven,),
        "layer_inputs": (inputs,), "experts": (experts,), "logit_cap": (config.logit_cap,),
        "rope.share": (config.rope.share if config.rope.kind == "proportional" else 1.0,),
    })  # fmt: skip
    if config.windowed(config.layers - 1) or config.window_rope is None:
        raise ConfigError(f"the last layer of a {config.family} model has no window, and those before it a window_rope")
    if uneven.kv_heads != config.kv_heads and not uneven.keys_as_values:
        raise ConfigError("uneven.kv_heads differs from kv_heads, which a gemma4_text folder says with keys_as_values")
    if experts is not None and (not experts.beside or not experts.normalized or experts.shared_dim):
        raise ConfigError(
            f"experts={quoted(experts)} has no place in a {config.family} folder; they stand beside an MLP"
        )
    full = [str(layer) for layer in range(config.layers) if not config.windowed(layer)]
    own = {"head_dim": uneven.head_dim, **({"num_key_value_heads": uneven.kv_heads} if uneven.keys_as_values else {})}
    ropes = {name: _write_rope(rope) for name, rope in ((FULL, config.rope), (WINDOWED, config.window_rope))}
    written = {
        "architectures": [CLASSES[config.head]],
        "model_type": config.family,
        **write_sizes(config),
        "hidden_activation": GATE_NAMES[config.mlp],
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        **write_biases(config, mlp=False),
        "tie_word_embeddings": config.tied,
        **write_window(config, null=False),
        "rope_parameters": ropes,
        "global_head_dim": uneven.head_dim,
        "num_global_key_value_heads": uneven.kv_heads if uneven.keys_as_values else None,
        "per_layer_config": dict.fromkeys(full, own),
        "attention_k_eq_v": uneven.keys_as_values,
        "num_kv_shared_layers": uneven.borrowing,
        "use_double_wide_mlp": uneven.double,
        "hidden_size_per_layer_input": inputs.width if inputs else 0,
        "vocab_size_per_layer_input": inputs.vocab if inputs else config.vocab,
        "final_logit_softcapping": config.logit_cap or None,
        "enable_moe_block": experts is not None,
        "num_experts": experts.count if experts else None,
        "top_k_experts": experts.active if experts else None,
        "moe_intermediate_size": config.ffn_dim if experts else None,
        "intermediate_size": experts.dense_dim if experts else config.ffn_dim,
    }
    return complete(config, written)


def _write_rope(rope: Any) -> dict[str, Any]:
    written = write_rope(rope)
    parameters: dict[str, Any] = (write_share(written, rope) if rope.kind == "proportional" else written)[
        "rope_parameters"
    ]
    return parameters


def own_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Of what each layer reads of a token, and of all experts of a block in one tensor."""
    dim, width = config.dim, config.ffn_dim
    inputs, count = config.layer_inputs, config.experts.count if config.experts else 0
    shapes: dict[str, Shape] = {
        "scale": (1,), "mlp.router.scale": (dim,), "mlp.router.gains": (count,),
        "mlp.experts.gate_up": (count, 2 * width, dim), "mlp.experts.down": (count, dim, width),
    }  # fmt: skip
    if inputs is None:
        return shapes
    return shapes | {
        "embed.layers": (inputs.vocab, config.layers * inputs.width),
        "embed.layers.project": (config.layers * inputs.width, dim), "embed.layers.norm": (inputs.width,),
        "inputs.gate": (inputs.width, dim), "inputs.out": (dim, inputs.width),
    }  # fmt: skip


def _preset(
    dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, *, each: int = PATTERN, **fields: Any
) -> dict[str, Any]:
    """Of the language model alone."""
    return {
        "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256,
        "global_head_dim": 512, "intermediate_size": ffn_dim, "vocab_size": 262_144, "sliding_window": 512,
        "layer_types": [FULL if (i + 1) % each == 0 else WINDOWED for i in range(layers)],
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True, "hidden_size_per_layer_input": 0, **fields,
    }  # fmt: skip


_INPUTS: dict[str, Any] = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144}
_LARGE: dict[str, Any] = {"attention_k_eq_v": True, "sliding_window": 1024, "max_position_embeddings": 262_144}


def _keys(config: ModelConfig) -> dict[str, Any]:
    """What a GGUF file says of layers of two kinds. Raises ConfigError where llama.cpp computes something else."""
    uneven, inputs, experts, near = config.uneven, config.layer_inputs, config.experts, config.window_rope
    assert uneven is not None and near is not None
    if config.window is None or near != Rope(theta=near.theta):
        raise ConfigError(f"llama.cpp computes {config.family} with windows whose rotary positions are not stretched; "
                          "this model has no GGUF file")  # fmt: skip
    if inputs is not None and inputs.vocab != config.vocab:
        raise ConfigError(f"layer_inputs.vocab is {inputs.vocab:,}; llama.cpp wants {config.vocab:,}, one row a token")
    layers = range(config.layers)
    width = config.ffn_dim if experts is None else experts.dense_dim
    kv_heads = [config.at(layer).kv_heads for layer in layers]
    return {
        "attention.key_length": uneven.head_dim, "attention.value_length": uneven.head_dim,
        "attention.key_length_swa": config.head_dim, "attention.value_length_swa": config.head_dim,
        "rope.dimension_count": uneven.head_dim, "rope.dimension_count_swa": config.head_dim,
        "rope.freq_base_swa": near.theta, "attention.shared_kv_layers": uneven.borrowing,
        "attention.head_count_kv": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        "feed_forward_length": [config.at(layer).ffn_dim for layer in layers] if uneven.double else width,
        "embedding_length_per_layer_input": inputs.width if inputs else 0,
        **({"final_logit_softcapping": config.logit_cap} if config.logit_cap else {}),
    }  # fmt: skip


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4_text",),
    wrappers=("gemma4",),
    spellings=WRAPPED,
    rules=RULES,
    reader=read_config,
    writer=write_config,
    shapes=own_shapes,
    prefix="model.",
    ignored=(r"rotary_emb\.\w*inv_freq$",),
    block="gemma4",
    gguf={"gemma4_text": Gguf(
        "gemma4", says_windows=True, imported=False, more=_keys,
        files={"mlp.router.scale": "blk.{layer}.ffn_gate_inp.scale",
               "mlp.router.gains": "blk.{layer}.ffn_down_exps.scale"},
        computes={**ROTARY, "mlp": ("geglu_tanh",), "bias": ("none",), "rope.kind": ("proportional",)},
    )},
    defaults={"gemma4_text": {"qk_norm": True, "mlp": "geglu_tanh", "tied": True, "query_scalar": 1.0,
                              "rope": {"theta": THETA, "kind": "proportional", "share": SHARE},
                              "window_rope": {"theta": NEAR_THETA}, "logit_cap": 30.0}},
    presets={
        "gemma-4-e2b": _preset(1536, 35, 8, 1, 6144, each=5, num_kv_shared_layers=20, use_double_wide_mlp=True,
                               **_INPUTS),
        "gemma-4-e4b": _preset(2560, 42, 8, 2, 10_240, num_kv_shared_layers=18, **_INPUTS),
        "gemma-4-31b": _preset(5376, 60, 32, 16, 21_504, num_global_key_value_heads=4, **_LARGE),
        "gemma-4-26b-a4b": _preset(2816, 30, 16, 8, 2112, num_global_key_value_heads=2, enable_moe_block=True,
                                   num_experts=128, top_k_experts=8, moe_intermediate_size=704, **_LARGE),
    },
)  # fmt: skip
