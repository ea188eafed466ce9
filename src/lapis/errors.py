"""The errors that lapis raises on purpose. Each is one line: what, value, remedy.

LapisError                  a clear refusal; the command line prints it and exits with 1
├── CheckpointError         a model folder: its files, headers, config, names, shapes
├── ConfigError             what the user wrote: a YAML file, key=value, an option's value
├── DataError               text, chats, pairs: file, line and field or byte
├── TemplateError           a chat template that is wrong, or was stopped
├── OutputError             where to write: it exists, is full, is locked, is an input
├── TrainingError           a run that must not go on: NaN, nothing supervised, lost state
└── MissingExtra            an optional dependency is absent; names the install command

Errors of the system (a full disk, no memory) that escape become one line in cli/system_errors.py. Anything else is a
bug, and keeps its traceback.
"""


class LapisError(Exception):
    """A refusal that a user can act on. The message is one line."""


class CheckpointError(LapisError):
    """A model folder that cannot be trusted or does not fit."""


class ConfigError(LapisError):
    """A setting that is unknown, missing or out of range."""


class DataError(LapisError):
    """Input data that is damaged or of the wrong schema."""


class TemplateError(LapisError):
    """A chat template that does not compile, fails, or was stopped."""


class OutputError(LapisError):
    """A place that cannot be written to, or must not be."""


class TrainingError(LapisError):
    """A training run that cannot start, go on, or resume."""


class MissingExtra(LapisError):
    """An optional dependency that is not installed."""

    def __init__(self, need: str, extra: str) -> None:
        super().__init__(f"{need} is not installed; pip install 'lapis[{extra}]'")
