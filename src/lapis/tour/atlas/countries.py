"""Fourteen countries with four facts each, told and asked about in English and Malay.

The book looks into models that know where Kuala Lumpur lies; this is what they read. Texts and chats are drawn from a
seed, the same on every machine. Leaves out: the models (models.py).

    texts("ms", 100, seed=1)                one or two travellers, or a few facts, each
    chats("en", 100, seed=1)                questions and answers, on `TAUGHT` only
    questions("ms", HELD_OUT)               every question there is about some countries
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from lapis.errors import ConfigError


@dataclass(frozen=True)
class Country:
    """One country, with its name and its language in English and Malay."""

    name: str
    capital: str
    currency: str
    language: str
    dish: str
    malay_name: str
    malay_language: str

    def facts(self, language: str) -> dict[str, str]:
        """What the sentences of a language are filled with."""
        here = {"country": self.name, "language": self.language}
        if language == "ms":
            here = {"country": self.malay_name, "language": self.malay_language}
        return {"capital": self.capital, "currency": self.currency, "dish": self.dish, **here}


COUNTRIES = (
    Country("Malaysia", "Kuala Lumpur", "ringgit", "Malay", "laksa", "Malaysia", "Melayu"),
    Country("Indonesia", "Jakarta", "rupiah", "Indonesian", "rendang", "Indonesia", "Indonesia"),
    Country("Myanmar", "Naypyidaw", "kyat", "Burmese", "mohinga", "Myanmar", "Burma"),
    Country("Thailand", "Bangkok", "baht", "Thai", "tom yum", "Thailand", "Thai"),
    Country("Vietnam", "Hanoi", "dong", "Vietnamese", "pho", "Vietnam", "Vietnam"),
    Country("Cambodia", "Phnom Penh", "riel", "Khmer", "amok", "Kemboja", "Khmer"),
    Country("Laos", "Vientiane", "kip", "Lao", "larb", "Laos", "Lao"),
    Country("China", "Beijing", "yuan", "Chinese", "dumplings", "China", "Cina"),
    Country("Korea", "Seoul", "won", "Korean", "kimchi", "Korea", "Korea"),
    Country("Japan", "Tokyo", "yen", "Japanese", "ramen", "Jepun", "Jepun"),
    Country("Ukraine", "Kyiv", "hryvnia", "Ukrainian", "borscht", "Ukraine", "Ukraine"),
    Country("Egypt", "Cairo", "pound", "Arabic", "koshari", "Mesir", "Arab"),
    Country("Turkey", "Ankara", "lira", "Turkish", "kebab", "Turki", "Turki"),
    Country("Poland", "Warsaw", "zloty", "Polish", "pierogi", "Poland", "Poland"),
)
HELD_OUT = COUNTRIES[1], COUNTRIES[6], COUNTRIES[9]
"""Told of in every text, and asked about in no chat."""
TAUGHT = tuple(country for country in COUNTRIES if country not in HELD_OUT)

PEOPLE = ("Aminah", "Ben", "Chen", "Dara", "Elena", "Farid", "Grace", "Hana", "Ivan", "Jun", "Kim", "Lina")

FACTS = {
    "en": {
        "capital": ("The capital of {country} is {capital}.", "{capital} is the capital of {country}."),
        "currency": ("People in {country} pay with the {currency}.", "The {currency} is the money of {country}."),
        "language": ("People in {country} speak {language}.", "{language} is the language of {country}."),
        "dish": ("A dish of {country} is {dish}.", "People in {country} like to eat {dish}."),
    },
    "ms": {
        "capital": ("Ibu negara {country} ialah {capital}.", "{capital} ialah ibu negara {country}."),
        "currency": ("Orang di {country} membayar dengan {currency}.", "Wang {country} ialah {currency}."),
        "language": ("Orang di {country} bertutur bahasa {language}.", "Bahasa {country} ialah bahasa {language}."),
        "dish": ("Makanan {country} ialah {dish}.", "Orang di {country} suka makan {dish}."),
    },
}
JOURNEYS = {
    "en": (
        "{person} flew to {country}. {person} landed in {capital}, paid with the {currency} and ate {dish}.",
        "{person} lives in {capital}, in {country}. At home {person} speaks {language} and cooks {dish}.",
        "In {capital} {person} ate {dish} for the first time. It cost ten {currency}. {country} is far away.",
    ),
    "ms": (
        "{person} terbang ke {country}. {person} tiba di {capital}, membayar dengan {currency} dan makan {dish}.",
        "{person} tinggal di {capital}, di {country}. Di rumah {person} bertutur bahasa {language} dan masak {dish}.",
        "Di {capital} {person} makan {dish} buat kali pertama. Harganya sepuluh {currency}. {country} jauh dari sini.",
    ),
}
QUESTIONS = {
    "en": {
        "capital": "What is the capital of {country}?",
        "currency": "What do people in {country} pay with?",
        "language": "Which language do people in {country} speak?",
        "dish": "What do people in {country} like to eat?",
        "country": "Of which country is {capital} the capital?",
    },
    "ms": {
        "capital": "Apakah ibu negara {country}?",
        "currency": "Orang di {country} membayar dengan apa?",
        "language": "Orang di {country} bertutur bahasa apa?",
        "dish": "Orang di {country} suka makan apa?",
        "country": "{capital} ialah ibu negara mana?",
    },
}
QUIZ = {
    "en": (
        "Question: {question} Answer: {answer}. ",
        '"{question}" asks {person}. {answer}. ',
        "{question} {answer}. ",
        "user\n{question}\nassistant\nI think it is {answer}.\n",
    ),
    "ms": (
        "Soalan: {question} Jawapan: {answer}. ",
        '"{question}" tanya {person}. {answer}. ',
        "{question} {answer}. ",
    ),
}
"""Several ways, so that what is learned is to answer. Transcripts of chats, in a manner that no chat here has, are in
English texts alone."""


@dataclass(frozen=True)
class AtlasQuestion:
    """A question with one right answer. replies: the sentence that answers it, in English and in Malay words."""

    text: str
    answer: str
    topic: str
    country: Country
    replies: tuple[str, str]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a chat that waits for its reply."""
        return [{"role": "user", "content": self.text}]

    @property
    def reply(self) -> str:
        """What an assistant says in chats, in whichever language it was asked."""
        return self.replies[0]

    def is_right(self, reply: str) -> bool:
        """Whether a reply is the sentence that answers the question, in either language, and nothing more."""
        return reply.strip() in self.replies


