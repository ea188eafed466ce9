"""Parameters, memory and FLOPs, counted from a ModelConfig. No weight is read and no torch is imported.

Conventions: a multiply and an add are two FLOPs; only matrix products and attention are counted, since the rest is
below 1 %; training costs three times a forward pass (Kaplan et al. 2020, section 2.1). Leaves out: optimizer state,
and what frameworks add.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from lapis.families import ModelConfig, Part, parameter_shapes, part_of
from lapis.families.config import Delta

SHOWN = {"float32": 4, "bfloat16": 2, "int8": 1}
EMBED_PRODUCTS = ("embed.patch.weight", "embed.layers.project.weight")
DTYPE_BYTES = SHOWN | {"float64": 8, "float16": 2, "float8": 1, "uint8": 1}


@dataclass(frozen=True)
class Size:
    """What a model weighs. components: parameters by component outside the blocks; blocks: in each block.

    flops_per_token: one token's forward pass, averaged over a sequence of `context` tokens. activation_bytes: what a
    training step keeps for one sequence of that length in bfloat16 (logits in float32), without checkpointing.
    """

    config: ModelConfig
    context: int
    components: dict[str, int]
    blocks: tuple[dict[str, int], ...]
    flops_per_token: int
    attention_flops_per_token: int
    kv_cache_bytes: int
    activation_bytes: int

    @property
    def block(self) -> int:
        """Of the largest block."""
        return max(sum(block.values()) for block in self.blocks)

    @property
    def total(self) -> int:
        return sum(self.components.values()) + sum(sum(block.values()) for block in self.blocks)

    def group(self, prefix: str) -> int:
        """Parameters outside the blocks of a component and of what belongs to it: "embed" counts "embed.types" too."""
        return sum(n for name, n in self.components.items() if name == prefix or name.startswith(prefix + "."))

    def to_json(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The object that `lapis inspect --json` prints."""
        position = self.components.get("embed.position", 0)
        return {
            "family": self.config.family,
            "parameters": {
                "total": self.total,
                "embedding": self.group("embed") - position,
                "position": position,
                "block": self.block,
                "norm": self.group("norm"),
                "head": self.group("head"),
                "block_components": max(self.blocks, key=lambda block: sum(block.values())),
                "components": self.components,
                "with_head": other_heads(self.config),
            },
            "memory": {
                "weights_bytes": self.total * DTYPE_BYTES[dtype],
                "weights_bytes_by_dtype": {name: self.total * size for name, size in SHOWN.items()},
                "kv_cache_bytes": self.kv_cache_bytes,
                "activation_bytes": self.activation_bytes,
                "dtype": dtype,
            },
            "flops": {
                "per_token": self.flops_per_token,
                "per_token_training": 3 * self.flops_per_token,
                "attention_per_token": self.attention_flops_per_token,
                "per_sequence": self.flops_per_token * self.context,
            },
            "context": self.context,
            "layers": [
                {"layer": layer, "parameters": sum(block.values()), "components": block,
                 "window": self.config.window if self.config.windowed(layer) else None}
                for layer, block in enumerate(self.blocks)
            ],
        }  # fmt: skip


def measure(config: ModelConfig, context: int | None = None) -> Size:
    """What a model of this shape weighs at a context length (default: the one it was made for)."""
    context = context or config.context
    components: dict[str, int] = {}
    kinds = config.kinds
    blocks: dict[int, dict[str, int]] = {first: {} for first in kinds}
    products = 0  # weights that a token is multiplied with
    for name, shape in parameter_shapes(config).items():
        part = part_of(name)
        into = components if part.layer is None else blocks[part.layer]
        into[part.group] = into.get(part.group, 0) + prod(shape)
        is_product = (
            len(shape) > 1 and part.kind == "weight" and (not name.startswith("embed.") or name in EMBED_PRODUCTS)
        )
        times = is_once(config, name) if part.layer is None else kinds.count(part.layer)
        products += int(prod(shape) * times * is_product * active_share(config, part))
    if config.tied and config.head in ("lm", "masked"):
        products += config.vocab * config.dim
    attending = [layer for layer in range(config.layers) if not config.mixes_by_state(layer)]
    seen = [visible_keys(config, layer, context) for layer in attending]
    widths = {layer: config.at(layer) for layer in attending}
    attention = int(sum(4 * config.heads * widths[i].head_dim * keys for i, keys in zip(attending, seen, strict=True)))
    kv_cache = sum(
        (min(context, config.window or context) if config.windowed(layer) else context)
        * 2 * own.kv_heads * own.head_dim * 2
        for layer, own in widths.items() if config.causal and not config.borrows(layer)
    )  # fmt: skip
    if (delta := config.delta) is not None:  # the state is read twice and written once; it is kept in float32
        state = delta.values * delta.head_dim
        attention += len(delta.layers) * 6 * state
        kv_cache += len(delta.layers) * (4 * state + 2 * delta.channels * (delta.kernel - 1))
    return Size(
        config, context, components, tuple(blocks[first] for first in kinds), 2 * products + attention, attention,
        kv_cache, activation_bytes(config, context),
    )  # fmt: skip


