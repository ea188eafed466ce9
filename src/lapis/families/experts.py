"""Mixtures of experts in config.json and in names on disk: what Qwen's, OLMoE and Mixtral have in common.

In a folder each expert has matrices of its own. That is how the hub holds them and how transformers writes them, though
it stacks them in memory.
"""

from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.base import Rule, rules
from lapis.families.config import MOST_EXPERTS, ModelConfig
from lapis.families.fields import Fields
from lapis.families.llama import BLOCK, RULES
from lapis.parsing import quoted

MLPS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def expert_rules(lead: str, names: dict[str, str]) -> tuple[Rule, ...]:
    """Llama's table with experts where it has an MLP.

    Args:
        lead: What the names of router and experts begin with.
        names: Matrix of an MLP here -> its name on disk.
    """
    return (
        *(rule for rule in RULES if not rule.component.startswith("mlp.")),
        *rules(f"{BLOCK}{lead}.gate", "mlp.router"),
        *(
            rule
            for here, disk in names.items()
            for rule in rules(f"{BLOCK}{lead}.experts.{{expert}}.{disk}", f"mlp.experts.{{expert}}.{here}")
        ),
    )


def read_experts(fields: Fields, count: str, balance: float, *, shared: str = "", layers: int = 0) -> dict[str, Any]:
    """ModelConfig's `experts`.

    Args:
        fields: Of config.json.
        count: The field that has their number; transformers knows it by another name, too.
        balance: Coefficient of the balance loss where the folder says none.
        shared: The field that has the inner width of the shared expert, in families that have one.
        layers: Of the model, in families of which some can have an ordinary MLP.
    """
    fields.keep("output_router_logits")
    dense = _dense_layers(fields, layers)
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}[count]
    count = count if count in fields.config or other not in fields.config else other
    fields.known.add("router_aux_loss_coef")
    off = fields.config.get("router_aux_loss_coef") == 0
    return {
        "count": fields.integer(count, most=MOST_EXPERTS),
        "active": fields.integer("num_experts_per_tok", most=MOST_EXPERTS),
        "shared_dim": fields.integer(shared) if shared else 0,
        "balance": 0.0 if off else fields.number("router_aux_loss_coef", balance),
        **({"dense_layers": dense, "dense_dim": fields.integer("intermediate_size")} if dense else {}),
    }


def _dense_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """The layers with an ordinary MLP: those named, and those whose number, from 1, is no multiple of the step."""
    if not layers:
        fields.only("decoder_sparse_step", 1)
        fields.only("mlp_only_layers", [], None)
        return ()
    fields.known.add("mlp_only_layers")
    step, named = fields.integer("decoder_sparse_step", 1), fields.config.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(layer) is int and 0 <= layer < layers for layer in named):
        raise CheckpointError(
            f"config.json: mlp_only_layers is {quoted(named)}; expected a list of layers from 0 to {layers - 1}"
        )
    dense = tuple(layer for layer in range(layers) if layer in named or (layer + 1) % step)
    if len(dense) == layers:
        raise CheckpointError("config.json: mlp_only_layers and decoder_sparse_step leave no layer with experts")
    return dense


def write_experts(
    config: ModelConfig, count: str, *, shared: bool = False, always_normalized: bool = False, dense: bool = False
) -> dict[str, Any]:
    """The reverse of `read_experts`. Raises ConfigError for experts that such a folder cannot say.

    Args:
        config: Of the model.
        count: The field that has their number.
        shared: Whether the family has a shared expert.
        always_normalized: Whether the family has no field for weights that do not sum to 1.
        dense: Whether it has one for layers with an ordinary MLP.
    """
    experts = config.experts
    if experts is None or bool(experts.shared_dim) != shared or (always_normalized and not experts.normalized):
        one = "one shared expert" if shared else "no shared expert"
        more = ", with normalized weights" if always_normalized else ""
        raise ConfigError(f"experts={quoted(experts)} has no place in a {config.family} folder; it has {one}{more}")
    if experts.dense_layers and not dense:
        raise ConfigError(f"experts.dense_layers has no place in a {config.family} folder; all its layers have experts")
    of_layers = {"decoder_sparse_step": 1, "mlp_only_layers": list(experts.dense_layers),
                 "intermediate_size": experts.dense_dim} if experts.dense_layers else {}  # fmt: skip
    normalized = {} if always_normalized else {"norm_topk_prob": experts.normalized}
    return {
        count: experts.count,
        "num_experts_per_tok": experts.active,
        "router_aux_loss_coef": experts.balance,
        **normalized,
        **of_layers,
    }