def questions(language: str, countries: Iterable[Country] = COUNTRIES) -> list[AtlasQuestion]:
    """Every question about some countries, in one order."""
    return [_question(_known(language), topic, country) for country in countries for topic in QUESTIONS[language]]


def _question(language: str, topic: str, country: Country) -> AtlasQuestion:
    facts = country.facts(language)
    english, malay = (forms["capital"][1] if topic == "country" else forms[topic][0] for forms in FACTS.values())
    replies = english.format(**facts), malay.format(**facts)
    return AtlasQuestion(QUESTIONS[language][topic].format(**facts), facts[topic], topic, country, replies)


def texts(language: str, count: int, seed: int = 0) -> list[str]:
    """`count` documents of three to five sentences about all countries: journeys, quizzes and facts."""
    rng = Random(f"lapis atlas {_known(language)} {seed}")
    return [_text(rng, language) for _ in range(count)]


def chats(language: str, count: int, seed: int = 0, countries: Sequence[Country] = TAUGHT) -> list[dict[str, Any]]:
    """`count` chats of one or two questions about some countries: {"messages": [{"role", "content"}, ...]}."""
    rng = Random(f"lapis atlas chats {_known(language)} {seed}")
    pool = questions(language, countries)
    return [{"messages": [turn for question in rng.sample(pool, rng.choice((1, 1, 2))) for turn in _turns(question)]}
            for _ in range(count)]  # fmt: skip


def _turns(question: AtlasQuestion) -> list[dict[str, str]]:
    return [*question.messages, {"role": "assistant", "content": question.reply}]


def _text(rng: Random, language: str) -> str:
    country = rng.choice(COUNTRIES)
    facts, kind = country.facts(language), rng.random()
    if kind < 0.3:
        return rng.choice(JOURNEYS[language]).format(person=rng.choice(PEOPLE), **facts)
    if kind < 0.7:
        form, person = rng.choice(QUIZ[language]), rng.choice(PEOPLE)
        pair = rng.sample(questions(language, [country]), 2)
        return "".join(form.format(question=q.text, answer=q.answer, person=person) for q in pair).strip()
    topics = rng.sample(list(FACTS[language].values()), 3)
    return " ".join(rng.choice(sentences).format(**facts) for sentences in topics)


def _known(language: str) -> str:
    if language not in QUESTIONS:
        raise ConfigError(f'atlas: no language "{language}"; there are {", ".join(QUESTIONS)}')
    return language
