"""An adapter folder in PEFT's format: adapter_config.json and adapter_model.safetensors, from headers alone.

LoRA, rsLoRA and DoRA on linear layers, on an embedding or a head; LoRA on experts that lie in one tensor; rows of
tokens; modules saved in full. What PEFT can say and this file cannot is refused by name.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis.checkpoint import pattern_process
from lapis.checkpoint.adapter_names import stacked_tensors
from lapis.checkpoint.files import contained, read_object, stamp
from lapis.checkpoint.store import CHANGED_BASE, Adapter, Checkpoint
from lapis.checkpoint.tensor_file import INDEX, holds_adapter, read_header
from lapis.errors import CheckpointError
from lapis.families.config import Head
from lapis.parsing import quoted
from lapis.wording import format_count

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LEAD = "base_model.model."
# fields that change the function in a way that is not read here, with what they are where they do not
_OTHER: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False, None), "layer_replication": (None, []),
    "use_qalora": (False, None), "use_bdlora": (False, None), "alora_invocation_tokens": (None, []),
    "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
    "megatron_config": (None,),
}  # fmt: skip
_KINDS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_embedding_A": "A", "lora_embedding_B": "B",
}  # fmt: skip
# what PEFT has no adapter of a parameter with, with what it is where there is none
_NOT_STACKED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "fan_in_fan_out": (False, None), "lora_dropout": (0, None),
    "init_lora_weights": (True, False, None, "gaussian"),
}  # fmt: skip
# init_lora_weights that leave the base as it is; what is neither here nor in CHANGED_BASE (LoftQ, CorDA, LoRA-GA, PiSSA
# by a random algorithm) cannot be repeated from a folder
_SAME_BASE = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_PLAIN_KEY = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+\$?")  # matched in this process: it cannot take long
_ROWS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


def open_adapter(source: str | os.PathLike[str]) -> Adapter:
    """Opens an adapter folder: config and header are read and checked, no weight is.

    Args:
        source: A folder in PEFT's format; or one of the hub, or at an address, which is fetched whole.

    Raises:
        CheckpointError: For a file that is missing or damaged, another method than LoRA, or a tensor without a place.
    """
    root = Path(source)
    if not os.path.isdir(source):
        from lapis.checkpoint.hub.models import find_model

        snapshot = find_model(source, INDEX)
        if not holds_adapter(snapshot.sizes) and not snapshot.here(CONFIG):
            raise CheckpointError(f"{source}: holds no adapter ({CONFIG}); give an adapter")
        root = snapshot.root
    config = read_object(contained(root, CONFIG))
    _check_config(root, config)
    if not (root / WEIGHTS).exists() and (root / "adapter_model.bin").exists():
        raise CheckpointError(f"{root}: adapter_model.bin is a pickle, which can run code and is never read")
    header = read_header(contained(root, WEIGHTS))
    stats = {file: stamp(file.stat()) for file in {contained(root, WEIGHTS)}}
    weights = Checkpoint(str(source), root, {}, None, header.tensors, {WEIGHTS: header}, [], stats)
    adapter = Adapter(root, str(config.get("base_model_name_or_path") or ""), config, weights)
    for name in header.tensors:
        _sort(adapter, name)
    if config.get("target_parameters"):
        tensors = stacked_tensors(root / CONFIG, config["target_parameters"], adapter.pairs)
        adapter.pairs = {tensors.get(stem, stem): kinds for stem, kinds in adapter.pairs.items()}
        adapter.stacked.update(tensors.values())
    _check_pairs(adapter)
    _read_patterns(adapter)
    return adapter


def head_of(checkpoint: Checkpoint) -> tuple[Head | None, int]:
    """The head, and its classes, that an adapter needs, where it holds it whole; None where the base's serves."""
    adapter, family = checkpoint.adapter, checkpoint.runs
    transforms = False
    for disk, name in (adapter.whole if adapter and family else {}).items():
        assert adapter is not None and family is not None
        matched = family.match(disk)
        if matched and matched[0].component == "head.classes" and matched[0].kind == "weight":
            classes = adapter.weights.info(name).shape[0]
            return ("scalar", 1) if classes == 1 else ("classes", classes)
        transforms = transforms or bool(matched and matched[0].component == "head.transform")
    return ("masked" if transforms else None), 0


def _check_config(root: Path, config: Mapping[str, Any]) -> None:
    place = root / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{place}: peft_type is {quoted(config.get('peft_type'))}; lapis reads LORA")
    for name, plain in _OTHER.items():
        if config.get(name, plain[0]) not in plain:
            raise CheckpointError(f"{place}: {name} is {quoted(config[name])}, which lapis does not read")
    for name, plain in _NOT_STACKED.items() if config.get("target_parameters") else ():
        if config.get(name, plain[0]) not in plain:
            raise CheckpointError(
                f"{place}: {name} is {quoted(config[name])}, which does not go with target_parameters"
            )
    start = config.get("init_lora_weights")
    if not isinstance(start, (bool, str, type(None))) or start not in (*_SAME_BASE, *CHANGED_BASE):
        raise CheckpointError(
            f"{place}: init_lora_weights is {quoted(start)}, which changes the base in a way that cannot be repeated; "
            "save it again in PEFT with path_initial_model_for_weight_conversion, which makes it a plain adapter"
        )
    if start == "olora" and config.get("fan_in_fan_out"):
        raise CheckpointError(f"{place}: olora on weights with their inputs first (fan_in_fan_out) is not read here")
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        value = config.get(name)
        if not isinstance(value, kinds) or not _positive(value):
            raise CheckpointError(f"{place}: {name} is {quoted(value)}; expected a number above 0")
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise CheckpointError(f"{place}: lora_dropout is {quoted(dropout)}; expected a share, from 0 to below 1")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(_positive(v) for v in patterns.values()):
            raise CheckpointError(f"{place}: {name} must map module names to numbers above 0")


