"""An adapted model <-> an adapter folder that PEFT reads and writes.

Families whose folders hold q, k and v fused (GPT-2) have one adapter over the three: they share A, and B is stacked;
what was not adapted of them is rows of zeros there. Leaves out: what LoRA computes (lora.py), the format's checks
(checkpoint/adapter.py).
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lapis.checkpoint.adapter import CONFIG, LEAD, WEIGHTS, open_adapter
from lapis.checkpoint.adapter_names import APART, RUNS_APART, short_name, shortest, stem_of
from lapis.checkpoint.store import Adapter
from lapis.checkpoint.tensor_file import write_tensors
from lapis.errors import CheckpointError, ConfigError
from lapis.families import Family, Rule, family_of
from lapis.families.config import class_fields
from lapis.model.blocks.nf4 import Nf4Linear
from lapis.model.blocks.stacked import LoraStacked, StackedLinear
from lapis.model.check import disk_layout
from lapis.model.lora import (
    Adapted,
    LoraConfig,
    LoraLinear,
    adapters,
    begin,
    of,
    place,
    put_rows,
    row_lengths,
    row_matrices,
    stacked_adapters,
    token_rows,
)
from lapis.model.transformer import Transformer

_TASKS = {"lm": "CAUSAL_LM", "classes": "SEQ_CLS", "scalar": "SEQ_CLS"}


def write_adapter(model: Transformer, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """What PEFT writes, into a folder (made if not there). dtype: of the tensors; None = as the model holds them."""
    adapted = of(model)
    assert adapted is not None, "wrap the model first"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, config = {name: tensor.to(dtype) for name, tensor in _tensors(model).items()}, _config(model, adapted)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", **_labels(model)})


def attach(model: Transformer, adapter: Adapter) -> Transformer:
    """Puts an adapter on the model that it was made for, in place; all of it stays trainable.

    Args:
        model: The base.
        adapter: Opened, and with values for modules of this model.

    Raises:
        CheckpointError: For a module that the model does not have, or of another shape.
    """
    family = family_of(model.config)
    config = LoraConfig(
        rank=int(adapter.config["r"]), alpha=float(adapter.config["lora_alpha"]),
        dropout=float(adapter.config.get("lora_dropout", 0.0)), rslora=bool(adapter.config.get("use_rslora")),
        dora=adapter.dora, tokens=tuple(dict.fromkeys(i for ids, _ in adapter.rows.values() for i in ids)), whole=(),
    )  # fmt: skip
    begin(model, config, adapter.base)
    for module, name in adapter.bases.items():
        shape, rule = adapter.weights.info(name).shape, _places(model, family, adapter, module)[0]
        if rule.component in ("embed", "head") and shape[0] != model.config.vocab:
            raise CheckpointError(f"{adapter.root}: {module} has {shape[0]:,} rows, the base {model.config.vocab:,}; "
                                  "make it a model with: lapis fuse")  # fmt: skip
    for module, kinds in adapter.pairs.items():
        rule, names = _places(model, family, adapter, module)
        if module in adapter.stacked:
            _attach_stacked(model, adapter, module, names[0])
            continue
        length_O = adapter.read(kinds["magnitude"]).float().flatten() if adapter.dora else None
        linears = [_linear(model, name) for name in names]
        if any(type(linear) is not nn.Linear for linear in linears):
            raise CheckpointError(f"{adapter.root}: {module} is adapted, which lapis runs for linear layers only; "
                                  "make it a model with: lapis fuse")  # fmt: skip
        sizes = [linear.out_features for linear in linears]
        a_shape, b_shape = (adapter.weights.info(kinds[kind]).shape for kind in "AB")
        if a_shape[1] != linears[0].in_features or b_shape[0] != sum(sizes):
            raise CheckpointError(f"{adapter.root}: {module} has lora_A {list(a_shape)} and lora_B {list(b_shape)}; "
                                  f"the base is {sum(sizes)}x{linears[0].in_features}")  # fmt: skip
        a_RI, b_OR = adapter.low_rank(module, partial(_joined, rule, linears))
        device = linears[0].weight.device
        shared = nn.Parameter(a_RI.to(device))
        split = rule.transform.split
        lengths = [None] * len(sizes) if length_O is None else split(length_O, sizes)
        for name, linear, b, length in zip(names, linears, split(b_OR, sizes), lengths, strict=True):
            magnitude = None if length is None else nn.Parameter(length.clone().to(device))
            b_own = nn.Parameter(b.clone().to(device))
            place(model, name, LoraLinear(linear, shared, b_own, adapter.scale(module), config.dropout, magnitude))
    put_rows(model, {name: (ids, value) for name, (ids, value) in _rows(model, family, adapter).items()})
    adapted = of(model)
    assert adapted is not None
    for name, tensor in _whole(model, family, adapter).items():
        parameter = model.get_parameter(name)
        adapted.originals[name] = parameter.detach().clone()
        parameter.data = tensor.to(parameter.device, parameter.dtype)
        parameter.requires_grad_(True)
    _read_labels(model, adapter)
    return model


def _attach_stacked(model: Transformer, adapter: Adapter, module: str, name: str) -> None:
    base = model.get_submodule(name)
    if type(base) is not StackedLinear:
        raise CheckpointError(f"{adapter.root}: {module} holds no experts in one tensor in the base")
    count, inputs, outputs = base.sizes()
    a_XRI, b_XOR = adapter.stacks(module)
    if (len(a_XRI), len(b_XOR)) != (count, count) or (a_XRI.shape[2], b_XOR.shape[1]) != (inputs, outputs):
        raise CheckpointError(
            f"{adapter.root}: {module} has adapters of {len(a_XRI)} experts of {b_XOR.shape[1]}x{a_XRI.shape[2]}; "
            f"the base has {count} of {outputs}x{inputs}"
        )
    a_own, b_own = (nn.Parameter(each.to(base.weight.device)) for each in (a_XRI, b_XOR))
    place(model, name, LoraStacked(base, a_own, b_own, adapter.scale(module)))


@torch.no_grad()
def restore_adapter(model: Transformer, folder: Path | str) -> None:
    """The values of an adapter folder that `write_adapter` made of this very model, put back into it."""
    adapter, family = open_adapter(folder), family_of(model.config)
    here, stacked = adapters(model), stacked_adapters(model)
    for module, kinds in adapter.pairs.items():
        rule, names = _places(model, family, adapter, module)
        if module in adapter.stacked:
            a_XRI, b_XOR = adapter.stacks(module)
            stacked[names[0]].lora_A.copy_(a_XRI)
            stacked[names[0]].lora_B.copy_(b_XOR)
            continue
        sizes = [_linear(model, name).out_features for name in names]
        a_RI = adapter.read(kinds["A"])
        pieces = {kind: rule.transform.split(adapter.read(name), sizes) for kind, name in kinds.items() if kind != "A"}
        for i, name in enumerate(names):
            if name not in here:
                continue
            here[name].lora_A.copy_(a_RI)
            here[name].lora_B.copy_(pieces["B"][i])
            if (magnitude := here[name].magnitude) is not None:
                magnitude.copy_(pieces["magnitude"][i])
    rows = token_rows(model)
    for name, (_, values) in _rows(model, family, adapter).items():
        rows[name].rows.copy_(values)
    for name, tensor in _whole(model, family, adapter).items():
        model.get_parameter(name).copy_(tensor)


@torch.no_grad()
def fold(model: Transformer) -> Transformer:
    """Adds the adapter to the weights, in place, rounded once to their dtype; what is left is a plain model."""
    for name, module in adapters(model).items():
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter((module.weight.float() + module.delta()).to(module.weight.dtype))
        plain.bias = module.bias
        place(model, name, plain)
    for name, experts in stacked_adapters(model).items():
        place(model, name, experts.folded())
    for name in token_rows(model):
        torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule(name.rpartition(".")[0]), "weight")
    model.adapted = None
    return model.requires_grad_(True)


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Every trained tensor by PEFT's name."""
    config, family = model.config, family_of(model.config)
    tensors: dict[str, Tensor] = {}
    for module, (names, rule) in _adapted(model).items():
        group = [_linear(model, name) for name in names]
        first = next(member for member in group if isinstance(member, LoraLinear))
        b_OR = [m.lora_B if isinstance(m, LoraLinear) else m.weight.new_zeros(len(m.weight), len(first.lora_A))
                for m in group]  # fmt: skip
        tensors[f"{LEAD}{module}.lora_A.weight"] = first.lora_A
        tensors[f"{LEAD}{module}.lora_B.weight"] = rule.transform.join([b.float() for b in b_OR])
        if first.magnitude is not None:
            lengths = [m.magnitude if isinstance(m, LoraLinear) else row_lengths(m.weight) for m in group]
            held = [x for x in lengths if x is not None]
            tensors[f"{LEAD}{module}.lora_magnitude_vector"] = rule.transform.join(held)
    stacked = _stacked(model)
    for disk, experts in stacked.items():
        stem = LEAD + stem_of(disk, stacked)
        tensors[f"{stem}.lora_A.weight"] = experts.lora_A.flatten(0, 1)
        tensors[f"{stem}.lora_B.weight"] = experts.lora_B.permute(1, 2, 0).flatten(1)
    for name, rows in token_rows(model).items():
        tensors[f"{LEAD}{_module(model, family, name)}.token_adapter.trainable_tokens_delta"] = rows.rows
    adapted = of(model)
    whole = {name: model.get_parameter(name) for name in (adapted.originals if adapted else {})}
    if config.tied and "embed.weight" in whole:  # PEFT wants the head, too, and ties it (ensure_weight_tying)
        rule, layer = family.rule_for("head.weight")
        tensors[LEAD + family.disk_name(rule, layer)] = whole["embed.weight"]
    for name, (sources, rule) in disk_layout(config, whole).items():
        tensors[LEAD + _placed(model, rule, name)] = rule.transform.invert(
            tuple(model.get_parameter(s).detach() for s in sources)
        )
    return tensors


