"""What is learned: an objective gives the loop its batches and their loss, and says how it is evaluated.

A new objective is a dataclass that extends `Objective`, and one line in OBJECTIVES (__init__.py). Its fields after
`data` are its options in a settings file, typed by their annotations; its docstring explains them. What it does not
override does nothing: most objectives need `describe`, `batches`, `prepare` and `loss` only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from lapis.model.transformer import Transformer
from lapis.text.rows.rows import shuffled
from lapis.text.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")

SMALL_BATCH = 512  # tokens of a batch to measure speed and memory with

Cursor = dict[str, Any]
Metrics = Mapping[str, float]
Loss = tuple[Tensor, int, Metrics]


class DataPlace(Protocol):
    """Where in its data a run is, as far as `batches` must know.

    Attributes:
        rows: Rows of one micro-batch.
        parts: Micro-batches of one step, over all processes.
        seed: Of the order of the data.
        cursor: What was behind the last batch; None at the start.
    """

    rows: int
    parts: int
    seed: int
    cursor: Cursor | None


@dataclass
class FirstRows:
    """The place of a batch of so many rows at the start of the data."""

    rows: int
    seed: int
    parts: int = 1
    cursor: Cursor | None = None


@dataclass(eq=False)
class Objective(ABC):
    """Base class. The loop never looks into a batch, and an objective needs to know nothing of processes.

    Args:
        tokenizer: None where the data is no text.
        data: What to learn from, as the objective describes it.
        context: Tokens of a row.
    """

    tokenizer: Tokenizer | None
    data: Any
    _: KW_ONLY
    context: int = 512

    name: ClassVar[str] = ""
    head: ClassVar[Literal["language", "masked", "classes", "scalar"]] = "language"
    """What must be on top of the model."""
    needs_tokenizer: ClassVar[bool] = True
    compiles: ClassVar[bool] = True
    """Whether the model's blocks may run compiled; not where replies grow token by token."""
    separable: ClassVar[bool] = True
    """Whether the loss of a batch is the sum of the losses of its rows, and computing it draws nothing."""
    computes_first: ClassVar[bool] = False
    """Whether `begin` runs a model over the data."""
    means = frozenset[str]()
    """Names of metrics that are means already. The others are sums, and are shown per supervised count."""
    rows = 0
    """Rows of one epoch."""
    halt = ""
    """Why the run must stop after this step; "" while it need not."""

    notes: list[str] = field(default_factory=list, init=False, repr=False)
    """Lines to show to the user. The loop shows them after each step, and empties the list."""
    heard: Callable[[int, int], None] | None = field(default=None, init=False, repr=False)
    """Hears how many parts of how many an evaluation has done."""

    @property
    def class_names(self) -> list[str]:
        """The labels of a head with classes, in their order."""
        return []

    @property
    def extra_module(self) -> nn.Module | None:
        """A module that is trained beside the model (a value head); asked for after `begin`."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The objective, its options and a digest of its data, as JSON. A rerun that differs in it is refused."""

    def coverage(self) -> list[str]:
        """Lines about the data, shown before a run starts."""
        counts = self.describe().get("counts", {})
        return [", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items())] if counts else []

    def begin(self, model: Transformer, folder: Path | None = None) -> None:
        """Called once before the first step, also where the run then goes on from a checkpoint.

        Args:
            model: With the weights that the run starts from.
            folder: Where costly results may be kept, beside the checkpoints; None keeps nothing.
        """
        return None

    def check_changes(self, changes: Mapping[str, str], cursor: Cursor) -> None:
        """Raises TrainingError where a run cannot go on from its place in the data with other settings.

        Args:
            changes: `key was X, is Y` of what was allowed to change, by the setting's name.
            cursor: What came with the last batch that was learned from.
        """
        return None

    @abstractmethod
    def batches(self, state: DataPlace) -> Iterator[tuple[Any, Cursor]]:
        """Micro-batches of `state.rows` rows from `state.cursor` on, without end, each with the cursor after it."""

    def prepare(self, model: Transformer, batch: Any) -> Any:
        """What needs the model but no gradient (rollouts, reference log-probabilities).

        Returns:
            The batch that `loss` gets.
        """
        return batch

    @property
    def tokens_per_row(self) -> float:
        """Mean tokens of a row, to say how many rows are a small batch."""
        return float(self.context)

    def small_batch(self, model: Transformer, state: DataPlace, tokens: int) -> Any:
        """A batch of about `tokens` tokens or less, as `loss` gets it, to measure speed and memory with.

        Nothing of the run depends on it, and it leaves the place in the data as it is.
        """
        rows = max(1, min(state.rows, int(tokens / max(1.0, self.tokens_per_row))))
        batch, _ = next(self.batches(FirstRows(rows, state.seed)))
        return self.prepare(model, batch)

    @abstractmethod
    def loss(self, model: Transformer, batch: Any) -> Loss:
        """The loss of one micro-batch.

        Returns:
            The summed loss; the count that the loop divides by, over the whole step; and metrics, as sums (but see
            `means`). The loop knows the metrics "tokens" (positions computed) and "bytes" (of text in the loss).
        """

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Held-out metrics by name; empty where no data is held out."""
        return {}

    def counted(self, parts: Sequence[T]) -> Iterator[T]:
        """The parts of an evaluation one after another; `heard` is called with how many are done."""
        for done, part in enumerate(parts):
            if self.heard is not None:
                self.heard(done, len(parts))
            yield part

    def apart(self, batch: Any) -> list[Any]:
        """The texts that share a row, each as a batch of its own; empty where none do. batch: as `loss` gets it."""
        return []

    def name_batch(self, batch: Any, cursor: Cursor) -> str:
        """Which of its data a micro-batch holds, for a person.

        Args:
            batch: As `batches` gives it.
            cursor: What came with it.
        """
        places = ", ".join(f"{name} {value}" for name, value in cursor.items())
        return f"what the data has before {places}"

    def sample(self, model: Transformer) -> str:
        """A few words that the model writes now; "" where there is nothing to show."""
        return ""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the model and the cursor."""
        return {}

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `state_tensors`."""
        return None

    def write(self, folder: Path) -> None:
        """Writes further files of the result into its folder."""
        return None


def in_order(
    count: int, size: int, cursor: Cursor | None, seed: int
) -> Iterator[tuple[list[int], list[int], dict[str, Any]]]:
    """The order in which examples are read: a seeded permutation per epoch, without end.

    Args:
        count: Examples of an epoch.
        size: Examples of a batch.
        cursor: What an earlier batch came with; None at the start.
        seed: Of the permutations. A cursor's own seed goes before it.

    Yields:
        Numbers of examples; their places in the stream of all epochs; the cursor after them. What is random about an
        example (masks, shifts) is drawn from seed and place (`random_of`), so that it depends on no batch size, on no
        process, and not on where a run was stopped.
    """
    epoch, row = (cursor["epoch"], cursor["row"]) if cursor else (0, 0)
    seed = cursor["seed"] if cursor else seed
    while True:
        numbers: list[int] = []
        places: list[int] = []
        while len(numbers) < size:
            epoch, row = (epoch + 1, 0) if row == count else (epoch, row)
            now = min(count - row, size - len(numbers))
            numbers += shuffled(np.arange(row, row + now), count, seed, epoch).tolist()
            places += range(epoch * count + row, epoch * count + row + now)
            row += now
        yield numbers, places, {"epoch": epoch, "row": row, "seed": seed}


def random_of(seed: int, place: int) -> np.random.Generator:
    """The random numbers of one place in the stream of examples."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, place]))
