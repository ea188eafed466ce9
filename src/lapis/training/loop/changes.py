"""What of a run may be another when it goes on: nothing, unless it was allowed by name.

A change that is allowed is noted with its step, and stays with the run: in its checkpoints and in training.json.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lapis.checkpoint.files import read_json
from lapis.config import nearest
from lapis.errors import ConfigError, TrainingError
from lapis.parsing import quoted

# what a checkpoint is made of, or is measured once: with another of these it could not be gone on with
SETTLED = ("objective", "model", "lora", "trained", "tokens", "tokenizer", "context", "optimizer", "weights", "ema",
           "seed", "threads", "precision", "compile")  # fmt: skip
SCHEDULED = frozenset({"steps", "epochs", "minutes", "warmup", "schedule", "decay", "batch", "data"})
_FOLLOWS = {"counts": "data", "counts.held_out": "valid"}  # what changes with what
MOST_NAMED = 4  # entries of a list


class Change(NamedTuple):
    """One leaf in which two runs differ."""

    key: str
    line: str

    @property
    def name(self) -> str:
        """The key as a settings file has it, without what lies within it."""
        first, _, rest = self.key.partition(".")
        if self.key in _FOLLOWS:
            return _FOLLOWS[self.key]
        name = rest.partition(".")[0] if first in ("config", "options") else first
        return _FOLLOWS.get(name, name)


def completed(old: Mapping[str, Any], new: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """What a run was started with. An older lapis noted no digests of held-out data for most objectives, nor all
    options: what it did not note is taken to be what it is now.

    Args:
        old: As it was noted.
        new: What the run goes on with.
        warnings: Gets a line where there is held-out data.
    """
    held_out = [entry.get("counts", {}).get("held_out") for entry in (old, new)]
    if "valid" in old or "valid" not in new or held_out[0] != held_out[1]:
        return dict(old)
    if new["valid"]:
        warnings.append("the lapis that began this run noted no digest of its held-out data, which is taken as it is")
    noted = {"valid": new["valid"]}
    if isinstance(old.get("options"), Mapping) and isinstance(new.get("options"), Mapping):
        noted["options"] = {**new["options"], **old["options"]}
    return {**old, **noted}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """`key was X, is Y` for each leaf in which two JSON mappings differ."""
    changes = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            changes += differences(was, now, f"{prefix}{key}.")
        elif was != now:
            name = f"{prefix}{key}".rstrip(".")  # the only one of some that could have names has none
            before, after = _short(was), _short(now)
            between = ", with others between" if before == after else ""
            changes.append(Change(name, f"{name} was {before}, is {after}{between}"))
    return changes


def rescheduled(numbers: Path, request: Mapping[str, Any]) -> bool:
    """Whether a run has another schedule than the checkpoint that it goes on from, which an earlier try at going on may
    have been killed before replacing. numbers: the checkpoint's state.json. request: what the run is started with."""
    changes = differences(read_json(numbers)["facts"].get("wanted", {}), request)
    return any(change.name in SCHEDULED for change in changes)


def check_allowed(allowed: Collection[str], keys: Collection[str]) -> None:
    """Raises ConfigError for a name that no run has, or that no run can change. keys: of the settings."""
    for name in allowed:
        if name in SETTLED:
            raise ConfigError(f"train: --allow-change {name}: it is settled when a run begins; start anew with --fresh")
        if name not in {*keys, "data", "valid"}:
            raise ConfigError(f"train: --allow-change {quoted(name)}: {nearest(name, {*keys, 'data', 'valid'})}")


def refuse_newer(folder: Path, name: str, known: int) -> None:
    """Raises TrainingError where a newer lapis wrote a checkpoint. name: of the file that holds its format."""
    written = read_json(folder / name).get("format", 1)  # before the format was written, there was one
    if not isinstance(written, int) or written > known:
        raise TrainingError(
            f"train: {folder} is a checkpoint of format {written}; this lapis reads format {known}; install a newer "
            "one, or start anew with --fresh"
        )


def _short(value: Any) -> str:
    """A value as JSON; of a digest the first figures, of many entries the first and the last."""
    if isinstance(value, list) and len(value) > MOST_NAMED:
        return f"[{json.dumps(value[0])}, ..., {json.dumps(value[-1])}] of {len(value):,}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else json.dumps(value)
