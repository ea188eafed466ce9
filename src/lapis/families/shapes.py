"""Shapes: of the parameters that families share, and of tensors on disk. No torch is imported to know them.

A model is never built to count it or to check a folder; a test compares these shapes with those of the model itself,
made on torch's meta device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lapis.families.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How a tensor on disk becomes one or several parameters, and back.

    Attributes:
        disk_shape: Shapes of the parameters -> shape on disk.
        apply: The tensor on disk, shapes of the parameters -> the parameters.
        invert: The parameters -> the tensor on disk.
        transposed: A matrix lies on disk with its inputs first.
        by_head: Makes the transform for a number of heads, where it depends on it.
        by_key_head: The same for a number of heads of keys of a delta net.
        split, join: What `apply` and `invert` do to rows alone, for matrices with other columns (an adapter's).
    """

    disk_shape: Callable[[Sequence[Shape]], Shape]
    apply: "Callable[[Tensor, Sequence[Shape]], tuple[Tensor, ...]]"
    invert: "Callable[[Sequence[Tensor]], Tensor]"
    transposed: bool = False
    by_head: "Callable[[int], Transform] | None" = None
    by_key_head: "Callable[[int], Transform] | None" = None
    split: "Callable[[Tensor, Sequence[int]], Sequence[Tensor]]" = lambda tensor, sizes: _split(
        tensor, [(size,) for size in sizes]
    )
    join: "Callable[[Sequence[Tensor]], Tensor]" = lambda tensors: _stack(tensors)


