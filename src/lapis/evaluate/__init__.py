"""Scores: bits per byte on text, NLL and stop rate on chats, accuracy on choices, classes and preference pairs."""

from typing import TYPE_CHECKING

from lapis.rooms import furnish

if TYPE_CHECKING:
    from lapis.evaluate.chats import answer, score_chats
    from lapis.evaluate.choices import Choice, read_choices, score_choices
    from lapis.evaluate.classification import predict, score_classes
    from lapis.evaluate.preference import score_pairs
    from lapis.evaluate.text import bits_per_byte, score_text

__all__ = [
    "Choice", "answer", "bits_per_byte", "predict", "read_choices", "score_chats", "score_choices", "score_classes",
    "score_pairs", "score_text",
]  # fmt: skip

furnish(
    __name__,
    {
        "Choice": "choices", "answer": "chats", "bits_per_byte": "text", "read_choices": "choices",
        "predict": "classification", "score_chats": "chats", "score_choices": "choices",
        "score_classes": "classification", "score_pairs": "preference", "score_text": "text",
    },
)  # fmt: skip
