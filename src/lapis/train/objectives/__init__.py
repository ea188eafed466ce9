"""What is learned: an objective hands the loop its batches and their loss. The table of them by name.

A new objective is one class and one line in OBJECTIVES; its options and their help come from its signature.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lapis.model.transformer import Transformer
    from lapis.text.tokenizer import Tokenizer
    from lapis.train.state import TrainState

Cursor = dict[str, Any]
Metrics = Mapping[str, float]


class Objective(Protocol):
    """What `train` is handed. The loop never looks inside a batch."""

    tokenizer: "Tokenizer"
    rows: int
    """Rows of one epoch."""

    def describe(self) -> dict[str, Any]:
        """The objective and a digest of its data, as JSON: a rerun on other data is refused."""

    def batches(self, state: "TrainState") -> Iterator[tuple[Any, Cursor]]:
        """Micro-batches of state.rows rows from state.cursor on, without end, each with the cursor behind it."""

    def prepare(self, model: "Transformer", batch: Any) -> Any:
        """What needs the model but no gradient (rollouts, reference log-probabilities); the batch that `loss` gets."""

    def loss(self, model: "Transformer", batch: Any) -> tuple[Tensor, int, Metrics]:
        """The summed loss, what to divide it by over the whole step, and sums to report.

        Metrics that the loop knows: "tokens" (positions computed), "bytes" (of text that the loss is over).
        """

    def sample(self, model: "Transformer") -> str:
        """A few words of what the model says now."""


from lapis.train.objectives.supervised import Causal, Chat  # noqa: E402  (they follow the protocol above)

OBJECTIVES: dict[str, Callable[..., Objective]] = {"causal": Causal, "chat": Chat}

__all__ = ["OBJECTIVES", "Causal", "Chat", "Cursor", "Metrics", "Objective"]
