"""Qwen3.5, dense, text: layers of a gated delta net, every fourth one of attention whose output is gated.

Of a folder with pictures (model_type "qwen3_5") the language model is run; what lapis saves of it is "qwen3_5_text".
Leaves out: its mixtures of experts (qwen3_5_moe.py), the layers that predict several tokens (mtp), and positions of
pictures.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import WRAPPED, Family, Rule, rules
from lapis.families.config import Delta, ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import ROTARY, FileTensor, Gguf, Runs
from lapis.families.llama import BLOCK, RULES, llama_like, preset, read_decoder, write_decoder
from lapis.families.rotary import read_rope, write_share
from lapis.families.shapes import BY_HEAD, Shape
from lapis.families.windows import FULL

LEAD, LINEAR = "blocks.{layer}.", "linear_attention"
EVERY, SHARE = 4, 0.25  # layers, of which the last has attention; how much of a head turns: where config.json is silent
DELTA = {"qkv": "in_proj_qkv", "gate": "in_proj_z", "beta": "in_proj_b", "decay": "in_proj_a", "conv": "conv1d",
         "norm": "norm", "o": "out_proj"}  # fmt: skip
OWN = (
    *(rule for rule in RULES if rule.component != "attn.q" and not rule.disk.endswith("_proj.bias")),
    Rule(
        BLOCK + "self_attn.q_proj.weight", (LEAD + "attn.q.weight", LEAD + "attn.gate.weight"), "attn.q_gate", BY_HEAD
    ),
    *(rule for here, disk in DELTA.items() for rule in rules(f"{BLOCK}linear_attn.{disk}", f"delta.{here}")),
    Rule(BLOCK + "linear_attn.dt_bias", (LEAD + "delta.steps",), "delta.steps"),
    Rule(BLOCK + "linear_attn.A_log", (LEAD + "delta.rates",), "delta.rates"),
)
CLASSES = {"lm": "Qwen3_5ForCausalLM", "classes": "Qwen3_5TextForSequenceClassification",
           "scalar": "Qwen3_5TextForSequenceClassification", "none": "Qwen3_5TextModel"}  # fmt: skip
SIZES = {"heads": "linear_num_key_heads", "value_heads": "linear_num_value_heads", "head_dim": "linear_key_head_dim",
         "value_dim": "linear_value_head_dim", "kernel": "linear_conv_kernel_dim"}  # fmt: skip


def read_config(fields: Fields) -> dict[str, Any]:
    layers = fields.layers("num_hidden_layers")
    fields.only("attention_bias", False)
    fields.only("attn_output_gate", True)
    fields.known.update(("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"))
    rope = read_rope(fields, fields.integer("max_position_embeddings"), share=SHARE)
    return {
        **read_decoder(fields, head_dim=256, rope=rope),
        "qk_norm": True,
        "delta": {
            "layers": _read_layers(fields, layers),
            **{here: fields.integer(name) for here, name in SIZES.items()},
        },
    }


def _read_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """The layers of the delta net, by layer_types or by the interval of older folders."""
    every = fields.integer("full_attention_interval", EVERY)
    types = fields.layer_types(layers, (FULL, LINEAR))
    types = types or [FULL if (i + 1) % every == 0 else LINEAR for i in range(layers)]
    return tuple(i for i, name in enumerate(types) if name == LINEAR)


def write_config(config: ModelConfig) -> dict[str, Any]:
    return write_delta(config, CLASSES)


def write_delta(config: ModelConfig, classes: Mapping[str, str], **allowed: tuple[Any, ...]) -> dict[str, Any]:
    """config.json of a model with a delta net. Raises ConfigError for a shape that such a folder cannot say.

    Args:
        config: Of the model.
        classes: Head -> the class of transformers.
        allowed: As for `write_decoder`.
    """
    if config.delta is None:
        raise ConfigError(f"a {config.family} folder has layers of a delta net; give delta: {{layers: [0, 1, 2], ...}}")
    turns = {"rope.share": (config.rope.share,), "delta": (config.delta,)}
    result = write_decoder(config, "", qk_norm=(True,), head=tuple(classes), **turns, **allowed)
    types = [LINEAR if layer in config.delta.layers else FULL for layer in range(config.layers)]
    return {
        **write_share(result, config.rope),
        "architectures": [classes[config.head]],
        "layer_types": types,
        **{name: getattr(config.delta, here) for here, name in SIZES.items()},
    }


def own_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Of the delta net, and of the gate of attention."""
    delta, dim = config.delta, config.dim
    if delta is None:
        return {}
    return {
        "attn.gate": (config.heads * config.head_dim, dim), "delta.qkv": (delta.channels, dim),
        "delta.conv": (delta.channels, 1, delta.kernel), "delta.gate": (delta.values, dim),
        "delta.beta": (delta.value_heads, dim), "delta.decay": (delta.value_heads, dim),
        "delta.steps": (delta.value_heads,), "delta.rates": (delta.value_heads,), "delta.norm": (delta.value_dim,),
        "delta.o": (dim, delta.values),
    }  # fmt: skip


