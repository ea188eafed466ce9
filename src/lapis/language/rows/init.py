"""How rows of new tokens may begin, by the names that users give; extend.py makes them. Imports nothing heavy."""

from typing import Literal

Init = Literal["mean", "mean-norm", "calibrated", "distilled", "random"]
