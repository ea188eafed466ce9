"""What of a folder goes to the hub: a model folder in, the files that are sent and those that are not out.

Only what a model consists of is sent: what is not on the list stays here, so that no training state, no text and no
note of the user's leaves this machine by accident. Weights must be what they were when they were written.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lapis.checkpoint.commit import MANIFEST, sha256_of
from lapis.checkpoint.files import contained, describe_absence, read_json
from lapis.checkpoint.opening import open_checkpoint
from lapis.checkpoint.staging import JOURNAL
from lapis.checkpoint.tensor_file import holds_adapter
from lapis.errors import CheckpointError, ConfigError

README = "README.md"
CARD = "card"  # the step of an adaptation that tells how its models were made
_WEIGHTS = re.compile(r"(model|adapter_model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors|[^/]+\.gguf")
_BESIDE = re.compile(
    r"config\.json|generation_config\.json|adapter_config\.json|model\.safetensors\.index\.json|tokenizer\.json|"
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|[\w.-]+\.model|"
    r"[\w.-]+\.tiktoken|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja|preprocessor_config\.json|"
    r"processor_config\.json|README\.md|(LICENSE|LICENCE|NOTICE|USE_POLICY)[\w.-]*|Modelfile"
)
_STATE = {
    "optimizer.safetensors", "rng.safetensors", "state.json", "best.safetensors", "average.safetensors",
    "objective.safetensors", "run.json",
}  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Report = Callable[[int, int], None]


@dataclass
class Shipment:
    """What is sent.

    Attributes:
        folder: Where it lies.
        files: Name on the hub -> file, in order.
        sizes: Name -> bytes.
        left_out: Name -> why it is not sent.
        notes: Lines for the user.
        digests: Name -> sha256, once `check` has read it.
    """

    folder: Path
    files: dict[str, Path]
    sizes: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(self.sizes.values())

    def check(self, report: Report = lambda done, total: None) -> None:
        """Reads every file, and compares those that lapis wrote with what it wrote.

        Raises:
            CheckpointError: For weights that are not as they were written.
        """
        written, done = _written(self.folder), 0
        for name, path in self.files.items():
            report(done, self.bytes)
            self.digests[name] = sha256_of(path)
            done += self.sizes[name]
            foreign = name == README and path.parent != self.folder  # a card's
            if foreign or name not in written or written[name] == self.digests[name]:
                continue
            if _WEIGHTS.fullmatch(name):
                raise CheckpointError(
                    f"{path}: is not what lapis wrote there; it is damaged or was edited, make the model again"
                )
            self.notes.append(f"{name} was changed since lapis wrote it")
        report(done, self.bytes)


def shipment(folder: str | os.PathLike[str], card: str | os.PathLike[str] | None = None) -> Shipment:
    """What of a folder would be sent.

    Args:
        folder: A model, an adapter, or GGUF files with what belongs to them.
        card: A folder of `lapis card`, or its README.md, to go with it. By default that of the card beside it, where
            the folder is a step of `lapis adapt` and has no README.md of the user's, else the folder's own.

    Raises:
        CheckpointError: For a folder that is no model, or is damaged.
        ConfigError: For a card that is none.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise CheckpointError(f"{folder}: {describe_absence(folder)}")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())
    _check_model(root, names)
    result = Shipment(root, {}, {})
    for name in names:
        if why := _stays(name):
            result.left_out[name] = why
        else:
            result.files[name] = contained(root, name)
    if readme := _readme(root, card):
        result.files[README] = readme
        result.left_out.pop(README, None)
        if readme.parent != root:
            result.notes.append(f"{README} is that of {readme.parent}")
    elif README not in result.files:
        result.notes.append("there is no README.md; lapis card makes one, which --card sends")
    result.files = dict(sorted(result.files.items()))
    result.sizes = {name: path.stat().st_size for name, path in result.files.items()}
    return result


def _check_model(root: Path, names: list[str]) -> None:
    """Refuses what nobody could load."""
    if re.fullmatch(r"\..+\.lapis", root.name) or any(name.startswith(JOURNAL) for name in names):
        raise CheckpointError(f"{root}: is the working folder of a job that is not done; finish it, and push its --out")
    if holds_adapter(names):
        if "adapter_model.safetensors" not in names:
            raise CheckpointError(
                f"{root}: has adapter_config.json without adapter_model.safetensors; nobody can load it"
            )
    elif any(name.endswith(".gguf") for name in names if "/" not in name):
        return
    elif "config.json" in names and any(_WEIGHTS.fullmatch(name) for name in names):
        open_checkpoint(root)
    else:
        pairs = [name.split("/") for name in names if name.count("/") == 1 and not name.startswith(".")]
        steps = sorted({step for step, name in pairs if _WEIGHTS.fullmatch(name)})
        hint = "give a folder with config.json and model.safetensors, an adapter, or GGUF files"
        if steps:
            hint = f"give one of the models in it, such as {root / ('grafted' if 'grafted' in steps else steps[0])}"
        raise CheckpointError(f"{root}: is no model; {hint}")


def _stays(name: str) -> str:
    """Why a file is not sent; "" where it is."""
    base = name.rsplit("/", 1)[-1]
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if base in _STATE or base.startswith("checkpoint-"):
        return "training state"
    if name.endswith(_PICKLES):
        return "a pickle, which may run code where it is loaded"
    if _BESIDE.fullmatch(name) or (_WEIGHTS.fullmatch(name) and "/" not in name):
        return ""
    return "not a part of the model"


def _edited(root: Path) -> bool:
    """Whether a folder has a README.md that is the user's: none, or another than lapis wrote with the model."""
    readme = root / README
    return readme.is_file() and _written(root).get(README) != sha256_of(readme)


def _written(root: Path) -> dict[str, str]:
    """Name -> sha256 of what lapis wrote in a folder; nothing where it has no manifest."""
    if not (root / MANIFEST).is_file():
        return {}
    listed = read_json(contained(root, MANIFEST))
    files = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise CheckpointError(f"{root / MANIFEST}: does not list files; fetch it again, or remove it")
    return {name: str(entry.get("sha256")) for name, entry in files.items()}


def _readme(root: Path, card: str | os.PathLike[str] | None) -> Path | None:
    """The README.md that goes along, where it is not the folder's own."""
    if card is not None:
        place = Path(card) / README if Path(card).is_dir() else Path(card)
        if place.name != README or not place.is_file():
            raise ConfigError(f"push: {card} is no card; give a folder of lapis card, or its README.md")
        return Path(os.path.abspath(place))
    beside = root.parent / CARD
    if _edited(root) or not (beside / README).is_file() or not (beside / "card.json").is_file():
        return None
    try:
        steps = json.loads((beside / "card.json").read_bytes())["steps"]
        mine = any(os.path.abspath(folder) == str(root) for folder in steps.values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return beside / README if mine else None