def _labels(model: Transformer) -> dict[str, str]:
    """The names of a classifier's classes, for which adapter_config.json has no place."""
    names = model.config.extra.get("id2label") if model.config.head == "classes" else None
    return {"id2label": json.dumps(names, ensure_ascii=False)} if names else {}


def _read_labels(model: Transformer, adapter: Adapter) -> None:
    extra = class_fields(adapter.class_names(model.config.classes))
    model.config = dataclasses.replace(model.config, extra={**model.config.extra, **extra})


def _config(model: Transformer, adapted: Adapted) -> dict[str, Any]:
    """adapter_config.json."""
    config, family = adapted.config, family_of(model.config)
    places = _adapted(model)
    everything = {_module(model, family, f"{name}.weight") for name, module in model.named_modules()
                  if isinstance(module, (nn.Linear, Nf4Linear))}  # fmt: skip
    ranks, alphas = {}, {}
    stacked = _stacked(model)
    firsts = {module: next(m for m in map(model.get_submodule, names) if isinstance(m, LoraLinear))
              for module, (names, _) in places.items()}  # fmt: skip
    for module, lora in (firsts | stacked).items():
        rank = lora.lora_A.shape[-2]
        alpha = lora.scale * (math.sqrt(rank) if config.rslora else rank)
        if rank != config.rank:
            ranks[module] = rank
        if not math.isclose(alpha, config.strength, rel_tol=1e-9):
            alphas[module] = alpha
    rows = {_module(model, family, name).rpartition(".")[2]: r.ids_N.tolist()
            for name, r in token_rows(model).items()}  # fmt: skip
    whole = sorted({short_name(_module(model, family, name)) for name in adapted.originals})
    base = os.path.abspath(adapted.base) if os.path.isdir(adapted.base) else adapted.base
    alpha = config.strength
    return {
        "peft_type": "LORA",
        "task_type": None if model.config.image else _TASKS.get(model.config.head),
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": any(rule.transform.transposed for _, rule in places.values()),
        "init_lora_weights": True,
        # other towers have modules of the same names, which are not to be adapted
        "target_modules": sorted(places) if model.stem else shortest(places, everything),
        **({"target_parameters": sorted(stacked) if model.stem else shortest(stacked, _all_stacks(model), 2)}
           if stacked else {}),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": whole or None,
        **({"ensure_weight_tying": True} if model.config.tied and "embed.weight" in adapted.originals else {}),
        "trainable_token_indices": (next(iter(rows.values())) if len(rows) == 1 else rows) if rows else None,
    }  # fmt: skip