def _stack_shape(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _split(tensor: "Tensor", shapes: Sequence[Shape]) -> "tuple[Tensor, ...]":
    import torch

    return torch.split(tensor, [shape[0] for shape in shapes])


def _stack(tensors: "Sequence[Tensor]") -> "Tensor":
    import torch

    return torch.cat(tuple(tensors))


SAME = Transform(lambda shapes: shapes[0], lambda t, shapes: (t,), lambda ts: ts[0])
INPUTS_FIRST = replace(SAME, transposed=True)  # and it stays so
TRANSPOSE = Transform(
    lambda shapes: shapes[0][::-1], lambda t, shapes: (t.t().contiguous(),), lambda ts: ts[0].t(), transposed=True
)
STACK = Transform(_stack_shape, _split, _stack)
STACK_TRANSPOSE = Transform(
    lambda shapes: _stack_shape(shapes)[::-1],
    lambda t, shapes: _split(t.t().contiguous(), shapes),
    lambda ts: _stack(ts).t(),
    transposed=True,
)


def _stacked_by_head(heads: int) -> Transform:
    """As STACK, but the rows of one head follow those of another: q, k and v of head 0, then those of head 1, ..."""

    def split(tensor: "Tensor", shapes: Sequence[Shape]) -> "tuple[Tensor, ...]":
        by_head = tensor.reshape(heads, len(shapes), -1, *tensor.shape[1:])
        return tuple(by_head[:, i].flatten(0, 1) for i in range(len(shapes)))

    def join(tensors: "Sequence[Tensor]") -> "Tensor":
        import torch

        return torch.stack([tensor.reshape(heads, -1, *tensor.shape[1:]) for tensor in tensors], 1).flatten(0, 2)

    return Transform(
        _stack_shape, split, join, by_head=_stacked_by_head,
        split=lambda tensor, sizes: split(tensor, [(size,) for size in sizes]), join=join,
    )  # fmt: skip


def _groups_by_key_head(heads: int) -> Transform:
    """Rows of q, k, v and gate of the first head of keys, then those of the second, ...: parameters qkv and gate."""

    def split(tensor: "Tensor", shapes: Sequence[Shape]) -> "tuple[Tensor, ...]":
        import torch

        values = shapes[1][0] // heads
        keys = (shapes[0][0] // heads - values) // 2
        by_head = tensor.reshape(heads, -1, *tensor.shape[1:])
        *qkv, gate = (part.flatten(0, 1) for part in torch.split(by_head, [keys, keys, values, values], 1))
        return torch.cat(qkv), gate

    def join(tensors: "Sequence[Tensor]") -> "Tensor":
        import torch

        qkv, gate = tensors
        keys = (len(qkv) - len(gate)) // 2
        parts = [*torch.split(qkv, [keys, keys, len(gate)]), gate]
        return torch.cat([part.reshape(heads, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)

    return Transform(
        _stack_shape, split, join, by_key_head=_groups_by_key_head,
        split=lambda tensor, sizes: split(tensor, [(size,) for size in sizes]), join=join,
    )  # fmt: skip


def _stacked_by_key_head(heads: int) -> Transform:
    """As `_stacked_by_head`, over heads of keys."""
    return replace(_stacked_by_head(heads), by_head=None, by_key_head=_stacked_by_key_head)


BY_HEAD = _stacked_by_head(1)
BY_KEY_HEAD = _stacked_by_key_head(1)
GROUPS_BY_KEY_HEAD = _groups_by_key_head(1)
BATCH_OF_ONE = Transform(lambda shapes: (1, *shapes[0]), lambda t, shapes: (t[0],), lambda ts: ts[0][None])


def _of_experts(matrices: int) -> Transform:
    """One tensor for all experts, [experts, rows of their matrices one after another, columns]."""

    def disk_shape(shapes: Sequence[Shape]) -> Shape:
        return len(shapes) // matrices, *_stack_shape(shapes[:matrices])

    def split(tensor: "Tensor", shapes: Sequence[Shape]) -> "tuple[Tensor, ...]":
        return tuple(part for whole in tensor for part in _split(whole, shapes[:matrices]))

    def join(tensors: "Sequence[Tensor]") -> "Tensor":
        import torch

        return torch.stack([_stack(tensors[i : i + matrices]) for i in range(0, len(tensors), matrices)])

    return Transform(disk_shape, split, join)


EXPERT_PAIRS, EXPERT_MATRICES = _of_experts(2), _of_experts(1)


def common_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Component -> shape of its weight. A component that is not listed is a norm over the width, (dim,).

    Args:
        config: Of the model; `config.at(layer)` for the components of a block.
    """
    dim, ffn_dim, head_dim = config.dim, config.ffn_dim, config.head_dim
    inner, inner_kv = config.heads * head_dim, config.kv_heads * head_dim
    normed, normed_kv = (head_dim, head_dim) if config.qk_norm_over == "head" else (inner, inner_kv)
    dense = config.experts.dense_dim if config.experts is not None else ffn_dim
    return {
        "embed": (config.vocab, dim), "embed.position": (config.first_position + config.context, dim),
        "attn.q": (inner, dim), "attn.k": (inner_kv, dim), "attn.v": (inner_kv, dim), "attn.o": (dim, inner),
        "attn.q_norm": (normed,), "attn.k_norm": (normed_kv,),
        **_mlp_shapes("mlp", dense, dim), **_expert_shapes(config),
        "head": (config.vocab, dim), "head.pooler": (dim, dim), "head.dense": (dim, dim),
        "head.classes": (config.classes, dim),
    }  # fmt: skip


def _mlp_shapes(name: str, width: int, dim: int) -> dict[str, Shape]:
    return {f"{name}.gate": (width, dim), f"{name}.up": (width, dim), f"{name}.down": (dim, width)}


def _expert_shapes(config: ModelConfig) -> dict[str, Shape]:
    if config.experts is None:
        return {}
    return {
        "mlp.router": (config.experts.count, config.dim), **_mlp_shapes("mlp.experts", config.ffn_dim, config.dim),
        "mlp.shared_gate": (1, config.dim), **_mlp_shapes("mlp.shared", config.experts.shared_dim, config.dim),
    }  # fmt: skip


def has_parameter(config: ModelConfig, component: str, kind: str, layer: int | None) -> bool:
    """Whether a model of this shape has a parameter that its family's table lists."""
    group, _, name = component.partition(".")
    if component.startswith(("embed.layers", "inputs.", "norm.inputs")) and config.layer_inputs is None:
        return False
    if component in ("norm.mlp_dense", "norm.experts", "norm.experts_out") and config.experts is None:
        return False
    if group == "attn" and layer is not None:
        if config.borrows(layer) and name in ("k", "v", "k_norm"):
            return False
        if name == "v" and config.keys_are_values(layer):
            return False
    if group in ("attn", "delta") and layer is not None and config.mixes_by_state(layer) != (group == "delta"):
        return False
    if group in ("delta", "inputs", "scale"):
        return True
    if group == "mlp" and layer is not None:
        of_experts = name.split(".")[0] in ("router", "experts", "shared", "shared_gate")
        beside = config.experts is not None and config.experts.beside
        if of_experts != config.mixes_experts(layer) and not beside:
            return False
    if component in ("attn.q_norm", "attn.k_norm") and not config.qk_norm:
        return False
    if group == "norm" or name.endswith("norm"):
        if component == "norm.mlp" and config.parallel == "shared":
            return False
        if component == "norm.attn" and config.norm_place == "embed" and layer == 0:
            return False
        biased = config.norm == "layer" and config.norm_bias
        return (kind == "weight" or biased) and (component != "head.norm" or _transforms(config))
    if group == "attn":
        return kind == "weight" or config.bias in ("attention", "all") or (config.bias == "qkv" and name != "o")
    if name.startswith("shared"):
        return config.experts is not None and config.experts.shared_dim > 0
    if group == "mlp":
        return (name != "gate" or config.gated) and (kind == "weight" or config.bias in ("mlp", "all"))
    if group == "head":
        return _has_head(config, name, kind)
    return (name != "position" or config.positions == "learned") and (name != "types" or config.types > 0)


def _has_head(config: ModelConfig, name: str, kind: str) -> bool:
    classifier = config.head in ("classes", "scalar")
    if name == "":
        own = config.head in ("lm", "masked") and not config.tied
        return own if kind == "weight" else config.head == "masked"
    if name == "pooler":
        return config.pooler and (classifier or config.head == "none")
    if name == "dense":
        return classifier and config.class_dense not in ("none", "masked")
    if name == "classes":
        return classifier and (kind == "weight" or not config.causal)
    return _transforms(config) and (kind == "weight" or config.bias == "all")


def _transforms(config: ModelConfig) -> bool:
    """Whether the head has the dense layer and the norm of one for masked words."""
    return config.head == "masked" or (config.class_dense == "masked" and config.head in ("classes", "scalar"))
