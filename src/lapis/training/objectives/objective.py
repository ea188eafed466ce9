"""What is learned: an objective hands the loop its batches and their loss. The table of them by name.

A new objective is one class and one line in OBJECTIVES. Its constructor is `Name(tokenizer, data, *, context=512,
...)`; every keyword is an option of the settings file, typed by its annotation (see `options`, and training/run.py).
"""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lapis.model.transformer import Transformer
    from lapis.text.tokenizer.tokenizer import Tokenizer
    from lapis.training.loop.state import TrainState

Cursor = dict[str, Any]
Metrics = Mapping[str, float]

# name -> module:class, imported when it is first used
OBJECTIVES = {
    "causal": "lapis.training.objectives.supervised.next_token:Causal",
    "chat": "lapis.training.objectives.supervised.next_token:Chat",
    "reward": "lapis.training.objectives.preference.reward:Reward",
    "dpo": "lapis.training.objectives.preference.preference:DPO",
    "ipo": "lapis.training.objectives.preference.preference:IPO",
    "kto": "lapis.training.objectives.preference.preference:KTO",
    "orpo": "lapis.training.objectives.preference.preference:ORPO",
    "simpo": "lapis.training.objectives.preference.preference:SimPO",
    "masked": "lapis.training.objectives.supervised.masked:Masked",
    "classify": "lapis.training.objectives.supervised.classify:Classify",
    "grpo": "lapis.training.objectives.policy.policy:GRPO",
    "rloo": "lapis.training.objectives.policy.policy:RLOO",
    "ppo": "lapis.training.objectives.policy.policy:PPO",
}


class Objective(Protocol):
    """What `train` is handed. The loop never looks inside a batch, and an objective knows of no ranks.

    It may also have, and the loop and `lapis train` then heed:
    head: "language", "masked", "classes" or "scalar", what must stand on top of the model.
    classes: the labels, in order.
    means: names of metrics that are means already; the others are sums, shown for each supervised count.
    begin(model, folder): before the first step, with the weights that the run starts from, also where it then goes on
    from a checkpoint; what is costly may be kept in `folder`, beside the checkpoints.
    evaluate(model) -> {name: figure}: held-out figures.
    write(folder): further files of the result.
    sample(model) -> str: a few words of what the model says now.
    extra: a module that is trained beside the model (a value head), after `begin`.
    state_tensors() and restore_tensors(tensors): what a checkpoint must hold beside the cursor.
    notes: sentences for the person who waits; halt: why the run must stop, or "".
    compiles: whether the model's blocks may run compiled; not where replies grow token by token.
    """

    rows: int
    """Rows of one epoch."""

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """None where the data is no text."""

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


def find(name: str) -> Callable[..., Objective]:
    """The objective's class. `name` is a key of OBJECTIVES."""
    module, _, attribute = OBJECTIVES[name].partition(":")
    made: Callable[..., Objective] = getattr(import_module(module), attribute)
    return made


def options(objective: Callable[..., Objective]) -> dict[str, inspect.Parameter]:
    """The options of an objective, from its constructor: name -> parameter, with the annotation resolved."""
    make: Any = objective
    hints = typing.get_type_hints(make.__init__ if inspect.isclass(make) else make)
    parameters = inspect.signature(objective).parameters
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in parameters.items()
        if name not in ("tokenizer", "data")
    }
