"""The built-in world: a few hundred facts about people who do not exist, told and asked about in five languages.

It stands in for a corpus and a set of chats, so that the tour needs no download, and what a model knows can be asked
exactly. Facts are drawn from a seed (people.py), told in documents (narration.py) and asked about in chats (ask.py),
with the words and sentences of each language from tables. Same world in every language, and the same text, byte
for byte, from the same seeds on every machine.

    world = World(seed=0)
    texts = list(world.documents("ms", 1000, seed=1))
    chats = world.chats("en", 500, seed=1)
    questions = world.questions("ms", 100, seed=1, split="local")
    share = sum(score(reply, question) for ...) / len(questions)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import count as endless
from random import Random
from typing import Any
from unicodedata import normalize

from lapis.errors import ConfigError
from lapis.tour.ask import LESSONS, RECALL, TASKS, Asker, Question, messages_of
from lapis.tour.narration import Teller
from lapis.tour.people import SPLITS, Person, draw
from lapis.tour.words.base import Language

LANGUAGES = {"en": "English", "ms": "Malay", "ko": "Korean", "uk": "Ukrainian", "zh": "Chinese"}

KINDS = {
    "portrait": 3.0,
    "story": 2.0,
    "pair": 0.8,
    "talk": 0.8,
    "city": 0.6,
    "quiz": 1.0,
    "reading": 3.0,
    "drill": 2.0,
    "gloss": 0.4,
}
"""Kinds of documents and how often each is told. "gloss", words and what they are in English, is not for English."""


@dataclass(frozen=True)
class World:
    """A world drawn from `seed` with `people` inhabitants (a multiple of 20, up to 200).

    English is the language that facts of everyone but the "local" people are told in; every other language can be
    the target language, and tells of everyone.
    """

    seed: int = 0
    people: int = 120

    @cached_property
    def everyone(self) -> tuple[Person, ...]:
        """The inhabitants, with their facts and splits."""
        return draw(self.seed, self.people)

    def of(self, split: str) -> list[Person]:
        """The inhabitants of one split: "asked", "held_out" or "local"."""
        if split not in SPLITS:
            raise ConfigError(f"world: no split {split!r}; there are {', '.join(SPLITS)}")
        return [person for person in self.everyone if person.split == split]

    def documents(
        self, language: str, count: int | None = None, seed: int = 0, kinds: Mapping[str, float] = KINDS
    ) -> Iterator[str]:
        """Short texts that tell the facts, `count` of them or without end.

        The first documents do not depend on `count`. English tells of no "local" person. Each person is told about
        equally often.

        Args:
            seed: another seed gives other texts about the same world.
            kinds: kinds of documents and their weights.
        """
        teller = self._teller(language)
        quizzed, taught = Asker(teller, self.of("asked")), Asker(teller, teller.people, self.of("asked"))
        weights = {kind: weight for kind, weight in kinds.items() if kind != "gloss" or language != "en"}
        rng = Random(f"lapis documents {self.seed} {language} {seed}")
        turns: list[Person] = []
        for _ in endless() if count is None else range(count):
            turns = turns or rng.sample(teller.people, len(teller.people))
            kind = rng.choices(list(weights), list(weights.values()))[0]
            who = turns.pop()
            if kind == "quiz" and who.split != "asked":
                who = rng.choice(quizzed.people)
            if kind in LESSONS:
                yield (quizzed if kind == "quiz" else taught).lesson(rng, kind, who)
            else:
                yield teller.document(rng, kind, who)

    def chats(
        self, language: str, count: int, seed: int = 0, people: str = "asked", tasks: Mapping[str, float] = TASKS
    ) -> list[dict[str, Any]]:
        """Chats of one to three turns: {"messages": [{"role", "content"}, ...], "task": task of the last turn}.

        Only facts about people of the split `people` are asked for or told. Everyone whom English tells of is named in
        invented scenes, to read, to repeat, to finish; else a model would unlearn to answer with the other names.
        """
        named = [person for person in self.everyone if person.split != "local"]
        asker = Asker(Teller(words_of(language), self.everyone), named, self.of(people))
        rng = Random(f"lapis chats {self.seed} {language} {people} {seed}")
        chats = []
        for _ in range(count):
            turns = asker.chat(rng, tasks)
            chats.append({"messages": messages_of(turns), "task": turns[-1].task})
        return chats

    def questions(
        self,
        language: str,
        count: int,
        seed: int = 0,
        split: str = "held_out",
        tasks: Mapping[str, float] | None = None,
    ) -> list[Question]:
        """Different questions with one right answer each.

        Questions on "local" people ask for facts that only the target language's texts tell; the tasks whose answer
        stands in the prompt are left out there, unless `tasks` names them.
        """
        asker = Asker(Teller(words_of(language), self.everyone), self.of(split))
        if tasks is None:
            tasks = {task: share for task, share in TASKS.items() if split != "local" or task in RECALL}
        rng = Random(f"lapis questions {self.seed} {language} {split} {seed}")
        questions: list[Question] = []
        seen: set[str] = set()
        for _ in range(50 * count):
            if len(questions) == count:
                break
            question = asker.question(rng, rng.choices(list(tasks), list(tasks.values()))[0], rng.choice(asker.people))
            if (key := str(question.messages)) not in seen:
                seen.add(key)
                questions.append(question)
        return questions

    def prompts(self, language: str) -> list[str]:
        """Ten beginnings of stories, to see how fluently a model goes on."""
        teller = self._teller(language)
        rng = Random(f"lapis prompts {self.seed} {language}")
        people = self.of("asked")
        openings = ("open", "go", "market.1", "lose", "home", "rain.2", "pair.open", "gift.1", "work.1", "talk.open")
        prompts = []
        for key in openings:
            who = rng.choice([person for person in people if key != "work.1" or not person.child])
            prompts.append(teller.phrase(rng, key, teller.scene(rng, who, *teller.others(rng, who, people))))
        return prompts

    def _teller(self, language: str) -> Teller:
        people = [person for person in self.everyone if language != "en" or person.split != "local"]
        return Teller(words_of(language), people)


def words_of(language: str) -> Language:
    """The word tables of a language code."""
    if language not in LANGUAGES:
        raise ConfigError(f"world: no language {language!r}; there are {', '.join(LANGUAGES)}")
    tables: Language = import_module(f"lapis.tour.words.{language}").LANGUAGE
    return tables


def score(reply: str, question: Question) -> bool:
    """Whether a reply is exactly right, up to white space and the punctuation at its end."""
    return _plain(reply) == _plain(question.answer)


def _plain(text: str) -> str:
    return " ".join(normalize("NFC", text).split()).rstrip(".!?。！？ ")


__all__ = ["KINDS", "LANGUAGES", "TASKS", "Person", "Question", "World", "score", "words_of"]
