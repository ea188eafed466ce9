"""Chats and questions about the world in one language: facts, reading, repeating, lists, endings, answers of one word.

The reply to a question of one kind always has one wording, so that an exact match is fair. The kinds of tasks and
the shapes of questions and replies are the same in every language. The same questions also stand in documents, as
lessons at school where children ask and answer each other: the text of any language has people who ask and answer,
and a model that never read any of it would have nothing to answer from. Lessons hold no template and no chat turn.
They ask for facts only about the people whom training chats ask about; of others they only tell and repeat stories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from lapis.tour.narration import STORIES, Slots, Teller
from lapis.tour.people import RELATIONS, Person

Message = dict[str, str]

TASKS = {
    "fact": 0.22,
    "word": 0.10,
    "read": 0.27,
    "read_word": 0.13,
    "repeat": 0.10,
    "list": 0.06,
    "tell": 0.05,
    "finish": 0.07,
}
"""Tasks and their shares of the turns. The answers to "fact", "word" and "tell" stand in no prompt."""

PRACTICE = {
    "fact": 0.12,
    "word": 0.12,
    "read": 0.26,
    "read_word": 0.20,
    "repeat": 0.12,
    "list": 0.08,
    "tell": 0.03,
    "finish": 0.07,
}
"""The same tasks in chats for training, where those that take long to learn come more often."""

LESSONS = {"quiz": ("fact", "word"), "reading": ("read", "read_word"), "drill": ("repeat", "repeat", "list", "finish")}
"""Documents that tell of a lesson, and the tasks in them."""

RECALL = ("fact", "word", "tell")

PASSAGES = {
    "market": (("go", "market.2", "buy"), ("go", "buy")),
    "lost": (("lose", "lost.2", "find"), ("lose", "find")),
    "gift": (("gift.1", "give", "gift.4"), ("give",)),
    "walk": (("go", "meet", "walk.4"), ("go", "walk.2", "meet")),
}
"""Passages to read: for each, some choices of sentences. Those that can be asked about get their first wording."""


@dataclass(frozen=True)
class Turn:
    """One question and its only right answer. `about` is a person's name, `relation` the fact or the sentence asked."""

    ask: str
    answer: str
    task: str
    about: str
    relation: str


@dataclass(frozen=True)
class Question:
    """Messages that end with the user's, and the reply that is right.

    `about` is the Latin name of the person asked about, `relation` the fact or sentence asked for.
    """

    messages: list[Message]
    answer: str
    task: str
    about: str
    relation: str


