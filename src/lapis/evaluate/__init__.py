"""Scores: bits per byte on text, response NLL and stop rate on chats, accuracy on multiple choice."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapis.evaluate.chats import answer, score_chats
    from lapis.evaluate.choices import Choice, read_choices, score_choices
    from lapis.evaluate.text import bits_per_byte, score_text

_PLACES = {
    "Choice": "choices", "answer": "chats", "bits_per_byte": "text", "read_choices": "choices",
    "score_chats": "chats", "score_choices": "choices", "score_text": "text",
}  # fmt: skip

__all__ = ["Choice", "answer", "bits_per_byte", "read_choices", "score_chats", "score_choices", "score_text"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lapis.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"lapis.evaluate.{_PLACES[name]}"), name)