def _adapted(model: Transformer) -> dict[str, tuple[tuple[str, ...], Rule]]:
    """Module on disk -> the modules here that it is, for those that are adapted."""
    family, modules = family_of(model.config), {}
    for name in adapters(model):
        rule, layer = family.rule_for(f"{name}.weight")
        names = tuple(n.replace("{layer}", str(layer)).removesuffix(".weight") for n in rule.names)
        modules[_module(model, family, f"{name}.weight")] = names, rule
    return modules


def _stacked(model: Transformer) -> dict[str, LoraStacked]:
    """Tensor on disk -> the adapted layer here, for those that hold all experts of a block."""
    return {disk: layer for disk, layer in _all_stacks(model).items() if isinstance(layer, LoraStacked)}


def _all_stacks(model: Transformer) -> dict[str, StackedLinear]:
    family = family_of(model.config)
    return {_tensor(model, family, f"{name}.weight"): module for name, module in model.named_modules()
            if isinstance(module, StackedLinear)}  # fmt: skip


def _module(model: Transformer, family: Family, name: str) -> str:
    """The module on disk that holds a parameter."""
    return _tensor(model, family, name).rpartition(".")[0]


def _tensor(model: Transformer, family: Family, name: str) -> str:
    """The tensor on disk that holds a parameter."""
    rule, layer = family.rule_for(name)
    return _placed(model, rule, family.disk_name(rule, layer, bare=model.config.head == "none"))


