"""English words. Articles and plurals are written out."""

from lapis.tour.sentences.en import SENTENCES
from lapis.tour.words.base import ANSWERS, Language, Word, rows

PLACES = (
    "Penang Ipoh Kuching Melaka Seoul Busan Incheon Kyiv Lviv Odesa Poltava Kharkiv Beijing Shanghai Nanjing "
    "Tokyo Hanoi Manila Delhi London Paris Rome Berlin Madrid Lisbon Dublin Prague Cairo Boston Sydney"
).split()

# key, with its article, plural
COUNTED_FOODS = """
apple|an apple|apples
mango|a mango|mangoes
banana|a banana|bananas
orange|an orange|oranges
pear|a pear|pears
peach|a peach|peaches
lemon|a lemon|lemons
coconut|a coconut|coconuts
tomato|a tomato|tomatoes
potato|a potato|potatoes
durian|a durian|durians
egg|an egg|eggs
pumpkin|a pumpkin|pumpkins
cucumber|a cucumber|cucumbers
"""

OTHER_FOODS = "rice bread soup noodles cheese honey fish chocolate corn cake porridge yogurt".split()

PETS = (
    "a cat|a dog|a rabbit|a goat|a horse|a duck|a pigeon|a turtle|a cow|a sheep|a hamster|a goose|a donkey|a camel|"
    "a deer|a squirrel"
).split("|")

THINGS = (
    "a bicycle|a boat|a guitar|a drum|a lamp|an umbrella|a clock|a hat|a bag|a ball|a book|a chair|a mirror|a violin|"
    "a piano|a camera|a tent|a ladder|a basket|a cup|a radio|a ring|a scarf|a telescope"
).split("|")

JOBS = (
    "a teacher|a doctor|a farmer|a fisher|a driver|a singer|a painter|a nurse|an actor|a writer|a librarian|"
    "an engineer|a dancer|a journalist|a lawyer|a photographer"
).split("|")

COLORS = {color: Word(color) for color in "red blue green yellow white black gray purple".split()}

SPOTS = """
market|the market|at the market
river|the river|by the river
park|the park|in the park
school|school|at school
forest|the forest|in the forest
beach|the beach|on the beach
garden|the garden|in the garden
station|the station|at the station
library|the library|in the library
lake|the lake|by the lake
"""

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def _with_articles(entries: list[str]) -> dict[str, Word]:
    return {entry.split()[1]: Word(entry.split()[1], a=entry) for entry in entries}


FOODS = {
    **{key: Word(plural, one=one) for key, one, plural in rows(COUNTED_FOODS, "|")},
    **{food: Word(food) for food in OTHER_FOODS},
}


def person(name: str, female: bool, child: bool) -> Word:
    kind = (("man", "woman"), ("boy", "girl"))[child][female]
    he, him, his = (("he", "him", "his"), ("she", "her", "her"))[female]
    return Word(name, int(female), s=f"{name}'s", kind=kind, a_kind=f"a {kind}", he=he, him=him, his=his)


def sibling(female: bool, other_female: bool, other_older: bool) -> Word:
    noun = ("brother", "sister")[other_female]
    if other_older:
        return Word(f"older {noun}", a=f"an older {noun}")
    return Word(f"younger {noun}", a=f"a younger {noun}")


def colored(color: str, thing: str) -> Word:
    return Word(f"{color} {thing}", a=f"a {color} {thing}", noun=thing, color=color)


def counted(number: int, food: str) -> Word:
    return Word(f"{NUMBERS[number]} {FOODS[food]}", number=NUMBERS[number], noun=FOODS[food])


LANGUAGE = Language(
    code="en",
    tables={
        "place": {name.lower(): Word(name) for name in PLACES},
        "food": FOODS,
        "pet": _with_articles(PETS),
        "thing": _with_articles(THINGS),
        "job": _with_articles(JOBS),
        "spot": {key: Word(spot, at=at) for key, spot, at in rows(SPOTS, "|")},
        "color": COLORS,
    },
    person=person, sibling=sibling, colored=colored, counted=counted, sentences={**ANSWERS, **SENTENCES},
    plural_foods=True,
)  # fmt: skip
