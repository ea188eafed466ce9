"""The two trainings of an adaptation in the settings of `lapis train`: a plan in, a mapping out, checked beforehand.

"embedded" trains the rows of new tokens alone, "adapted" everything but old rows. Both read the same text; where one
follows the other, the second has another seed, so that it does not begin with the rows that the first one read.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint.staging import staging_of
from lapis.errors import ConfigError
from lapis.generation.ready import choose_device
from lapis.language.plan import AdaptPlan
from lapis.model.check import read_config
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import WITHOUT_EFFECT
from lapis.training.loop.held_out import watched_metric
from lapis.training.loop.tracking import check_installed
from lapis.training.run import read_settings
from lapis.training.setup.select import select_parts

BITS = "replay/bits_per_byte"
SEED_APART = 1_000_000  # between the seeds of the two trainings
_READ = {"data", "model", "valid"}  # keys that name steps, on which a training depends anyway
_IDLE = {*WITHOUT_EFFECT, "device", "workers"} - {"save_dtype"}  # keys of which no weight depends; its file does


def training_settings(
    plan: AdaptPlan, name: str, model: str, share: float, new_rows: Sequence[int], text: Callable[[str], Path],
    held: Mapping[str, Path], base_bits: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a training, without `out`.

    Args:
        plan: What to adapt to what.
        name: "embedded" or "adapted".
        model: What it begins with.
        share: Of the plan's tokens that it reads.
        new_rows: The ids of new tokens.
        text: "text" or "replay" -> the file to learn from.
        held: Language -> held-out text.
        base_bits: Of the held-out replay text for a byte, before anything was trained; None without replay text.
    """
    alone = name == "embedded"
    context = min(plan.context, read_config(model).context)
    steps = plan.steps(share, context)
    mixed = bool(plan.replay) and plan.replay_share > 0 and not alone
    sources: list[Any] = [str(text("text"))]
    if mixed:
        trusted = {"special": "trusted"} if plan.draws_replay else {}
        sources = [
            {"path": sources[0], "weight": 1 - plan.replay_share},
            {"path": str(text("replay")), "weight": plan.replay_share, **trusted},
        ]
    follows = bool(new_rows) and plan.embedded > 0 and not alone
    how = _rows_alone(plan, new_rows) if alone else _everything(plan, model, new_rows)
    settings: dict[str, Any] = {
        "objective": "causal", "model": model, "steps": steps, "batch": plan.batch, "context": context,
        "seed": plan.seed + SEED_APART * follows, "eval_every": plan.eval_every(steps), **how, **plan.train,
        "data": sources, "valid": {language: str(path) for language, path in held.items()},
    }  # fmt: skip
    if base_bits is not None and settings["eval_every"] and not alone:
        settings["limits"] = {BITS: round(base_bits * (1 + plan.cost), 6)}
    return settings


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training's settings its result depends on, besides the steps that it reads."""
    source = settings["data"][-1]
    known = {key: value for key, value in settings.items() if key not in _READ | _IDLE}
    return {**known, "mixed": source["weight"] if isinstance(source, Mapping) else 0}


def check_trainings(plan: AdaptPlan) -> None:
    """Raises ConfigError for settings of `train` that a training would refuse, before anything is done."""
    if plan.train.get("lora") is not None and (plan.vocab or plan.merged_back or plan.chat is not None):
        raise ConfigError(
            "adapt: train: lora makes an adapter, which gains no tokens and to which no chat model is added; leave it "
            "out, or give vocab: 0, and neither chat nor merge_back"
        )
    if plan.train.get("plan") is not None and plan.vocab:
        raise ConfigError(
            "adapt: train: plan says what is trained, and so does adapt where tokens are added; leave it out, or give "
            "vocab: 0"
        )
    rows = [0] if plan.vocab else []
    held = {language: Path(language) for language in ("target", *(["replay"] if plan.replay else []))}
    for name in (*(["embedded"] if rows and plan.embedded else []), "adapted"):
        settings = training_settings(plan, name, plan.source, 1, rows, Path, held, 1.0 if plan.replay else None)
        config = read_settings({**settings, "out": plan.out}, "adapt: train")
        check_installed(config.track)
        device = choose_device(None if config.device == "auto" else config.device)
        lora = config.lora
        if lora is not None and device.type == "cuda":  # where any base can be held, and an outline cannot be packed
            lora = replace(lora, base="float32")
        if config.watch_metric:
            watched_metric({f"{language}/bits_per_byte": 0.0 for language in held}, config.watch_metric)
        with torch.device("meta"):
            outline = Transformer(read_config(plan.source))
        select_parts(
            outline, lora_config=lora, tune=config.tune, freeze=config.freeze, tokens=config.tokens, plan=config.plan,
            base=plan.source, tokenizer=Tokenizer.open(plan.source) if lora else None,
        )  # fmt: skip


def with_own_remedy(refusal: str, folder: Path) -> str:
    """What a training refuses, without the options of `lapis train` that an adaptation lacks. folder: Its result."""
    without = re.sub(r"allow it with( --allow-change \w+)+, ", "", refusal)
    return without.replace("start anew with --fresh", f"remove {staging_of(folder)} to start anew")


def _rows_alone(plan: AdaptPlan, new_rows: Sequence[int]) -> dict[str, Any]:
    return {"lr": plan.rows_lr, "freeze": ["all"], "tokens": new_rows, "share_rows": True}


def _everything(plan: AdaptPlan, model: str, new_rows: Sequence[int]) -> dict[str, Any]:
    """Settings that train everything; new rows at their own rate, and old ones not, unless the plan says so."""
    how: dict[str, Any] = {"lr": plan.lr, "ema": plan.ema}
    if new_rows and not plan.old_rows:
        tables = ["embed"] if read_config(model).tied else ["embed", "head"]
        rates = dict.fromkeys(tables, plan.rows_lr)
        how |= {"freeze": tables, "tokens": new_rows, "share_rows": True, "rates": rates}
    return how