def _placed(model: Transformer, rule: Rule, name: str) -> str:
    """What transformers calls a tensor on disk, in a model of the folder's own kind, which may be a multimodal one."""
    family = family_of(model.config)
    for disk, module in family.modules:
        name = re.sub(disk, module, name)
    if rule.outside or not model.stem:
        return name
    return model.stem + name.removeprefix(family.prefix)


def _joined(rule: Rule, linears: Sequence[nn.Linear]) -> Tensor:
    return rule.transform.join([linear.weight.detach() for linear in linears])


def _linear(model: Transformer, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def _places(model: Transformer, family: Family, adapter: Adapter, module: str) -> tuple[Rule, list[str]]:
    """The rule that an adapted module falls under, and the modules here that it is."""
    matched = family.match(adapter.tensor(module))
    if matched is None and module in adapter.stacked:
        raise CheckpointError(f"{adapter.root}: {module} {APART}")
    if matched is None or (matched[1] is not None and matched[1] >= model.config.layers):
        raise CheckpointError(f"{adapter.root}: {module} is no module of the base ({family.name})")
    rule, layer = matched
    names = [name.replace("{layer}", str(layer)).removesuffix(".weight") for name in rule.names]
    try:
        for name in names:
            model.get_submodule(name)
    except AttributeError:
        why = RUNS_APART if module in adapter.stacked else "is no module of the base as it is"
        raise CheckpointError(f"{adapter.root}: {module} {why}") from None
    return rule, names


def _rows(model: Transformer, family: Family, adapter: Adapter) -> dict[str, tuple[list[int], Tensor]]:
    rows = {}
    for module, (ids, name) in adapter.rows.items():
        rule, names = _places(model, family, adapter, module)
        if rule.component not in ("embed", "head"):
            raise CheckpointError(f"{adapter.root}: {module} has no row for each token")
        values = adapter.read(name)
        if names[0] == "head" and "head.weight" not in row_matrices(model):  # tied: the embedding's rows serve both
            continue
        if values.shape[1:] != (model.config.dim,):
            raise CheckpointError(
                f"{adapter.root}: {name} is {list(values.shape)}; the base has {model.config.dim} columns"
            )
        rows[f"{names[0]}.weight"] = ids, values
    return rows


def _whole(model: Transformer, family: Family, adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that were saved in full, by parameter."""
    tensors: dict[str, Tensor] = {}
    for disk, name in _untied(model, family, adapter).items():
        matched = family.match(disk)
        if matched is None:
            raise CheckpointError(f"{adapter.root}: {disk} has no place in the base ({family.name})")
        rule, layer = matched
        targets = [target.replace("{layer}", str(layer)) for target in rule.names]
        try:
            shapes = [tuple(model.get_parameter(target).shape) for target in targets]
        except AttributeError:
            raise ConfigError(f"{adapter.root}: {disk} has no place in the model's head") from None
        actual, expected = adapter.weights.info(name).shape, rule.transform.disk_shape(shapes)
        if actual != expected:
            grown = rule.component in ("embed", "head") and actual[1:] == expected[1:]
            remedy = "; make it a model with: lapis fuse" if grown else ""
            raise CheckpointError(
                f"{adapter.root}: {disk} is {list(actual)}; the base has {list(expected)}{remedy}"
            )  # fmt: skip
        pieces = rule.transform.apply(adapter.read(name), shapes)
        tensors |= {target: piece.clone() for target, piece in zip(targets, pieces, strict=True)}
    return tensors


def _untied(model: Transformer, family: Family, adapter: Adapter) -> dict[str, str]:
    """What was saved in full, without the head of a model that ties it to the embedding.

    Raises CheckpointError where the adapter changes one of the two and not the other.
    """
    if not model.config.tied:
        return adapter.whole
    places = {disk: matched[0].component for disk in adapter.whole if (matched := family.match(disk)) and
              matched[0].kind == "weight"}  # fmt: skip
    pair = {component: adapter.whole[disk] for disk, component in places.items() if component in ("embed", "head")}
    if not pair:
        return adapter.whole
    if not (adapter.ties and "embed" in pair):
        tensors = [adapter.read(name) for name in pair.values()]
        if len(tensors) < 2 or tensors[0].shape != tensors[1].shape or not bool((tensors[0] == tensors[1]).all()):
            raise CheckpointError(
                f"{adapter.root}: changes the embedding and the head apart, which its base ties; make it a model with: "
                "lapis fuse"
            )
    return {disk: name for disk, name in adapter.whole.items() if places.get(disk) != "head"}