def gguf_keys(config: ModelConfig) -> dict[str, Any]:
    """What a GGUF file says of the delta net. Raises ConfigError for one that llama.cpp does not compute."""
    delta = _delta(config)
    if delta.head_dim != delta.value_dim:
        raise ConfigError(
            f"heads of values are {delta.value_dim} wide and those of keys {delta.head_dim}; llama.cpp computes "
            f"{config.family} with one width for both, so this model has no GGUF file"
        )
    every = next((layer + 1 for layer in range(config.layers) if layer not in delta.layers), config.layers + 1)
    if delta.layers != tuple(layer for layer in range(config.layers) if (layer + 1) % every):
        raise ConfigError(
            f"llama.cpp gives {config.family} attention in one layer of {every}, in order; this model has no GGUF file"
        )
    return {
        "ssm.conv_kernel": delta.kernel, "ssm.state_size": delta.head_dim, "ssm.group_count": delta.heads,
        "ssm.time_step_rank": delta.value_heads, "ssm.inner_size": delta.values, "full_attention_interval": every,
    }  # fmt: skip


def _delta(config: ModelConfig) -> Delta:
    assert config.delta is not None
    return config.delta


def _tiled(width: int, before: int = 0) -> Callable[[ModelConfig], Runs]:
    """Heads of values as llama.cpp has them: the first of each head of keys, then the second of each, ...

    Args:
        width: Of a head; 0 = value_dim.
        before: 1 where all queries and keys come before them.
    """

    def runs(config: ModelConfig) -> Runs:
        delta = _delta(config)
        each, size = delta.value_heads // delta.heads, width or delta.value_dim
        lead = before * (delta.channels - delta.values)
        begins = [lead + (key * each + n) * size for n in range(each) for key in range(delta.heads)]
        return ((0, lead), *((begin, begin + size) for begin in begins))

    return runs


PLAIN = {
    "attn.q_gate": (FileTensor(),), "delta.norm": (FileTensor(),), "delta.conv": (FileTensor(),),
    "delta.steps": (FileTensor("blk.{layer}.ssm_dt.bias"),),
    "delta.rates": (FileTensor("blk.{layer}.ssm_a", negative_exp=True),),
}  # fmt: skip
TILED = {
    "attn.q_gate": (FileTensor(),), "delta.norm": (FileTensor(),),
    "delta.qkv": (FileTensor(rows=_tiled(0, 1)),), "delta.conv": (FileTensor(rows=_tiled(0, 1)),),
    "delta.gate": (FileTensor(rows=_tiled(0)),), "delta.o": (FileTensor(columns=_tiled(0)),),
    "delta.beta": (FileTensor(rows=_tiled(1)),), "delta.decay": (FileTensor(rows=_tiled(1)),),
    "delta.steps": (FileTensor("blk.{layer}.ssm_dt.bias", columns=_tiled(1)),),
    "delta.rates": (FileTensor("blk.{layer}.ssm_a", columns=_tiled(1), negative_exp=True),),
}  # fmt: skip
AXES = {"rope.dimension_sections": [11, 11, 10, 0]}  # of pictures; to text they are all one
COMPUTES = {**ROTARY, "mlp": ("swiglu",), "bias": ("none",), "rope.neighbors": (False,),
            "rope.kind": ("default", "linear", "yarn")}  # fmt: skip


def tiled_gguf(arch: str) -> Gguf:
    """Qwen3.5's files, dense or with experts."""
    return Gguf(arch, norm_offset=1.0, partial=True, imported=False, computes=COMPUTES, tensors=TILED,
                more=lambda config: {**gguf_keys(config), **AXES})  # fmt: skip


def delta_preset(model_type: str, dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab: int,
                 value_heads: int, **more: Any) -> dict[str, Any]:  # fmt: skip
    """A published size of the language model alone: what all with a delta net share, and `more` fields."""
    return preset(
        model_type, dim, layers, heads, kv_heads, ffn_dim, vocab, 262144, theta=1e7, eps=1e-6, head_dim=256,
        partial_rotary_factor=SHARE, linear_num_key_heads=16, linear_num_value_heads=value_heads,
        linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, **more,
    )  # fmt: skip


def delta_family(name: str, model_type: str, **more: Any) -> Family:
    """A family with this block; `more` as for `Family`."""
    return llama_like(
        name=name, model_types=(model_type,), shapes=own_shapes, block="qwen3_5",
        ignored=(r"rotary_emb\.inv_freq$", r"^mtp\."),
        defaults={model_type: {"qk_norm": True, "rope": {"theta": 1e7, "share": SHARE}}}, **more,
    )  # fmt: skip


FAMILY = delta_family(
    "qwen3_5",
    "qwen3_5_text",
    wrappers=("qwen3_5",),
    spellings=WRAPPED,
    rules=OWN,
    reader=read_config,
    writer=write_config,
    gguf={"qwen3_5_text": tiled_gguf("qwen35")},
    presets={
        "qwen3.5-9b": delta_preset("qwen3_5_text", 4096, 32, 16, 4, 12288, 248320, value_heads=32),
        "qwen3.5-27b": delta_preset("qwen3_5_text", 5120, 64, 24, 4, 17408, 248320, value_heads=48),
    },
)
