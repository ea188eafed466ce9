"""Who lives in the built-in world, and the facts about them, drawn from a seed. No words here: names and keys only.

Every person has four facts: a home, a food, a pet or a thing, and a job (adults) or a sibling (children). Values are
dealt out evenly, so that no answer is a good guess. People fall into three splits: "asked" (training chats ask for
their facts), "held_out" (every text tells about them; training chats name them in invented scenes only, and neither
ask for nor tell a fact of theirs) and "local" (only the target language's texts tell about them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from lapis.errors import ConfigError
from lapis.tour.words.en import LANGUAGE as ENGLISH
from lapis.tour.words.names import FEMALE

SPLITS = {"asked": 0.45, "held_out": 0.20, "local": 0.35}
RELATIONS = ("home", "food", "pet", "thing", "job", "sibling")


@dataclass(frozen=True)
class Person:
    """One inhabitant.

    Args:
        facts: relation -> key of a word, or the sibling's name.
        sibling_older: whether the sibling is the older one of the two.
    """

    name: str
    female: bool
    child: bool
    split: str
    facts: Mapping[str, str]
    sibling_older: bool = False


def draw(seed: int, people: int) -> tuple[Person, ...]:
    """The inhabitants of a world, the same for a seed on every machine and Python."""
    if people % 20 or not 20 <= people <= len(FEMALE):
        raise ConfigError(f"world: {people} people; give a multiple of 20 from 20 to {len(FEMALE)}")
    rng = Random(f"lapis world {seed}")
    women = _shuffled(rng, [name for name, female in FEMALE.items() if female])[: people // 2]
    men = _shuffled(rng, [name for name, female in FEMALE.items() if not female])[: people // 2]
    names = _shuffled(rng, women + men)
    dealt = {kind: _deal(rng, list(ENGLISH.tables[kind]), people) for kind in ("place", "food", "pet", "thing", "job")}

    everyone = []
    pairs = people // 2
    for index, name in enumerate(names):
        pair, second = divmod(index, 2)
        child = pair % 2 == 0
        owned = "pet" if rng.random() < 0.5 else "thing"
        facts = {"home": dealt["place"][index], "food": dealt["food"][index], owned: dealt[owned][index]}
        facts |= {"sibling": names[index ^ 1]} if child else {"job": dealt["job"][index]}
        split = _split(pair // 2, (pairs + 1 - pair % 2) // 2)
        everyone.append(Person(name, FEMALE[name], child, split, facts, sibling_older=child and second == 1))
    return tuple(everyone)


def _split(index: int, total: int) -> str:
    """The split of pair `index` of `total`; a pair stays together, so that siblings are told of together."""
    upper = 0.0
    for split, share in SPLITS.items():
        upper += share * total
        if index < round(upper):
            return split
    raise AssertionError("the shares of SPLITS add up to one")


def _shuffled(rng: Random, values: Sequence[str]) -> list[str]:
    return rng.sample(values, len(values))


def _deal(rng: Random, values: Sequence[str], count: int) -> list[str]:
    """`count` values in random order, each as often as any other (by one more at most)."""
    return _shuffled(rng, [values[index % len(values)] for index in range(count)])
