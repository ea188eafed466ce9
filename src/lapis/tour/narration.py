"""Short stories, descriptions and talks that tell the facts of the world in one language.

Each document is made from a plan that is the same in every language: which sentences follow each other. The wording
of each sentence is drawn from the language's own list. Leaves out lessons at school, chats and questions: see ask.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from lapis.tour.people import Person
from lapis.tour.words.base import COLORED, COUNTABLE, Language
from lapis.tour.words.en import LANGUAGE as ENGLISH

Slots = dict[str, str]


STORIES = {
    "market": ("market.1", "market.2", "buy", "end.market"),
    "lost": ("lose", "lost.2", "lost.3", "end.lost"),
    "gift": ("gift.1", "gift.2", "give", "gift.4"),
    "walk": ("go", "walk.2", "meet", "walk.4", "end.walk"),
    "rain": ("rain.1", "rain.2", "rain.3", "rain.4"),
    "pet": ("run.1", "run.2", "run.3", "run.4"),
    "thing": ("clean.1", "clean.2", "clean.3", "clean.4"),
    "job": ("work.1", "work.2", "work.3", "work.4"),
}
"""Stories and their sentences. The last three need the fact that they are named for."""


class Teller:
    """One language's voice: turns keys of sentences and people into text.

    Args:
        language: the words and sentences.
        people: everyone who may be told about.
    """

    def __init__(self, language: Language, people: Sequence[Person]) -> None:
        self.language = language
        self.people = people
        self.name = {person.name: language.person(person.name, person.female, person.child) for person in people}
        self.facts = {person.name: self._facts(person) for person in people}

    def _facts(self, person: Person) -> Slots:
        """What the sentences about one person's facts need. `other` is the sibling."""
        tables = self.language.tables
        slots: Slots = {"who": self.name[person.name]}
        for relation, key in person.facts.items():
            if relation == "sibling":
                sibling = next(other for other in self.people if other.name == key)
                slots["other"] = self.name[key]
                slots["sib"] = self.language.sibling(person.female, sibling.female, person.sibling_older)
            else:
                kind = "place" if relation == "home" else relation
                slots[kind] = tables[kind][key]
        if self.language.job and "job" in person.facts:
            slots["job"] = self.language.job(person.facts["job"], person.female)
        return slots

    def scene(self, rng: Random, who: Person, other: Person, third: Person) -> Slots:
        """What the sentences of a story need: three people, a spot, a colored thing and a number of foods."""
        tables = self.language.tables
        return self.facts[who.name] | {
            "other": self.name[other.name],
            "third": self.name[third.name],
            "they": self.language.they[who.female and other.female],
            "spot": rng.choice(list(tables["spot"].values())),
            "item": self.language.colored(rng.choice(list(tables["color"])), rng.choice(COLORED)),
            "count": self.language.counted(rng.randint(2, 5), rng.choice(COUNTABLE)),
        }

    def phrase(self, rng: Random, key: str, slots: Mapping[str, str]) -> str:
        """One of the wordings of a sentence."""
        return self.fill(rng.choice(self.language.sentences[key]), slots)

    def state(self, key: str, slots: Mapping[str, str]) -> str:
        """The first wording of a sentence: the one that chats answer with."""
        return self.fill(self.language.sentences[key][0], slots)

    def fill(self, wording: str, slots: Mapping[str, str]) -> str:
        text = wording.format_map(slots)
        return text[0].upper() + text[1:]

    def join(self, sentences: Sequence[str]) -> str:
        return self.language.joiner.join(sentences)

    def others(self, rng: Random, who: Person, among: Sequence[Person] | None = None) -> tuple[Person, Person]:
        """Two more people, neither of them `who` or the sibling of `who`."""
        pool = [person for person in among or self.people if person.name not in (who.name, who.facts.get("sibling"))]
        first, second = rng.sample(pool, 2)
        return first, second

    def document(self, rng: Random, kind: str, who: Person) -> str:
        """One document of a kind, about `who` where the kind is about a person."""
        return self.join(getattr(self, f"_{kind}")(rng, who))

    def _fact(self, rng: Random, who: Person, relation: str, again: float = 0.0) -> str:
        """One fact; by pronoun where the person was named before, with the chance `again`."""
        key = f"{relation}2" if rng.random() < again else relation
        return self.phrase(rng, key, self.facts[who.name])

    def _facts_of(self, rng: Random, who: Person, relations: Sequence[str], named: bool = False) -> list[str]:
        """Some facts, in which pronouns never follow a sentence that names a sibling too."""
        sentences = []
        for relation in relations:
            sentences.append(self._fact(rng, who, relation, 0.4 if named else 0.0))
            named = relation != "sibling"
        return sentences

    def _some(self, rng: Random, who: Person, count: int) -> list[str]:
        return rng.sample(list(who.facts), count)

    def _portrait(self, rng: Random, who: Person) -> list[str]:
        opening = rng.choice(("open", "home.open", ""))
        sentences = [self.phrase(rng, opening, self.facts[who.name])] if opening else []
        sentences += self._facts_of(rng, who, self._some(rng, who, 4), bool(opening))
        if rng.random() < 0.5:
            sentences.append(self.phrase(rng, "close", self.facts[who.name]))
        return sentences

    def _story(self, rng: Random, who: Person) -> list[str]:
        slots = self.scene(rng, who, *self.others(rng, who))
        sentences = self._facts_of(rng, who, self._some(rng, who, 2))
        if rng.random() < 0.3:
            sentences.append(self.phrase(rng, "filler", slots))
        stories = [name for name in STORIES if name not in ("pet", "thing", "job") or name in who.facts]
        sentences += [self.phrase(rng, key, slots) for key in STORIES[rng.choice(stories)]]
        if rng.random() < 0.5:
            sentences.append(self._fact(rng, who, rng.choice(list(who.facts))))
        return sentences

    def _pair(self, rng: Random, who: Person) -> list[str]:
        other, _ = self.others(rng, who)
        both = self.facts[who.name] | {
            "other": self.name[other.name],
            "they": self.language.they[who.female and other.female],
            "place2": self.facts[other.name]["place"],
            "food2": self.facts[other.name]["food"],
        }
        sentences = [self.phrase(rng, "pair.open", both)]
        different = [relation for relation in ("home", "food") if who.facts[relation] != other.facts[relation]]
        sentences += [self.phrase(rng, f"pair.{relation}", both) for relation in different]
        for person in (who, other):
            rest = [relation for relation in person.facts if relation not in ("home", "food")]
            sentences.append(self._fact(rng, person, rng.choice(rest)))
        return [*sentences, self.phrase(rng, "pair.close", both)]

    def _talk(self, rng: Random, who: Person) -> list[str]:
        slots = self.scene(rng, who, *self.others(rng, who))
        with_sibling = slots | self.facts[who.name] | {"third": slots["other"]}
        sentences = [self.phrase(rng, "talk.open", slots)]
        sentences += [
            self.phrase(rng, f"talk.{relation}", with_sibling if relation == "sibling" else slots)
            for relation in self._some(rng, who, rng.randint(2, 3))
        ]
        return [*sentences, self.phrase(rng, "talk.close", slots)]

    def _city(self, rng: Random, who: Person) -> list[str]:
        home = {"place": self.facts[who.name]["place"]}
        neighbors = [person for person in self.people if person.facts["home"] == who.facts["home"]]
        sentences = [self.phrase(rng, "city.open", home)]
        for person in rng.sample(neighbors, min(len(neighbors), 3)):
            other = rng.choice([relation for relation in person.facts if relation != "home"])
            sentences += self._facts_of(rng, person, ["home", other])
        return [*sentences, self.phrase(rng, "city.close", home)]

    def _gloss(self, rng: Random, who: Person) -> list[str]:
        """A few words and what they are in English; the keys of the tables are the English singulars."""
        words: list[tuple[str, str]] = [(self.name[who.name], who.name)]
        for kind in ("color", *rng.sample(["place", "food", "pet", "thing", "job"], 3)):
            key, word = rng.choice(list(self.language.tables[kind].items()))
            as_in_table = kind == "place" or (kind == "food" and self.language.plural_foods)
            words.append((word, ENGLISH.tables[kind][key] if as_in_table else key))
        pairs = [{"word": word, "english": english} for word, english in words if word != english]
        return [self.phrase(rng, "gloss", pair) for pair in pairs]
