"""Mixtures of experts in config.json and in names on disk: what Qwen's, OLMoE and Mixtral have in common.

In a folder each expert has matrices of its own. That is how the hub holds them and how transformers writes them, though
it stacks them in memory.
"""

from typing import Any

from lapis.errors import ConfigError
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


def read_experts(fields: Fields, count: str, balance: float, *, shared: str = "") -> dict[str, Any]:
    """ModelConfig's `experts`.

    Args:
        fields: Of config.json.
        count: The field that has their number; transformers knows it by another name, too.
        balance: Coefficient of the balance loss where the folder says none.
        shared: The field that has the inner width of the shared expert, in families that have one.
    """
    fields.keep("output_router_logits")
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [], None)
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}[count]
    count = count if count in fields.config or other not in fields.config else other
    fields.known.add("router_aux_loss_coef")
    off = fields.config.get("router_aux_loss_coef") == 0
    return {
        "count": fields.integer(count, most=MOST_EXPERTS),
        "active": fields.integer("num_experts_per_tok", most=MOST_EXPERTS),
        "shared_dim": fields.integer(shared) if shared else 0,
        "balance": 0.0 if off else fields.number("router_aux_loss_coef", balance),
    }


def write_experts(
    config: ModelConfig, count: str, *, shared: bool = False, always_normalized: bool = False
) -> dict[str, Any]:
    """The reverse of `read_experts`. Raises ConfigError for experts that such a folder cannot say.

    Args:
        config: Of the model.
        count: The field that has their number.
        shared: Whether the family has a shared expert.
        always_normalized: Whether the family has no field for weights that do not sum to 1.
    """
    experts = config.experts
    if experts is None or bool(experts.shared_dim) != shared or (always_normalized and not experts.normalized):
        one = "one shared expert" if shared else "no shared expert"
        more = ", with normalized weights" if always_normalized else ""
        raise ConfigError(f"experts={quoted(experts)} has no place in a {config.family} folder; it has {one}{more}")
    normalized = {} if always_normalized else {"norm_topk_prob": experts.normalized}
    return {
        count: experts.count,
        "num_experts_per_tok": experts.active,
        "router_aux_loss_coef": experts.balance,
        **normalized,
    }
