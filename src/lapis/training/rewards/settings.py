"""Rewards from settings: names of what is built in, functions, folders of reward models; each with a weight.

    rewards: [ends, {name: number, weight: 1.0, options: {field: final}}, {path: "my_rewards.py:polite", weight: 0.2}]

In Python a function stands for itself, and (function, 0.2) for one with a weight. Weights are constant.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lapis.training.rewards.builtin as builtin
from lapis.config import check_number, nearest
from lapis.errors import ConfigError, DataError
from lapis.parsing import quoted
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.rewards.functions import InProcess, InWorker
from lapis.training.rewards.language import language
from lapis.training.rewards.reward import Case, Failure, Judge, Record, RewardFunction

BUILT_IN = {
    "number": builtin.number, "json": builtin.json, "exact": builtin.exact, "length": builtin.length,
    "ends": builtin.ends, "language": language,
}  # fmt: skip


class _BuiltIn(InProcess):
    """A built-in reward: it ends by itself, and the field that it reads is looked for before the run."""

    def __init__(self, name: str, function: builtin.Function, field: str | None) -> None:
        super().__init__(name, function, 0.0, limited=False)
        self.name, self.field = name, field

    def check(self, records: Sequence[tuple[Record, str]]) -> None:
        for record, where in records:
            if self.field is not None and self.field not in record:
                raise DataError(f"{where}: reward {self.name} reads the field {self.field}, which is missing; "
                                f"{nearest(self.field, record)}")  # fmt: skip
            if self.field is not None:
                (value,) = self.score([Case("", str(record[self.field]), record, where)])
                if isinstance(value, Failure):
                    raise DataError(f"{where}: reward {self.name}: {value.why}")


def make_judge(settings: Any, tokenizer: Tokenizer, seconds: float) -> Judge:
    """The rewards of a run. Raises ConfigError for one that is not known, cannot be made, or has a wrong signature."""
    given = settings if isinstance(settings, (list, tuple)) and not _is_pair(settings) else [settings]
    if not given or given == [None]:
        raise ConfigError("rewards is missing; give names, functions or folders of reward models")
    rewards: list[tuple[str, float, RewardFunction]] = []
    described: list[Any] = []
    notes: list[str] = []
    for number, entry in enumerate(given, 1):
        target, weight, options, shown_as = _read(entry, f"rewards[{number}]")
        name, reward, note = _make(target, options, tokenizer, seconds)
        name = shown_as or name
        if any(name == other for other, _, _ in rewards):
            name = f"{name}_{number}"
        rewards.append((name, weight, reward))
        described.append({"reward": target if isinstance(target, str) else name, "weight": weight, "options": options})
        notes += [note] if note else []
    return Judge(rewards, described, notes)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and callable(value[0]) and isinstance(value[1], (int, float))


def _read(entry: Any, where: str) -> tuple[Any, float, dict[str, Any], str]:
    """What, its weight, its options, and the name to show it by."""
    if isinstance(entry, str) or callable(entry):
        return entry, 1.0, {}, ""
    if _is_pair(entry):
        return entry[0], float(entry[1]), {}, ""
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{where} is {quoted(entry)}; expected a name, a function, or name (or path), weight and options"
        )
    unknown = set(entry) - {"name", "path", "weight", "options"}
    if unknown:
        key = min(map(str, unknown))
        raise ConfigError(f'{where}: unknown key "{key}"; {nearest(key, ("name", "path", "weight", "options"))}')
    target = entry.get("path", entry.get("name"))
    weight, options = entry.get("weight", 1.0), entry.get("options") or {}
    if not isinstance(target, str):
        raise ConfigError(f"{where}: give name (of a reward that is built in) or path (a folder, or module:function)")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight == 0:
        raise ConfigError(f"{where}: weight is {quoted(weight)}; expected a number that is not 0")
    check_number(weight, f"{where}: weight")
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: options is {quoted(options)}; expected names and values")
    return target, float(weight), dict(options), str(entry["name"]) if "path" in entry and "name" in entry else ""


def _make(
    target: Any, options: dict[str, Any], tokenizer: Tokenizer, seconds: float
) -> tuple[str, RewardFunction, str]:
    """The name, the reward, and a line to show about it."""
    if not isinstance(target, str):
        name = getattr(target, "__name__", type(target).__name__)
        return name, InProcess(name, target, seconds), ""
    if target in BUILT_IN:
        make: Any = BUILT_IN[target]
        parameters = inspect.signature(make).parameters
        for key in options:
            if key not in parameters:
                raise ConfigError(f'reward {target}: unknown option "{key}"; {nearest(key, parameters)}')
        try:
            function = make(**options)
        except TypeError as error:
            raise ConfigError(f"reward {target}: {error}") from None
        field = options.get("field", parameters["field"].default) if "field" in parameters else None
        return target, _BuiltIn(target, function, field), ""
    if os.path.isdir(target):
        from lapis.training.rewards.model import RewardModel

        if options:
            raise ConfigError(f"reward {target}: a reward model takes no options")
        model = RewardModel(target, tokenizer)
        return Path(target).name, model, model.note
    if ":" in target:
        return target.rpartition(":")[2], InWorker(target, target, options, seconds), ""
    raise ConfigError(f"reward {target}: is no folder and no module:function; {nearest(target, BUILT_IN)}")
