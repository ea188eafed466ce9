"""What differs between the layers of one model (Gemma 4), and vectors of a token that each layer reads for itself."""

from dataclasses import dataclass

from lapis.config import check_numbers
from lapis.errors import ConfigError


@dataclass(frozen=True)
class Uneven:
    """How layers without a window differ from those with one, and the last layers from those before them.

    head_dim, kv_heads: of layers without a window. keys_as_values: These have no v; a value is the key before it is
    multiplied by its norm's weight and turned. borrowing: How many of the last layers have no k and v; each reads the
    keys and values of the last layer before them of its own kind, with a window or without. double: These have an MLP
    of twice the width.
    """

    head_dim: int
    kv_heads: int
    keys_as_values: bool = False
    borrowing: int = 0
    double: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, "uneven")
        if min(self.head_dim, self.kv_heads) < 1 or self.borrowing < 0:
            raise ConfigError("uneven: head_dim and kv_heads must be 1 or more, borrowing 0 or more")


@dataclass(frozen=True)
class LayerInputs:
    """A vector for each token and layer, which a gate of that layer lets through to the stream.

    It is a row of a table of its own plus a projection of the embedded token (Gemma 3n, Gemma 4). width: Of each
    vector. vocab: Rows of the table.
    """

    width: int
    vocab: int

    def __post_init__(self) -> None:
        check_numbers(self, "layer_inputs")
        if min(self.width, self.vocab) < 1:
            raise ConfigError("layer_inputs: width and vocab must be 1 or more")
