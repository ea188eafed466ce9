"""What a finished run gives: TrainResult, and the files of its folder.

A model folder that everything loads, with log.jsonl (the learning curve) and training.json (settings and figures)
beside it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.curve import write_curve
from lapis.training.objectives.objective import Objective
from lapis.training.setup import lora


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        out: Its folder.
        steps: Updates done.
        loss: Of the last entry of the curve, per supervised count (nats per token for texts).
        bits_per_byte: Of the last entry, for texts.
        tokens: Positions computed.
        seconds: Time spent, over all restarts.
        tokens_per_second: While updating.
        threads: What was used, so that a next run of the same shape need not measure.
        precision: The same.
        log: The learning curve.
        metrics: The objective's own, over the last tenth of the curve.
        held_out: Held-out metrics of the weights that were written; empty where nothing is held out.
        best_step: The step of these weights, where the run ends with the best.
        overfitting: A sentence where the held-out loss rose again while the run went on.
    """

    out: Path
    steps: int
    loss: float
    bits_per_byte: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    threads: int
    precision: str
    log: list[dict[str, Any]]
    metrics: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    overfitting: str | None = None

    def figures(self) -> dict[str, Any]:
        """Everything but the curve and the folder, as JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("out", "log")}


def write_result(
    model: Transformer, objective: Objective, config: TrainConfig, folder: Path, result: TrainResult
) -> None:
    """The model, its tokenizer, the curve and the figures, into a folder that the caller commits."""
    lora.save(model, folder, dtype=getattr(torch, config.save_dtype))
    tokenizer = objective.tokenizer
    if tokenizer is not None:
        tokenizer.save(folder)
    if generation := generation_config(model, tokenizer):
        (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    objective.write(folder)
    write_curve(folder / "log.jsonl", result.log)
    facts: Mapping[str, Any] = {"config": asdict(config), **objective.describe(), **result.figures()}
    (folder / "training.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def generation_config(model: Transformer, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The settings that the model came with, and all ids that end a reply, so that other tools stop there too."""
    known = model.generation.get("eos_token_id")
    ids = [] if known is None else known if isinstance(known, list) else [known]
    ends = list(dict.fromkeys([*(tokenizer.end_ids if tokenizer is not None else ()), *ids]))
    return {**model.generation, "eos_token_id": ends} if ends else dict(model.generation)


def last_metrics(log: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the objective's metrics over the last tenth of the curve."""
    tail = log[-max(1, len(log) // 10) :]
    return {name: sum(row["metrics"].get(name, 0.0) for row in tail) / len(tail) for name in tail[-1]["metrics"]}