def is_once(config: ModelConfig, name: str) -> bool:
    """Whether a product outside the blocks is done for every token; a classifier's is done once in a sequence."""
    return not name.startswith(("head.pooler", "head.dense", "head.classes"))


def active_share(config: ModelConfig, part: Part) -> Fraction:
    """How much of a parameter a token goes through: of experts as many as are active; all are of one shape."""
    expert = re.fullmatch(r"mlp\.experts\.(?:(\d+)\.)?.+", part.component)
    if config.experts is None or not expert:
        return Fraction(1)
    if expert[1] is None:  # all of them in one parameter
        return Fraction(config.experts.active, config.experts.count)
    return Fraction(int(expert[1]) < config.experts.active)


def visible_keys(config: ModelConfig, layer: int, context: int) -> float:
    """How many keys a token of this layer sees, averaged over a sequence of `context` tokens."""
    if not config.causal and not config.windowed(layer):
        return context
    window = min(config.window or context, context) if config.windowed(layer) else context
    back = (window * (window + 1) / 2 + (context - window) * window) / context
    return back if config.causal else 2 * back - 1


def activation_bytes(config: ModelConfig, context: int, width: int = 2) -> int:
    """What autograd keeps of one sequence: what goes into each product, norm, activation and attention.

    Attention's scores are never kept whole (Dao et al. 2022, arXiv:2205.14135).

    Args:
        config: Of the model.
        context: Tokens of the sequence.
        width: Bytes of each number.
    """
    if config.uneven is not None:  # layer by layer; what a layer's inputs add is not counted
        own = [config.at(layer) for layer in range(config.layers)]
        alike = [dataclasses.replace(each, uneven=None, layers=1, vocab=1, window=None, head="none") for each in own]
        each_stream = context * 2 * config.dim * width
        logits = config.vocab * 4 * context if config.head == "lm" else 0
        return sum(activation_bytes(each, context, width) - each_stream for each in alike) + each_stream + logits
    inner, inner_kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    matrices = 4 if config.gated else 2
    mlp = matrices * config.ffn_dim
    if config.experts is not None:  # of each chosen one also what goes in and out, and the weighted input of `down`
        dense = len(config.experts.dense_layers)
        beside = config.experts.shared_dim + (config.experts.dense_dim if config.experts.beside else 0)
        sparse = config.experts.active * (mlp + config.ffn_dim + 2 * config.dim) + matrices * beside
        mlp = ((config.layers - dense) * sparse + dense * matrices * config.experts.dense_dim) // config.layers
    attending = config.layers if config.delta is None else config.layers - len(config.delta.layers)
    attention = 2 * inner + 2 * inner_kv if config.delta is None else 4 * inner + 2 * inner_kv  # there it has a gate
    numbers = config.layers * (4 * config.dim + mlp) + attending * attention + 2 * config.dim
    logits = config.vocab * 4 if config.head in ("lm", "masked") else 0
    return context * (numbers * width + logits + _delta_bytes(config.delta, context, width))


