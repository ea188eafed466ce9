"""certificate.json and certificate.html of a finished run: from what, how, with what, and what was checked.

Both are about this very run, machine and clock included, as times.json is; all other files of its folder are the same
bytes whenever the run is made again.
"""

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lapis
from lapis.model.threads import processor_fields
from lapis.model.transformer import Transformer
from lapis.report.pages.certificate import certificate_page
from lapis.training.certificate.checks import Check
from lapis.training.config import TrainConfig
from lapis.training.loop.estimate import why_not_predicted
from lapis.training.loop.state import weights_digest
from lapis.training.objectives import options
from lapis.training.objectives.objective import Objective
from lapis.training.result import TrainResult
from lapis.training.setup.select import describe

CERTIFICATE, PAGE = "certificate.json", "certificate.html"
_LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Circumstances:
    """How a run was made, beside its settings.

    Attributes:
        start: sha256 of the weights that it began with; "" where they are not known.
        origin: Where the model and its tokenizer come from, and which parts were to be trained.
        device: What computed.
        processes: How many of them.
        not_checked: Why nothing was checked, as half a sentence.
    """

    start: str
    origin: Mapping[str, Any]
    device: torch.device
    processes: int
    not_checked: str


def certificate(
    model: Transformer, objective: Objective, config: TrainConfig, result: TrainResult, made: Circumstances,
    checks: list[Check],
) -> dict[str, Any]:  # fmt: skip
    """What is known of a run, as JSON.

    Args:
        model: With the weights that it ended with.
        objective: What was learned, from which data.
        config: How.
        result: Its figures.
        made: Where and from what.
        checks: What was tried on its model.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {name: value for name, value in describe(model).items() if name != "trained"}
    return {
        "run": Path(result.out).name,
        **objective.describe(),
        "options": _options(objective),
        "origin": dict(made.origin),
        "trained": {"parameters": trained, "of": sum(p.numel() for p in model.parameters()), **parts},
        "coverage": objective.coverage(),
        "config": asdict(config),
        "weights": {"start": made.start, "end": weights_digest(model)},
        "versions": {
            "lapis": lapis.__version__, "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}", "device": str(made.device.type),
            "device_name": device_name(made.device), "processes": made.processes, "threads": result.threads,
            "precision": result.precision,
        },
        "predicted": result.predicted,
        "not_predicted": "" if result.predicted else why_not_predicted(result.steps),
        "taken": {"seconds": result.seconds, "memory_bytes": result.memory_bytes},
        "steps": result.steps,
        "tokens": result.tokens,
        "loss": result.loss,
        "held_out": result.held_out,
        "ended": result.ended,
        "skipped": result.skipped,
        "changes": result.changes,
        "checks": [check.to_json() for check in checks],
        "not_checked": made.not_checked,
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """What the maker calls a GPU, or this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = ""
    with suppress(OSError):
        named = processor_fields().get("model name", "")
    return named or platform.processor() or platform.machine()


def _options(objective: Objective) -> dict[str, Any]:
    """The objective's options as JSON, but for data that was given as objects."""
    plain: dict[str, Any] = {}
    for name in options(type(objective)):
        value = getattr(objective, name)
        if is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        with suppress(TypeError):
            plain[name] = _as_json(value)
    return plain


def _as_json(value: Any) -> Any:
    """Raises TypeError for what is neither text, a number nor made of such."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no JSON")


def write_certificate(
    model: Transformer, objective: Objective, config: TrainConfig, folder: Path, result: TrainResult,
    made: Circumstances, checks: list[Check],
) -> None:  # fmt: skip
    """The certificate and its page, into a folder that the caller commits. The others are as for `certificate`."""
    facts = certificate(model, objective, config, result, made, checks)
    (folder / CERTIFICATE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(certificate_page(facts, result.log).render(), encoding="utf-8")
