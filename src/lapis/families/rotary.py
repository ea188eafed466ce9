"""Rotary positions in config.json: how families spell the base and how it is stretched, read and written."""

from typing import Any

from lapis.errors import CheckpointError
from lapis.families.config import Rope
from lapis.families.fields import Fields
from lapis.families.windows import FULL, WINDOWED
from lapis.parsing import quoted

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(
    fields: Fields, context: int, theta: float = 10_000.0, share: float | None = None,
    kinds: tuple[str, ...] = ROPE_KINDS,
) -> dict[str, Any]:  # fmt: skip
    """Rope's fields from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Where a folder has both, `rope_scaling` counts alone, in every version of transformers.

    Args:
        fields: Of config.json.
        context: Of the model.
        theta: The base where the folder says none.
        share: How much of each head turns where the folder does not say; None for a family that turns whole heads.
        kinds: How the family may stretch them.
    """
    theta = fields.number("rope_theta", theta)
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    written = scaling or parameters
    inner = Fields(written)
    if scaling and "rope_theta" not in {*scaling, *fields.config} and parameters.get("rope_theta", theta) != theta:
        raise CheckpointError(
            "config.json: rope_theta stands in rope_parameters alone, which rope_scaling replaces; write it beside both"
        )
    if {FULL, WINDOWED} & set(written):
        raise CheckpointError(
            f"config.json: rope_parameters is {quoted(dict(written))}; this family has one set for all layers"
        )
    kind = written.get("rope_type") or written.get("type") or "default"
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"config.json: rope type is {quoted(kind)}; lapis reads {', '.join(kinds)}")
    rope: dict[str, Any] = {"theta": inner.number("rope_theta", theta), "kind": kind}
    if share is not None:
        rope["share"] = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", share))
    elif {written.get("partial_rotary_factor", 1.0), fields.config.get("partial_rotary_factor", 1.0)} != {1.0}:
        raise CheckpointError("config.json: partial_rotary_factor is not 1; this family rotates whole heads only")
    needed = {"linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())  # fmt: skip
    for name in needed:
        rope[name] = inner.number(name)
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if written.get(name):
                rope[name] = inner.number(name)
        rope["truncate"] = inner.flag("truncate", True)
    if kind in ("yarn", "llama3"):
        rope["original_context"] = inner.integer("original_max_position_embeddings", context)
    if kind == "proportional" and written.get("factor") is not None:
        rope["factor"] = inner.number("factor")
    if written.get("llama_4_scaling_beta") is not None:
        rope["query_growth"] = inner.number("llama_4_scaling_beta")
    return rope


def read_ropes(
    fields: Fields, context: int, theta: float, near_theta: float, near_name: str, name: str = "rope_theta"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rope's fields of full layers and of those with a window: by layer type (transformers 5), or older fields.

    What stretches the context stretches the full layers alone.

    Args:
        fields: Of config.json.
        context: Of the model.
        theta: The base of full layers where the folder says none.
        near_theta: That of layers with a window.
        near_name: The older field that has it.
        name: The older field that has the base of full layers.
    """
    by_type = fields.mapping("rope_parameters")
    if by_type and not set(by_type) <= {FULL, WINDOWED}:
        raise CheckpointError(f"config.json: rope_parameters must be given for {FULL} and {WINDOWED}")
    written = {**Fields(by_type).mapping(FULL), **fields.mapping("rope_scaling")}
    full = {"rope_theta": fields.number(name, theta), "rope_parameters": written}
    near = {"rope_theta": fields.number(near_name, near_theta), "rope_parameters": by_type.get(WINDOWED)}
    return read_rope(Fields(full), context), read_rope(Fields(near), context)


def write_ropes(rope: Rope, near: Rope) -> dict[str, Any]:
    """Both spellings, for full layers and for those with a window."""
    full, windowed = write_rope(rope), write_rope(near)
    return {
        "rope_theta": full["rope_theta"],
        "rope_scaling": full["rope_scaling"],
        "rope_parameters": {FULL: full["rope_parameters"], WINDOWED: windowed["rope_parameters"]},
    }


def write_share(result: dict[str, Any], rope: Rope) -> dict[str, Any]:
    """What `write_rope` gave, or a config.json with it in it, and how much of each head turns.

    Args:
        result: Is returned, changed.
        rope: Of a family whose heads may turn in part.
    """
    result["partial_rotary_factor"] = rope.share
    for place in filter(None, (result["rope_scaling"], result["rope_parameters"])):
        place["partial_rotary_factor"] = rope.share
    return result


def write_rope(rope: Rope) -> dict[str, Any]:
    """Both spellings: `rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for those before."""
    scaling: dict[str, Any] = {}
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind}
        names = {"yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(rope.kind, ("factor",))  # fmt: skip
        scaling |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
        if rope.kind == "yarn" and not rope.truncate:
            scaling["truncate"] = False
        if rope.query_growth is not None:
            scaling["llama_4_scaling_beta"] = rope.query_growth
        if rope.original_context:
            scaling["original_max_position_embeddings"] = rope.original_context
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": "default", **scaling},
    }