def _delta_bytes(delta: Delta | None, context: int, width: int) -> int:
    """What autograd keeps of one token in all delta nets. Queries, keys, values and the state are in float32.

    Of each head of values: queries and keys three times, six rows of a chunk's triangle, what is read of the state and
    written to it, the gate, and a share of the state at the chunk's beginning; and the channels about the convolution.
    """
    if delta is None:
        return 0
    chunk = min(delta.CHUNK, context)
    keys = 3 * delta.value_heads * delta.head_dim
    states = delta.values * delta.head_dim // chunk + 6 * delta.value_heads * chunk
    copies = delta.channels + delta.values if width != 4 else 0
    floats = keys + states + 7 * delta.values + 8 * delta.value_heads + copies
    return len(delta.layers) * (4 * floats + width * (3 * delta.channels + 2 * delta.values))


def other_heads(config: ModelConfig) -> dict[str, int]:
    """The total with another head of the family, where the name of a published size means more than one of them."""
    if config.family != "bert":
        return {}
    return {"masked": measure(dataclasses.replace(config, head="masked", pooler=False, tied=True)).total}


GROWTH = (
    ("weights", "none, but for learned positions"),
    ("FLOPs per token, products", "none"),
    ("FLOPs per token, attention", "linear, up to the window"),
    ("KV cache", "linear, up to the window"),
    ("activations of a training step", "linear"),
    ("FLOPs of a whole sequence", "linear, and a quadratic part from attention"),
)


def lengths(config: ModelConfig, context: int) -> list[dict[str, int]]:
    """Memory (bytes) and FLOPs of a token at lengths that double, up to four times what the model was made for.

    Args:
        config: Of the model.
        context: A length that is among them.
    """
    rows = []
    for length in sorted({*(2**n for n in range(7, 30) if 2**n <= 4 * config.context), context}):
        figures = measure(config, length).to_json()
        rows.append({
            "context": length, "weights": figures["memory"]["weights_bytes"],
            "cache": figures["memory"]["kv_cache_bytes"], "flops": figures["flops"]["per_token"],
            "attention": figures["flops"]["attention_per_token"],
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Mixer:
    """What one way of mixing an input of `tokens` x `features` costs. mixes: what can reach what."""

    name: str
    parameters: int
    flops: int
    mixes: str


def mixers(tokens: int, features: int) -> list[Mixer]:
    """Three layers that map tokens x features to the same shape: what each costs, with biases.

    A fully connected layer has a weight from every number to every other. A per-token layer (a 1x1 convolution) mixes
    features only. Attention mixes both, with parameters that do not depend on the number of tokens.

    Args:
        tokens: Of a sequence.
        features: Of each token.
    """
    numbers = tokens * features
    return [
        Mixer("fully connected", numbers * numbers + numbers, 2 * numbers * numbers, "everything"),
        Mixer("per token (1x1)", features * features + features, 2 * tokens * features * features,
              "features"),
        Mixer("attention", 4 * (features * features + features), 8 * tokens * features**2 + 4 * tokens**2 * features,
              "tokens, features"),
    ]  # fmt: skip


def measure_headers(index: Mapping[str, Any], part: Any) -> dict[str, Any]:
    """What headers alone say of a model whose family is not known. part: name -> Part (Checkpoint.part)."""
    layers: dict[int, dict[str, int]] = {}
    outside: dict[str, int] = {}
    for name, info in index.items():
        place = part(name)
        into = outside if place.layer is None else layers.setdefault(place.layer, {})
        into[place.component] = into.get(place.component, 0) + info.elements
    return {
        "family": None,
        "parameters": {
            "total": sum(info.elements for info in index.values()),
            "embedding": outside.get("embed", 0),
            "position": outside.get("embed.position", 0),
            "block": sum(layers[min(layers)].values()) if layers else 0,
            "head": outside.get("head", 0),
            "components": outside,
        },
        "memory": {"weights_bytes": sum(info.nbytes for info in index.values()), "kv_cache_bytes": None},
        "flops": {"per_token": None},
        "layers": [
            {"layer": i, "parameters": sum(layers[i].values()), "components": layers[i]} for i in sorted(layers)
        ],
    }


def free_memory() -> int | None:
    """Bytes of memory that this process may still take: of the machine, or of its container where that has less.

    Linux only; None where the system does not say.
    """
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in lines:
            free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(free)) if free else None
