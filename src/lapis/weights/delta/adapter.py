"""A low-rank delta as a PEFT adapter: adapter_config.json and adapter_model.safetensors beside the delta itself.

The two factors of each matrix become lora_B and lora_A with a factor of one (lora_alpha is the rank); the rows of the
template's tokens become trainable tokens. What PEFT has no place for is told: norms, biases, rows of other tokens.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint.adapter import CONFIG, LEAD, WEIGHTS
from lapis.checkpoint.tensor_file import stream_tensors
from lapis.text.tokenizer.folder import write_json
from lapis.weights.delta.file import DeltaFile
from lapis.wording import format_count

Part = tuple[str, bool]
"""A part of the delta's file, and whether it is turned."""


def write_adapter(file: DeltaFile, folder: Path, token_ids: Sequence[int] | None) -> list[str]:
    """Writes the two files.

    Args:
        file: A delta with a rank.
        folder: Where they go.
        token_ids: The rows of the template's tokens in the base; None where it has none for some of them.

    Returns:
        Lines that say what the adapter does not have.
    """
    model = file.model
    parts: dict[str, Part] = {}
    ranks: dict[str, int] = {}
    rows: dict[str, list[int]] = {}
    turned, left = False, []
    for name, tensor in file.tensors.items():
        stem, turn = _module(file, name)
        if tensor.code is not None and tensor.code.name == "low-rank" and model.part(name).layer is not None:
            first, second = ("B", "A") if turn else ("A", "B")
            parts[f"{LEAD}{stem}.lora_A.weight"] = tensor.part(first), turn
            parts[f"{LEAD}{stem}.lora_B.weight"] = tensor.part(second), turn
            ranks[stem] = file.weights.info(tensor.part("A")).shape[0]
            turned |= turn
        elif tensor.template and token_ids and model.part(name).kind == "weight":
            parts[f"{LEAD}{stem}.token_adapter.trainable_tokens_delta"] = tensor.part("template"), False
            rows[stem.rpartition(".")[2]] = list(token_ids)
        else:
            left.append(name)
    rank = int(file.description["rank"])
    smaller = {stem: own for stem, own in ranks.items() if own != rank}
    base = str(file.description["base"]["source"])
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": turned, "init_lora_weights": True, "modules_to_save": None,
        "target_modules": _targets(list(ranks), file), "rank_pattern": smaller, "alpha_pattern": smaller,
    }  # fmt: skip
    if rows:
        config["trainable_token_indices"] = rows
    write_json(folder / CONFIG, config)
    ordered = sorted(parts)
    stream_tensors(
        folder / WEIGHTS,
        {name: _shape(file, *parts[name]) for name in ordered},
        _values(file, [parts[name] for name in ordered]),
        {"format": "pt"},
    )
    tokens = f", {format_count(len(token_ids or ()), 'token')}" if rows else ""
    notes = [f"{WEIGHTS}: {format_count(len(ranks), 'module')} of rank {rank}{tokens}"]
    if left:
        shown = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
        notes.append(f"the adapter has no place for {format_count(len(left), 'tensor')}, which the delta has: {shown}")
    return notes


def _module(file: DeltaFile, name: str) -> tuple[str, bool]:
    """The module of a tensor, as transformers spells it, and whether its matrix is stored turned."""
    family = file.model.family
    matched = family.match(name) if family else None
    if family is None or matched is None:
        return name.removesuffix(".weight"), False
    return family.disk_name(*matched).removesuffix(".weight"), bool(matched[0].transform.transposed)


def _targets(stems: Sequence[str], file: DeltaFile) -> list[str]:
    """Names of modules as PEFT matches them: the last part alone where that means these modules and no others."""
    chosen = set(stems)
    every: dict[str, set[str]] = {}
    for name, tensor in file.tensors.items():
        if len(tensor.shape) > 1:
            stem, _ = _module(file, name)
            every.setdefault(stem.rpartition(".")[2], set()).add(stem)
    result: list[str] = []
    for last in dict.fromkeys(stem.rpartition(".")[2] for stem in stems):
        result += [last] if every[last] <= chosen else sorted(every[last] & chosen)
    return result


def _shape(file: DeltaFile, name: str, turned: bool) -> tuple[torch.dtype, tuple[int, ...]]:
    shape = file.weights.info(name).shape
    dtype = torch.bfloat16 if file.weights.info(name).dtype == "BF16" else torch.float32
    return dtype, shape[::-1] if turned else shape


def _values(file: DeltaFile, parts: Sequence[Part]) -> Iterator[torch.Tensor]:
    for name, turned in parts:
        values = file.weights.read(name)
        values = values if values.dtype in (torch.bfloat16, torch.float32) else values.float()
        yield values.T.contiguous() if turned else values
