"""How a graft or a merge is made: the one place where options, their defaults and their help are written.

Needs no torch, so that the command line can read it at once.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from lapis.config import check_numbers
from lapis.errors import ConfigError

KeepOrAdd = Literal["keep", "add"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class WriteOptions:
    """What is checked of the models, and how the output is written."""

    allow_unrelated: bool = False
    """Go on, with a note, where the difference of two models is taken that are no fine-tunes of each other."""
    same_tokens: bool = False
    """Take rows to stand for the same tokens where a tokenizer cannot be read to prove it."""
    dtype: Dtype | None = None
    """Of the weights that are written; by default onto's, or what a recipe says. float32 loses nothing of a small
    difference to rounding."""
    overwrite: bool = False
    """Swap an existing folder for the new one, whole."""
    allow_nonfinite: bool = False
    """Count NaN and Inf instead of stopping."""
    dry_run: bool = False
    """Check everything and say what would be done; read a sample of the weights at most, write nothing."""


@dataclass(frozen=True)
class GraftOptions(WriteOptions):
    """How a graft is made. Raises ConfigError for a value that there is not."""

    embeddings: KeepOrAdd | None = None
    """keep: onto's, with chat's rows for the template's tokens. add: the difference as well, for shared tokens. By
    default keep, or what a plan given as scale says."""
    norms: KeepOrAdd = "keep"
    """keep: onto's. add: the difference as well."""
    template: Literal["chat", "onto"] = "chat"
    """Whose rows the chat template's tokens have. onto: where that is the one that can chat, and what base learned
    meanwhile is added."""

    def __post_init__(self) -> None:
        for option, value, known in (
            ("embeddings", self.embeddings, (None, "keep", "add")),
            ("norms", self.norms, ("keep", "add")),
            ("template", self.template, ("chat", "onto")),
            ("dtype", self.dtype, (None, *get_args(Dtype))),
        ):
            if value not in known:
                raise ConfigError(
                    f'graft: {option} is "{value}"; give {" or ".join(str(name) for name in known if name)}'
                )


@dataclass(frozen=True)
class MergeOptions(WriteOptions):
    """How a merge is made."""

    seed: int | None = None
    """What random masks are drawn from, instead of the recipe's."""

    def __post_init__(self) -> None:
        check_numbers(self, "merge")
