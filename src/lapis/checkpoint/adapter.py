"""An adapter folder in PEFT's format: adapter_config.json and adapter_model.safetensors, from headers alone.

LoRA, rsLoRA and DoRA on linear layers, on an embedding or a head; rows of tokens; modules saved whole. What PEFT can
say and this file cannot is refused by name. Leaves out: putting it on a model (model/adapter.py), adding it to weights
(weights/fuse.py).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from lapis.checkpoint.files import contained, read_json
from lapis.checkpoint.store import Checkpoint, open_checkpoint
from lapis.checkpoint.tensor_file import read_header
from lapis.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LEAD = "base_model.model."
# fields that change the function in a way that is not read here, with what they are where they do not
_OTHER: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False, None), "layer_replication": (None, []), "target_parameters": (None, []),
    "use_qalora": (False, None), "use_bdlora": (False, None), "alora_invocation_tokens": (None, []),
    "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
    "megatron_config": (None,),
}  # fmt: skip
_KINDS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_embedding_A": "A", "lora_embedding_B": "B",
}  # fmt: skip
_ROWS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


@dataclass
class Adapter:
    """A checked adapter. base: as adapter_config.json names it. weights: its tensors, to read from.

    pairs: module on disk ("model.layers.0.self_attn.q_proj") -> kind ("A", "B", "magnitude") -> name in the file. rows:
    module -> (ids, name). whole: tensor on disk -> name. ranks: of each module, from its tensors.
    """

    root: Path
    base: str
    config: dict[str, Any]
    weights: Checkpoint
    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        return self.weights.info(self.pairs[module]["A"]).shape[0]

    def alpha(self, module: str) -> float:
        """lora_alpha, or what alpha_pattern says of this module."""
        return float(_by_pattern(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"]))

    def scale(self, module: str) -> float:
        """The factor on B A."""
        rank = self.rank(module)
        return self.alpha(module) / (sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter and no model."""
    root = Path(source)
    return (root / CONFIG).is_file() and not (root / "config.json").is_file()


def open_adapter(source: str | os.PathLike[str]) -> Adapter:
    """Opens an adapter folder: config and header are read and checked, no weight is.

    Raises CheckpointError for a file that is missing or damaged, another method than LoRA, or a tensor without a place.
    """
    root = Path(source)
    if not root.is_dir():
        raise CheckpointError(f"{source}: there is no such folder")
    config = read_json(contained(root, CONFIG))
    if not isinstance(config, dict):
        raise CheckpointError(f"{root / CONFIG}: holds a {type(config).__name__}, not an object")
    _check_config(root, config)
    if not (root / WEIGHTS).exists() and (root / "adapter_model.bin").exists():
        raise CheckpointError(f"{root}: adapter_model.bin is a pickle, which can run code and is never read")
    header = read_header(contained(root, WEIGHTS))
    stats = {file: (s.st_ino, s.st_size, s.st_mtime_ns) for file in {contained(root, WEIGHTS)} for s in [file.stat()]}
    weights = Checkpoint(str(source), root, {}, None, header.tensors, {WEIGHTS: header}, [], stats)
    adapter = Adapter(root, str(config.get("base_model_name_or_path") or ""), config, weights)
    for name in header.tensors:
        _sort(adapter, name)
    _check_pairs(adapter)
    return adapter


def base_of(adapter: Adapter, base: str | os.PathLike[str] | None = None) -> Checkpoint:
    """The model that an adapter belongs to: `base`, or where its config says (also seen from its own folder).

    Raises CheckpointError where it is not there.
    """
    if base is not None:
        return open_checkpoint(base)
    if not adapter.base:
        raise CheckpointError(f"{adapter.root}: {CONFIG} names no base_model_name_or_path; give --base, or write it in")
    near = adapter.root / adapter.base
    place = adapter.base if Path(adapter.base).is_dir() or not near.is_dir() else str(near)
    try:
        return open_checkpoint(place)
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.root}: its base cannot be opened: {error}; give --base, or correct "
                              f"base_model_name_or_path in {CONFIG}") from None  # fmt: skip


def _check_config(root: Path, config: Mapping[str, Any]) -> None:
    place = root / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{place}: peft_type is {config.get('peft_type')!r:.40}; lapis reads LORA")
    for name, plain in _OTHER.items():
        if config.get(name, plain[0]) not in plain:
            raise CheckpointError(f"{place}: {name} is {config[name]!r:.60}, which lapis does not read")
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        value = config.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < 2**31:
            raise CheckpointError(f"{place}: {name} is {value!r:.40}; expected a number above 0")
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise CheckpointError(f"{place}: lora_dropout is {dropout!r:.40}; expected a share, from 0 to below 1")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(isinstance(v, (int, float)) for v in patterns.values()):
            raise CheckpointError(f"{place}: {name} must map module names to numbers")


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
    # PEFT writes the untouched weight of an adapted embedding or head beside it
    if stem.endswith(".base_layer.weight"):
        return
    adapter.whole[stem.replace(".modules_to_save.", ".")] = name


def _ids(adapter: Adapter, module: str, name: str) -> list[int]:
    """Which tokens the trained rows are of."""
    found = adapter.config.get("trainable_token_indices")
    if isinstance(found, dict):
        found = next((ids for key, ids in found.items() if module == key or module.endswith("." + key)), None)
    rows = adapter.weights.info(name).shape[0]
    if not isinstance(found, list) or len(found) != rows or not all(type(i) is int and i >= 0 for i in found):
        raise CheckpointError(f"{adapter.root / CONFIG}: trainable_token_indices must list the {rows} tokens of {name}")
    return found


def _check_pairs(adapter: Adapter) -> None:
    root = adapter.root
    for module, kinds in adapter.pairs.items():
        lacking = [kind for kind in ("A", "B") if kind not in kinds]
        if lacking:
            raise CheckpointError(f"{root / WEIGHTS}: {module} has no lora_{lacking[0]}; fetch it again")
        first, second = (adapter.weights.info(kinds[kind]).shape for kind in "AB")
        if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
            raise CheckpointError(f"{root / WEIGHTS}: {module}: lora_A is {list(first)} and lora_B {list(second)}")
        if adapter.dora != ("magnitude" in kinds):
            raise CheckpointError(f"{root / WEIGHTS}: {module}: use_dora is {adapter.dora}, which its tensors deny")
    if not adapter.pairs and not adapter.rows and not adapter.whole:
        raise CheckpointError(f"{root / WEIGHTS}: holds no tensor")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression that matches the end of a module's name. Here: its plain text."""
    for key, value in patterns.items():
        plain = re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$"))
        if module == plain or module.endswith("." + plain):
            return value
    return default
