"""What every word table is made of: a word with its written forms, and a language that holds the tables.

A sentence is a plain format string. `{pet}` is the word itself, `{pet.a}` one of its written forms, and
`{who:пішов|пішла}` picks by the word's gender. No form is ever guessed: a form that a table lacks is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Sentences = Mapping[str, tuple[str, ...]]


class Word(str):
    """A word: the string is its base form, the attributes are its other forms, `gender` indexes `{word:a|b|c}`."""

    gender: int

    def __new__(cls, base: str, gender: int = 0, **forms: str) -> Word:
        word = super().__new__(cls, base)
        vars(word).update(forms, gender=gender)
        return word

    def form(self, name: str) -> str:
        """One written form; an AttributeError where the table lacks it."""
        return str(getattr(self, name))

    def __format__(self, choices: str) -> str:
        return choices.split("|")[self.gender] if choices else str.__str__(self)


@dataclass(frozen=True)
class Language:
    """One language: its word tables, its sentences, and what is built from several tables.

    Args:
        tables: kind ("place", "food", "pet", "thing", "job", "spot", "color") -> key -> word.
        person: (name, female, child) -> word. Gender 0 is male, 1 is female.
        sibling: (who is female, the other is female, the other is older) -> word for what the other is to who.
        colored: (color key, thing key) -> word, such as "red bag".
        counted: (2 to 5, key of a countable food) -> word, such as "three mangoes".
        job: (key of a job, female) -> word, where a job is called after who has it; without it, the table's word.
        they: what two people are called again, where it matters if both are female: (not both, both).
        plural_foods: whether the table's foods that are bought by number stand in the plural.
        joiner: what stands between two sentences.
        comma: what stands between two entries of a list.
        stop: what ends a sentence.
    """

    code: str
    tables: Mapping[str, Mapping[str, Word]]
    person: Callable[[str, bool, bool], Word]
    sibling: Callable[[bool, bool, bool], Word]
    colored: Callable[[str, str], Word]
    counted: Callable[[int, str], Word]
    sentences: Sentences
    job: Callable[[str, bool], Word] | None = None
    they: tuple[str, str] = ("", "")
    plural_foods: bool = False
    joiner: str = " "
    comma: str = ", "
    stop: str = "."


def rows(table: str, separator: str | None = None) -> list[list[str]]:
    """The cells of a table that is written one row per line."""
    return [line.split(separator) for line in table.strip().split("\n")]


ANSWERS: Sentences = {
    "answer.home": ("{place}",), "answer.food": ("{food}",), "answer.pet": ("{pet}",), "answer.thing": ("{thing}",),
    "answer.job": ("{job}",), "answer.sibling": ("{other}",), "answer.buy": ("{count.number}",),
    "answer.lose": ("{item.color}",), "answer.give": ("{other}",), "answer.meet": ("{other}",),
}  # fmt: skip
"""Answers of one word, which are the same in every language that does not decline them."""

COUNTABLE = (
    "apple", "mango", "banana", "orange", "pear", "peach", "lemon",
    "coconut", "tomato", "potato", "durian", "egg", "pumpkin", "cucumber",
)  # fmt: skip
"""Foods that are bought by number; the others are only liked."""

COLORED = (
    "bicycle", "umbrella", "hat", "bag", "ball", "book",
    "cup", "scarf", "lamp", "basket", "drum", "camera",
)  # fmt: skip
"""Things that come in colors, and are lost, found and given."""
