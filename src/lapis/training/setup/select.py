"""Which parts of a model a run trains: patterns to tune or to freeze, or a plan that `lapis plan` wrote.

tune: [layers.4-7.mlp]        # these, and nothing else
freeze: [embed, layers.0-3]   # all but these
tokens: ["<|im_start|>"]      # and of the embedding the rows of these tokens
share_rows: true              # which learn from tokens of the same characters, too (optim/rows.py)
plan: plan.yaml               # what the plan chose; with LoRA, its targets
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lapis.errors import ConfigError
from lapis.families import family_of, part_of
from lapis.families.patterns import covered_parts
from lapis.families.plan_file import PlanFile
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.optim.rows import features_of
from lapis.training.setup import lora


def select_parts(
    model: Transformer,
    *,
    lora_config: lora.LoraConfig | None = None,
    tune: Iterable[str] = (),
    freeze: Iterable[str] = (),
    tokens: Iterable[int | str] = (),
    share_rows: bool = False,
    plan: str | Path | None = None,
    base: str | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> None:
    """Makes a model ready to train some parts, an adapter, or (where nothing is given) all of it.

    Args:
        model: Changed in place.
        lora_config: Put an adapter on it.
        tune: Patterns of what is trained.
        freeze: Patterns of what is not.
        tokens: Rows of the embedding that are trained though the rest of it is not.
        share_rows: Whether these learn from tokens of the same characters, too.
        plan: A file of `lapis plan`, in place of tune and tokens.
        base: Where the model comes from.
        tokenizer: For tokens given as text.
        seed: Of the adapter's weights.
        device: Where the model will be, for weights that are packed there.

    Raises:
        ConfigError: For settings that exclude each other, a pattern that matches nothing, a plan for another model.
    """
    tune, freeze, tokens = tuple(tune), tuple(freeze), tuple(tokens)
    if plan is not None and (tune or tokens):
        raise ConfigError("train: give plan, or tune and tokens; both say what is trained")
    if plan is not None:
        planned = PlanFile.read(plan)
        planned.check_shape(model.config)
        tune, tokens = planned.patterns, planned.tokens
    if share_rows and (lora_config is not None or not tokens):
        raise ConfigError("train: share_rows is of the rows that tokens names, trained without an adapter")
    if lora_config is None:
        if not (tune or freeze or tokens):
            return
        if lora.of(model) is not None:
            raise ConfigError(
                f"train: {base} is an adapter, all of which is trained; leave out tune, freeze, tokens and plan"
            )
        if not (tune or freeze):
            raise ConfigError("train: tokens names rows to train where the rest is frozen; give tune or freeze as well")
        ids = lora.token_ids(tokens, tokenizer)
        choose(model, tune, freeze, ids)
        if share_rows and tokenizer is not None:
            for rows in lora.token_rows(model).values():
                rows.features_NF = features_of([tokenizer.text(number) for number in ids])
        return
    if freeze or (plan is None and (tune or tokens)):
        raise ConfigError(
            "train: lora freezes the model itself; name its parts in lora.targets and lora.tokens, not in tune, freeze "
            "or tokens"
        )
    if base is None:
        raise ConfigError("train: lora needs model, a folder; an adapter on a new model could not be used again")
    if plan is not None:
        lora_config = replace(lora_config, targets=tune, tokens=tuple(dict.fromkeys((*tokens, *lora_config.tokens))))
    lora.hold(model, lora_config, device or torch.device("cpu"))
    torch.manual_seed(seed)
    lora.wrap(model, replace(lora_config, tokens=lora.token_ids(lora_config.tokens, tokenizer)), base)
    model.notes.append(_adapter_line(model, lora_config))


def _adapter_line(model: Transformer, config: lora.LoraConfig) -> str:
    """What of a model is adapted, and how much that is."""
    adapted = {part_of(name).component for name in (*lora.adapters(model), *lora.stacked_adapters(model))}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"LoRA of rank {config.rank} and alpha {config.strength:g} beside {', '.join(sorted(adapted))}: "
        f"{count:,} parameters are trained"
    )


def describe(model: Transformer) -> dict[str, Any]:
    """What is trained, as JSON, for a rerun to agree with; empty where it is the whole model."""
    adapted, names = lora.of(model), [name for name, p in model.named_parameters() if p.requires_grad]
    facts: dict[str, Any] = {} if adapted is None else {"lora": asdict(adapted.config)}
    if adapted is not None or len(names) < sum(1 for _ in model.parameters()):
        facts["trained"] = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if adapted is None and (rows := lora.token_rows(model)):
        facts["tokens"] = next(iter(rows.values())).ids_N.tolist()
    return facts


def choose(model: Transformer, tune: Iterable[str] = (), freeze: Iterable[str] = (), tokens: Sequence[int] = ()) -> int:
    """Leaves what `tune` covers (all, where it is empty) and `freeze` does not to train; returns how many parameters.

    tokens: ids whose rows of the embedding, and of an untied head, are trained though the rest of it is not. Raises
    ConfigError for a pattern that matches nothing, with the nearest names, and where nothing is left.
    """
    tune, freeze = tuple(tune), tuple(freeze)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    family = family_of(model.config)
    trained = covered_parts(tune, parts.values(), "tune", family) if tune else set(parts.values())
    trained -= covered_parts(freeze, parts.values(), "freeze", family)
    if not (trained or tokens):
        raise ConfigError("train: tune and freeze leave nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[name] in trained)
    frozen = [name for name in lora.row_matrices(model) if not model.get_parameter(name).requires_grad]
    if tokens:
        lora.train_rows(model, list(tokens), frozen)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