class Asker:
    """Makes turns, chats and questions about some of the people that a `Teller` knows.

    Args:
        people: who may be named. Those who are not in `known` act in invented scenes only.
        known: whose facts may be asked for, or stand in a text to read; all of `people` by default.
    """

    def __init__(self, teller: Teller, people: Sequence[Person], known: Sequence[Person] | None = None) -> None:
        self.teller = teller
        self.people = people
        self.known = people if known is None else known
        self._known_names = {person.name for person in self.known}
        self.sentences = teller.language.sentences

    def turn(self, rng: Random, task: str, who: Person) -> Turn:
        make: dict[str, Callable[[Random, Person], Turn]] = {
            "fact": self._fact,
            "word": self._word,
            "read": self._read,
            "read_word": self._read_word,
            "repeat": self._repeat,
            "list": self._list,
            "tell": self._tell,
            "finish": self._finish,
        }
        return make[task](rng, who)

    def chat(self, rng: Random, tasks: Mapping[str, float]) -> list[Turn]:
        """One to three turns; a turn after a fact may ask for another fact by pronoun."""
        turns: list[Turn] = []
        who = self.known[0]
        for _ in range(rng.choices((1, 2, 3), (0.6, 0.25, 0.15))[0]):
            earlier = [turn.relation for turn in turns if turn.task == "fact"]
            # after a question about a sibling, "she" would be either of the two
            clear = len(earlier) == len(turns) > 0 and earlier[-1] != "sibling"
            if clear and rng.random() < 0.5:
                rest = [relation for relation in who.facts if relation not in earlier]
                turns.append(self.follow(rng, who, rng.choice(rest)))
            else:
                task = rng.choices(list(tasks), list(tasks.values()))[0]
                who = rng.choice(self.known if task in RECALL else self.people)
                turns.append(self.turn(rng, task, who))
        return turns

    def question(self, rng: Random, task: str, who: Person) -> Question:
        """One exactly answerable question; one fact in five is asked by pronoun, after another one."""
        before: list[Turn] = []
        if task == "fact" and rng.random() < 0.2:
            first = rng.choice([relation for relation in who.facts if relation != "sibling"])
            second = rng.choice([relation for relation in who.facts if relation != first])
            before = [self._fact_of(rng, who, first)]
            last = self.follow(rng, who, second)
        else:
            last = self.turn(rng, task, who)
        messages = [*messages_of(before), {"role": "user", "content": last.ask}]
        return Question(messages, last.answer, task, last.about, last.relation)

    def lesson(self, rng: Random, kind: str, who: Person) -> str:
        """A document in which children at school are asked questions of one kind, and answer."""
        teller = self.teller
        other, third = teller.others(rng, who, self.people)
        children = {"other": teller.name[other.name], "third": teller.name[third.name]}
        sentences = [teller.phrase(rng, f"{kind}.open", teller.facts[who.name])]
        if kind == "reading":
            text, slots, full, words = self._passage(rng, who)
            sentences.append(text)
            pairs = [(teller.phrase(rng, f"ask.{key}", slots), teller.state(key, slots)) for key in full]
            pairs += [(self._in_one_word(rng, key, slots), self._answer(key, slots)) for key in words]
            pairs = rng.sample(pairs, min(len(pairs), 3))
        else:
            turns = [self.turn(rng, rng.choice(LESSONS[kind]), who)]
            while len(turns) < 3:
                turn = self.turn(rng, rng.choice(LESSONS[kind]), who)
                if turn.ask not in [earlier.ask for earlier in turns]:
                    turns.append(turn)
            pairs = [(turn.ask, turn.answer) for turn in turns]
        for ask, answer in pairs:
            stop = self.teller.language.stop
            bare = answer.removesuffix(stop)
            lines = {"ask": ask, "bare_ask": ask.removesuffix(stop), "say": bare + stop, "bare": bare}
            sentences.append(teller.phrase(rng, "quiz" if ask[-1] in "?？" else "drill", children | lines))
        return teller.join([*sentences, teller.phrase(rng, "quiz.close", children)])

    def follow(self, rng: Random, who: Person, relation: str) -> Turn:
        facts = self.teller.facts[who.name]
        ask = self.teller.phrase(rng, f"follow.{relation}", facts)
        return Turn(ask, self.teller.state(relation, facts), "fact", who.name, relation)

    def _fact(self, rng: Random, who: Person) -> Turn:
        return self._fact_of(rng, who, rng.choice(list(who.facts)))

    def _fact_of(self, rng: Random, who: Person, relation: str) -> Turn:
        facts = self.teller.facts[who.name]
        ask = self.teller.phrase(rng, f"ask.{relation}", facts)
        return Turn(ask, self.teller.state(relation, facts), "fact", who.name, relation)

    def _word(self, rng: Random, who: Person) -> Turn:
        relation = rng.choice(list(who.facts))
        facts = self.teller.facts[who.name]
        ask = self._in_one_word(rng, relation, facts)
        return Turn(ask, self._answer(relation, facts), "word", who.name, relation)

    def _in_one_word(self, rng: Random, relation: str, slots: Slots) -> str:
        return self.teller.phrase(rng, "one_word", {"ask": self.teller.phrase(rng, f"word.{relation}", slots)})

    def _answer(self, relation: str, slots: Slots) -> str:
        return self.sentences[f"answer.{relation}"][0].format_map(slots)

    def _read(self, rng: Random, who: Person) -> Turn:
        text, slots, full, _ = self._passage(rng, who)
        relation = rng.choice(full)
        ask = self.teller.phrase(rng, f"ask.{relation}", slots)
        answer = self.teller.state(relation, slots)
        return Turn(self._with_text(rng, text, ask), answer, "read", who.name, relation)

    def _read_word(self, rng: Random, who: Person) -> Turn:
        text, slots, _, words = self._passage(rng, who)
        relation = rng.choice(words)
        ask = self._in_one_word(rng, relation, slots)
        return Turn(self._with_text(rng, text, ask), self._answer(relation, slots), "read_word", who.name, relation)

    def _with_text(self, rng: Random, text: str, ask: str) -> str:
        return rng.choice(self.sentences["read"]).format(text=text, ask=ask)

    def _passage(self, rng: Random, who: Person) -> tuple[str, Slots, list[str], list[str]]:
        """A text, its slots, and which sentences a full and a one-word answer can be taken from.

        The sentence with the answer always has its first wording; half of the texts also say the same kind of thing
        of somebody else.
        """
        teller = self.teller
        kind = rng.choice(["facts", *PASSAGES] if who.name in self._known_names else list(PASSAGES))
        first, second = teller.others(rng, who, self.known if kind == "facts" else self.people)
        if kind == "facts":
            slots = teller.facts[who.name]
            relations = rng.sample(list(who.facts), rng.randint(1, 3))
            sentences = [teller.state(relation, slots) for relation in relations]
            if rng.random() < 0.5:
                same = [relation for relation in relations if relation in first.facts]
                extra = [teller.state(relation, teller.facts[first.name]) for relation in same]
                sentences = sentences + extra if rng.random() < 0.5 else extra + sentences
            return teller.join(sentences), slots, relations, relations
        slots = teller.scene(rng, who, first, second)
        if kind == "market":
            slots["spot"] = teller.language.tables["spot"]["market"]
        keys = rng.choice(PASSAGES[kind])
        full = [key for key in keys if f"ask.{key}" in self.sentences]
        sentences = [teller.state(key, slots) if key in full else teller.phrase(rng, key, slots) for key in keys]
        if rng.random() < 0.4:
            sentences.insert(0, teller.phrase(rng, "filler", slots))
        if rng.random() < 0.5:
            sentences.insert(rng.choice((0, len(sentences))), self._distractor(rng, second, first, slots, full[-1]))
        return teller.join(sentences), slots, full, [key for key in keys if f"word.{key}" in self.sentences]

    def _distractor(self, rng: Random, who: Person, other: Person, slots: Slots, relation: str) -> str:
        """The same kind of sentence about somebody else, with nothing in common."""
        mine, scene = slots["item"], slots
        while any(scene[key] == slots[key] for key in ("spot", "count")) or noun_of(scene["item"]) == noun_of(mine):
            scene = self.teller.scene(rng, who, other, other)
        relation = {"find": "lose", "meet": "go", "give": "buy"}.get(relation, relation)
        return self.teller.state(relation, scene)

    def _repeat(self, rng: Random, who: Person) -> Turn:
        teller = self.teller
        slots = teller.scene(rng, who, *teller.others(rng, who, self.people))
        facts = list(who.facts) if who.name in self._known_names else []
        relation = rng.choice([*facts, "go", "buy", "lose", "find", "give", "meet", *["words"] * 7])
        if relation == "words":
            text = self._words(rng)
        elif relation in who.facts:
            text = teller.phrase(rng, relation, teller.facts[who.name])
        else:
            text = teller.state(relation, slots)
        return Turn(teller.phrase(rng, "repeat", {"text": text}), text, "repeat", who.name, relation)

    def _words(self, rng: Random) -> str:
        """A few words and names in an order that only copying can give."""
        language = self.teller.language
        tables = [language.tables[kind] for kind in ("place", "food", "pet", "thing", "job", "color")]
        words: list[str] = [rng.choice(list(rng.choice(tables).values())) for _ in range(rng.randint(2, 4))]
        words += [self.teller.name[person.name] for person in rng.sample(self.people, rng.randint(0, 2))]
        return language.comma.join(rng.sample(words, len(words))) + language.stop

    def _list(self, rng: Random, who: Person) -> Turn:
        tables = self.teller.language.tables
        kind = rng.choice(["pet", "food", "place", "job"])
        right = rng.sample([word for key, word in tables[kind].items() if key != "fish"], rng.randint(2, 3))
        wrong = rng.sample(list(tables["thing"].values()), rng.randint(1, 3))
        order = rng.sample(right + wrong, len(right + wrong))
        comma = self.teller.language.comma
        ask = self.teller.phrase(rng, f"list.{kind}", {"text": comma.join(order)})
        return Turn(ask, comma.join(word for word in order if word in right), "list", who.name, kind)

    def _tell(self, rng: Random, who: Person) -> Turn:
        facts = self.teller.facts[who.name]
        relations = [relation for relation in RELATIONS if relation in who.facts]
        answer = self.teller.join([self.teller.state(relation, facts) for relation in relations])
        return Turn(self.teller.phrase(rng, "tell", facts), answer, "tell", who.name, ",".join(relations))

    def _finish(self, rng: Random, who: Person) -> Turn:
        teller = self.teller
        slots = teller.scene(rng, who, *teller.others(rng, who, self.people))
        kind = rng.choice(list(PASSAGES))
        keys = [key for key in STORIES[kind] if key not in ("give", "gift.4", "walk.4") and not key.startswith("end.")]
        text = teller.join([teller.phrase(rng, key, slots) for key in keys])
        ask = teller.phrase(rng, "finish", {"text": text})
        return Turn(ask, teller.state(f"end.{kind}", slots), "finish", who.name, f"end.{kind}")


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """The turns as a list of chat messages."""
    return [
        message
        for turn in turns
        for message in ({"role": "user", "content": turn.ask}, {"role": "assistant", "content": turn.answer})
    ]


def noun_of(item: str) -> str:
    """The uncolored noun of a colored thing."""
    return str(vars(item)["noun"])
