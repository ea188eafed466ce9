"""What to score and how: the one place where the options of an evaluation, their defaults and their help are written.

Needs no torch, so that the command line can read it at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lapis.config import check_numbers
from lapis.errors import ConfigError


@dataclass(frozen=True)
class EvalOptions:
    """What to score a model on, and how. Raises ConfigError for a value out of range."""

    text: tuple[Path, ...] = ()
    """Files of documents: bits per byte."""
    chats: tuple[Path, ...] = ()
    """jsonl of chats: response NLL, and the share of greedy replies that end."""
    choices: Path | None = None
    """jsonl, JSON or parquet of prompt (or messages), choices and answer: accuracy."""
    classes: Path | None = None
    """Labeled texts (tsv, csv, jsonl) or pictures (npz, a folder of class folders): accuracy, F1, confusion."""
    pairs: tuple[Path, ...] = ()
    """jsonl of prompt, chosen and rejected: how often the model prefers the chosen reply, how sure it is, and what
    length has to do with it; by rewards, or by the log-probabilities of a language model."""
    reference: str | None = None
    """A model folder; pairs are then compared by the log-ratio to it (a policy's implicit reward)."""
    context: int | None = None
    """Tokens that the model sees at once; by default its own context."""
    limit: int | None = None
    """Look at so many documents, chats, questions, examples and pairs only."""
    max_tokens: int = 64
    """Within which a reply has to end."""
    positive: str | None = None
    """The class that F1 is of, where there are two; by default the second."""
    tasks: tuple[str, ...] = ()
    """Names of tasks of lm-evaluation-harness (needs lapis[eval]); may be given again."""
    task_folder: Path | None = None
    """Task files of one's own; they may name Python that is run."""
    fewshot: int | None = None
    """Examples before each question of a task; by default as the task says."""
    chat: bool = False
    """Ask the tasks' questions through the chat template."""
    precision: Literal["float32", "bf16"] | None = None
    """Of weights and arithmetic; default: that of the folder, or float32 where the processor has no bfloat16
    instructions. Scores in bf16 are about 0.001 off."""
    weights: Literal["int8"] | None = None
    """int8 rounds each row of a weight to 255 steps, as generate --weights int8 does; a text is scored without that
    too, and the difference is what it costs. On a CPU."""
    device: str | None = None
    """cpu or cuda; default: a GPU where there is one."""

    def __post_init__(self) -> None:
        check_numbers(self, "eval")
        for name in ("context", "limit", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"eval: {name} is {value}; give 1 or more")
