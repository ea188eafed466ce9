"""Scores: bits per byte on text, response NLL and stop rate on chats, accuracy on multiple choice."""

from typing import TYPE_CHECKING

from lapis.rooms import furnish

if TYPE_CHECKING:
    from lapis.evaluate.chats import answer, score_chats
    from lapis.evaluate.choices import Choice, read_choices, score_choices
    from lapis.evaluate.text import bits_per_byte, score_text

__all__ = ["Choice", "answer", "bits_per_byte", "read_choices", "score_chats", "score_choices", "score_text"]

furnish(
    __name__,
    {
        "Choice": "choices", "answer": "chats", "bits_per_byte": "text", "read_choices": "choices",
        "score_chats": "chats", "score_choices": "choices", "score_text": "text",
    },
)  # fmt: skip
