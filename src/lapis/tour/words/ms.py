"""Malay words. Each noun carries its classifier, written out; a noun has no plural form."""

from lapis.tour.sentences.ms import SENTENCES
from lapis.tour.words.base import ANSWERS, Language, Word, rows

PLACES = {
    name.lower(): Word(name)
    for name in (
        "Penang Ipoh Kuching Melaka Seoul Busan Incheon Kyiv Lviv Odesa Poltava Kharkiv Beijing Shanghai Nanjing "
        "Tokyo Hanoi Manila Delhi London Paris Berlin Madrid Lisbon Dublin Prague Boston Sydney"
    ).split()
} | {"rome": Word("Rom"), "cairo": Word("Kaherah")}

# key, word, classifier
COUNTED_FOODS = """
apple epal biji
mango mangga biji
banana pisang biji
orange oren biji
pear pir biji
peach pic biji
lemon lemon biji
coconut kelapa biji
tomato tomato biji
potato kentang biji
durian durian biji
egg telur biji
pumpkin labu biji
cucumber timun biji
"""

OTHER_FOODS = """
rice nasi
bread roti
soup sup
noodles mi
cheese keju
honey madu
fish ikan
chocolate coklat
corn jagung
cake kek
porridge bubur
yogurt yogurt
"""

PETS = """
cat seekor kucing
dog seekor anjing
rabbit seekor arnab
goat seekor kambing
horse seekor kuda
duck seekor itik
pigeon seekor merpati
turtle seekor kura-kura
cow seekor lembu
sheep seekor biri-biri
hamster seekor hamster
goose seekor angsa
donkey seekor keldai
camel seekor unta
deer seekor rusa
squirrel seekor tupai
"""

THINGS = """
bicycle sebuah basikal
boat sebuah perahu
guitar sebuah gitar
drum sebuah gendang
lamp sebuah lampu
umbrella sekaki payung
clock sebuah jam
hat sebuah topi
bag sebuah beg
ball sebiji bola
book sebuah buku
chair sebuah kerusi
mirror sebuah cermin
violin sebuah biola
piano sebuah piano
camera sebuah kamera
tent sebuah khemah
ladder sebuah tangga
basket sebuah bakul
cup sebiji cawan
radio sebuah radio
ring sebentuk cincin
scarf sehelai skarf
telescope sebuah teleskop
"""

JOBS = """
teacher seorang guru
doctor seorang doktor
farmer seorang petani
fisher seorang nelayan
driver seorang pemandu
singer seorang penyanyi
painter seorang pelukis
nurse seorang jururawat
actor seorang pelakon
writer seorang penulis
librarian seorang pustakawan
engineer seorang jurutera
dancer seorang penari
journalist seorang wartawan
lawyer seorang peguam
photographer seorang jurugambar
"""

COLORS = {
    "red": Word("merah"),
    "blue": Word("biru"),
    "green": Word("hijau"),
    "yellow": Word("kuning"),
    "white": Word("putih"),
    "black": Word("hitam"),
    "gray": Word("kelabu"),
    "purple": Word("ungu"),
}

SPOTS = """
market|pasar|di pasar
river|sungai|di tepi sungai
park|taman|di taman
school|sekolah|di sekolah
forest|hutan|di dalam hutan
beach|pantai|di pantai
garden|kebun|di kebun
station|stesen|di stesen
library|perpustakaan|di perpustakaan
lake|tasik|di tepi tasik
"""

NUMBERS = {2: "dua", 3: "tiga", 4: "empat", 5: "lima"}


def _with_classifiers(table: str) -> dict[str, Word]:
    return {key: Word(noun, a=f"{one} {noun}", one=one) for key, one, noun in rows(table)}


THINGS_BY_KEY = _with_classifiers(THINGS)
FOODS = {
    **{key: Word(noun, classifier=classifier) for key, noun, classifier in rows(COUNTED_FOODS)},
    **{key: Word(noun) for key, noun in rows(OTHER_FOODS)},
}
CLASSIFIERS = {row[0]: row[2] for row in rows(COUNTED_FOODS)}


def person(name: str, female: bool, child: bool) -> Word:
    kind = (("lelaki", "wanita"), ("budak lelaki", "budak perempuan"))[child][female]
    return Word(name, int(female), kind=kind, a_kind=f"seorang {kind}")


# what the other is to somebody: the other is female, the other is older
SIBLINGS = {
    (False, True): Word("abang", his="abangnya", a="seorang abang", cap="Abang"),
    (True, True): Word("kakak", his="kakaknya", a="seorang kakak", cap="Kakak"),
    (False, False): Word("adik lelaki", his="adik lelakinya", a="seorang adik lelaki", cap="Adik lelaki"),
    (True, False): Word("adik perempuan", his="adik perempuannya", a="seorang adik perempuan", cap="Adik perempuan"),
}


def sibling(female: bool, other_female: bool, other_older: bool) -> Word:
    return SIBLINGS[other_female, other_older]


def colored(color: str, thing: str) -> Word:
    noun = THINGS_BY_KEY[thing]
    return Word(f"{noun} {COLORS[color]}", a=f"{noun.form('a')} {COLORS[color]}", noun=noun, color=COLORS[color])


def counted(number: int, food: str) -> Word:
    noun = FOODS[food]
    return Word(
        f"{NUMBERS[number]} {CLASSIFIERS[food]} {noun}", number=NUMBERS[number], noun=noun, unit=CLASSIFIERS[food]
    )


LANGUAGE = Language(
    code="ms",
    tables={
        "place": PLACES,
        "food": FOODS,
        "pet": _with_classifiers(PETS),
        "thing": THINGS_BY_KEY,
        "job": _with_classifiers(JOBS),
        "spot": {key: Word(spot, at=at) for key, spot, at in rows(SPOTS, "|")},
        "color": COLORS,
    },
    person=person, sibling=sibling, colored=colored, counted=counted, sentences={**ANSWERS, **SENTENCES},
)  # fmt: skip
