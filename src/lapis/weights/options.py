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
class CheckOptions:
    """What is checked of the models and of the place."""

    allow_unrelated: bool = False
    """Go on, with a note, where the difference of two models is taken that are no fine-tunes of each other."""
    same_tokens: bool = False
    """Take rows to stand for the same tokens where a tokenizer cannot be read to prove it."""
    overwrite: bool = False
    """Swap an existing folder for the new one, whole."""
    allow_nonfinite: bool = False
    """Count NaN and Inf instead of stopping."""
    dry_run: bool = False
    """Check everything and say what would be done; read a sample of the weights at most, write nothing."""


@dataclass(frozen=True)
class WriteOptions(CheckOptions):
    """The same, and how weights are written."""

    dtype: Dtype | None = None
    """Of the weights that are written; by default onto's, or what a recipe says. float32 loses nothing of a small
    difference to rounding."""


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
                raise ConfigError(f'{option} is "{value}"; give {" or ".join(str(name) for name in known if name)}')


Bits = Literal["exact", "8", "4", "1"]


@dataclass(frozen=True)
class ExtractOptions(CheckOptions):
    """How a delta is made. Raises ConfigError for values that do not go together."""

    bits: Bits | None = None
    """exact: all bits, compressed. 8 or 4: that many for a number, and a factor for 64. 1: the sign, and a factor for a
    row. By default exact."""
    rank: int | None = None
    """In place of bits: two thin matrices for each matrix, by singular value decomposition."""
    peft: bool = False
    """With a rank: write it as a PEFT adapter, too, in the same folder."""
    embeddings: KeepOrAdd = "keep"
    """keep: of the rows of tokens only those of the chat template's, which is what a graft takes. add: also the
    difference of every row that changed."""
    license: str | None = None
    """What the delta is under; by default what the chat model's card says."""
    allow_nonfinite: bool = False
    """Keep NaN and Inf instead of stopping; only an exact delta can."""

    def __post_init__(self) -> None:
        bits = None if self.bits is None else str(self.bits)
        object.__setattr__(self, "bits", bits)
        if bits not in (None, *get_args(Bits)):
            raise ConfigError(f'delta: bits is "{bits}"; give exact, 8, 4 or 1')
        if self.embeddings not in get_args(KeepOrAdd):
            raise ConfigError(f'delta: embeddings is "{self.embeddings}"; give keep or add')
        if self.rank is not None and bits is not None:
            raise ConfigError(f"delta: bits is {bits} and rank {self.rank}; give one of the two")
        if self.rank is not None and not (isinstance(self.rank, int) and 0 < self.rank < 2**20):
            raise ConfigError(f"delta: rank is {self.rank}; expected a whole number from 1 on")
        if self.peft and self.rank is None:
            raise ConfigError("delta: an adapter has a rank; give --rank, such as --rank 64 --peft")
        if self.allow_nonfinite and (self.rank is not None or bits not in (None, "exact")):
            raise ConfigError("delta: only an exact delta can keep NaN and Inf; leave --allow-nonfinite out")
        if self.rank is None and bits is None:
            object.__setattr__(self, "bits", "exact")


@dataclass(frozen=True)
class MergeOptions(WriteOptions):
    """How a merge is made."""

    seed: int | None = None
    """What random masks are drawn from, instead of the recipe's."""
    stage_memory: float = 2.0
    """Of a recipe in stages: GB within which stages are computed as they are read; a larger one is written first."""

    def __post_init__(self) -> None:
        check_numbers(self, "merge")
        if self.stage_memory < 0:
            raise ConfigError(f"merge: stage_memory is {self.stage_memory:g}; give GB, 0 or more")