def _sort(adapter: Adapter, name: str) -> None:
    """Finds a tensor's place by its name."""
    stem = name.removeprefix(LEAD)
    for ending, kind in _KINDS.items():
        if stem.endswith("." + ending):
            adapter.pairs.setdefault(stem.removesuffix("." + ending), {})[kind] = name
            return
    for ending in _ROWS:
        if stem.endswith("." + ending):
            module = stem.removesuffix("." + ending)
            adapter.rows[module] = _ids(adapter, module, name), name
            return
    if stem.endswith(".base_layer.weight"):
        adapter.bases[stem.removesuffix(".base_layer.weight").removesuffix(".token_adapter")] = name
    elif ".original_module." in stem:  # the base's, beside a module that was saved in full
        return
    else:
        plain = stem.replace(".modules_to_save.", ".")
        other = adapter.whole.setdefault(plain, name)
        if other != name and not _equal(adapter.weights, name, other):
            raise CheckpointError(
                f"{adapter.root / WEIGHTS}: {name} and {other} are one tensor and differ; save it again"
            )


def _equal(weights: Checkpoint, one: str, two: str) -> bool:
    return weights.info(one).shape == weights.info(two).shape and bool((weights.read(one) == weights.read(two)).all())


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**31


def _ids(adapter: Adapter, module: str, name: str) -> list[int]:
    """Which tokens the trained rows are of."""
    ids = adapter.config.get("trainable_token_indices")
    if isinstance(ids, dict):
        own = [value for key, value in ids.items() if module == key or module.endswith("." + key)]
        # what is tied to the module that is named has the same rows
        ids = own[0] if own else next(iter(ids.values())) if len(ids) == 1 else None
    rows = adapter.weights.info(name).shape[0]
    if not isinstance(ids, list) or len(ids) != rows or not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(
            f"{adapter.root / CONFIG}: trainable_token_indices must list the {format_count(rows, 'token')} of {name}"
        )
    return ids


def _check_pairs(adapter: Adapter) -> None:
    root = adapter.root
    for module, kinds in adapter.pairs.items():
        lacking = [kind for kind in ("A", "B") if kind not in kinds]
        if lacking:
            raise CheckpointError(f"{root / WEIGHTS}: {module} has no lora_{lacking[0]}; fetch it again")
        first, second = (adapter.weights.info(kinds[kind]).shape for kind in "AB")
        if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
            raise CheckpointError(f"{root / WEIGHTS}: {module}: lora_A is {list(first)} and lora_B {list(second)}")
        if "lora_embedding_A" in kinds["A"] and adapter.config.get("init_lora_weights") in CHANGED_BASE:
            raise CheckpointError(f"{root / CONFIG}: init_lora_weights of an embedding must be true or false")
        if adapter.dora != ("magnitude" in kinds):
            raise CheckpointError(f"{root / WEIGHTS}: {module}: use_dora is {adapter.dora}, which its tensors deny")
    if not adapter.pairs and not adapter.rows and not adapter.whole:
        raise CheckpointError(f"{root / WEIGHTS}: holds no tensor")


def _read_patterns(adapter: Adapter) -> None:
    """alpha_pattern and rank_pattern: the first key that matches a module says its alpha, and its rank."""
    place, modules = adapter.root / CONFIG, list(adapter.pairs)
    alphas = _by_pattern(place, "alpha_pattern", adapter.config.get("alpha_pattern") or {}, modules)
    ranks = _by_pattern(place, "rank_pattern", adapter.config.get("rank_pattern") or {}, modules)
    for module in modules:
        adapter.alphas[module] = float(alphas.get(module, adapter.config["lora_alpha"]))
        rank, rows = ranks.get(module, adapter.config["r"]), adapter.weights.info(adapter.pairs[module]["A"]).shape[0]
        stacked = module in adapter.stacked  # then it has the rows of all experts
        if rank != int(rank) or (rows % rank if stacked else rank != rows) or not rows:
            raise CheckpointError(f"{place}: the rank of {module} is {rank} here, and {rows} by its tensors")
        adapter.ranks[module] = int(rank)


def _by_pattern(place: Path, field: str, patterns: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Module -> value. PEFT's rule: a key is a regular expression that matches the end of a module's name."""
    plain = {key: re.compile(rf"(.*\.)?({key})$") for key in patterns if _PLAIN_KEY.fullmatch(key)}
    others = [key for key in patterns if key not in plain]
    matches = {key: [module for module in modules if pattern.match(module)] for key, pattern in plain.items()}
    matches |= dict(zip(others, _match(place, field, others, modules), strict=True))
    values: dict[str, Any] = {}
    for key, value in patterns.items():
        for module in [*matches[key], *([key] if key in modules else [])]:
            values.setdefault(module, value)
    return values


def _match(place: Path, field: str, keys: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """The names that each regular expression matches, by a process that can be ended."""
    if not keys:
        return []
    command = [sys.executable, "-I", "-S", str(pattern_process.__file__)]
    request = json.dumps({"keys": list(keys), "names": list(names)})
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=30)
        lines = done.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines()
    matches = []
    for key, line in zip(keys, lines, strict=False):
        answer = json.loads(line)
        if isinstance(answer, str):
            raise CheckpointError(f'{place}: {field}: "{key:.60}" is no regular expression: {answer}')
        matches.append([names[i] for i in answer])
    if len(matches) < len(keys):
        raise CheckpointError(
            f'{place}: {field}: matching "{keys[len(matches)]:.60}" takes more than {pattern_process.SECONDS} s; '
            "write the module's name in its place"
        )
    return matches
