"""certificate.json and certificate.html of a finished run: from what, how, with what, and what was checked.

Both are about this very run, machine and clock included, as times.json is; all other files of its folder are the same
bytes whenever the run is made again.
"""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lapis
from lapis.model.transformer import Transformer
from lapis.report.pages.certificate import certificate_page
from lapis.training.certificate.checks import Check
from lapis.training.config import TrainConfig
from lapis.training.loop.estimate import why_not_predicted
from lapis.training.loop.state import weights_digest
from lapis.training.objectives.objective import Objective
from lapis.training.result import TrainResult

CERTIFICATE, PAGE = "certificate.json", "certificate.html"
_LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers")


def certificate(
    model: Transformer, objective: Objective, config: TrainConfig, result: TrainResult, start: str, checks: list[Check]
) -> dict[str, Any]:
    """What is known of a run, as JSON.

    Args:
        model: With the weights that it ended with.
        objective: What was learned, from which data.
        config: How.
        result: Its figures.
        start: sha256 of the weights that it began with; "" where they are not known.
        checks: What was tried on its model.
    """
    device = next(model.parameters()).device
    return {
        "run": Path(result.out).name,
        **objective.describe(),
        "coverage": objective.coverage(),
        "config": asdict(config),
        "weights": {"start": start, "end": weights_digest(model)},
        "versions": {
            "lapis": lapis.__version__, "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}", "device": str(device.type),
            "threads": result.threads, "precision": result.precision,
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
    }  # fmt: skip


def write_certificate(
    model: Transformer, objective: Objective, config: TrainConfig, folder: Path, result: TrainResult, start: str,
    checks: list[Check],
) -> None:  # fmt: skip
    """The certificate and its page, into a folder that the caller commits. The others are as for `certificate`."""
    facts = certificate(model, objective, config, result, start, checks)
    (folder / CERTIFICATE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(certificate_page(facts, result.log).render(), encoding="utf-8")
