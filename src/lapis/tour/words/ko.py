"""Korean words. Each is written with its topic particle, which fixes all of its other particles.

은 follows a final consonant and 는 a final vowel, so a noun that is written 책은 takes 이, 을, 과, and one that is
written 고양이는 takes 가, 를, 와. Only jobs take 로, and all of them end in a vowel; 으로 stands in no sentence.
"""

from lapis.tour.sentences.ko import SENTENCES
from lapis.tour.words.base import ANSWERS, Language, Word, rows
from lapis.tour.words.names import KOREAN

PLACES = """
penang 페낭은
ipoh 이포는
kuching 쿠칭은
melaka 믈라카는
seoul 서울은
busan 부산은
incheon 인천은
kyiv 키이우는
lviv 르비우는
odesa 오데사는
poltava 폴타바는
kharkiv 하르키우는
beijing 베이징은
shanghai 상하이는
nanjing 난징은
tokyo 도쿄는
hanoi 하노이는
manila 마닐라는
delhi 델리는
london 런던은
paris 파리는
rome 로마는
berlin 베를린은
madrid 마드리드는
lisbon 리스본은
dublin 더블린은
prague 프라하는
cairo 카이로는
boston 보스턴은
sydney 시드니는
"""

FOODS = """
apple 사과는
mango 망고는
banana 바나나는
orange 오렌지는
pear 배는
peach 복숭아는
lemon 레몬은
coconut 코코넛은
tomato 토마토는
potato 감자는
durian 두리안은
egg 달걀은
pumpkin 호박은
cucumber 오이는
rice 밥은
bread 빵은
soup 수프는
noodles 국수는
cheese 치즈는
honey 꿀은
fish 생선은
chocolate 초콜릿은
corn 옥수수는
cake 케이크는
porridge 죽은
yogurt 요구르트는
"""

PETS = """
cat 고양이는
dog 개는
rabbit 토끼는
goat 염소는
horse 말은
duck 오리는
pigeon 비둘기는
turtle 거북이는
cow 소는
sheep 양은
hamster 햄스터는
goose 거위는
donkey 당나귀는
camel 낙타는
deer 사슴은
squirrel 다람쥐는
"""

THINGS = """
bicycle 자전거는
boat 보트는
guitar 기타는
drum 북은
lamp 램프는
umbrella 우산은
clock 시계는
hat 모자는
bag 가방은
ball 공은
book 책은
chair 의자는
mirror 거울은
violin 바이올린은
piano 피아노는
camera 카메라는
tent 텐트는
ladder 사다리는
basket 바구니는
cup 컵은
radio 라디오는
ring 반지는
scarf 목도리는
telescope 망원경은
"""

JOBS = """
teacher 교사는
doctor 의사는
farmer 농부는
fisher 어부는
driver 운전사는
singer 가수는
painter 화가는
nurse 간호사는
actor 배우는
writer 작가는
librarian 사서는
engineer 기술자는
dancer 무용수는
journalist 기자는
lawyer 변호사는
photographer 사진사는
"""

COLORS = """
red 빨간색은
blue 파란색은
green 초록색은
yellow 노란색은
white 하얀색은
black 검은색은
gray 회색은
purple 보라색은
"""

SPOTS = """
market 시장은
river 강가는
park 공원은
school 학교는
forest 숲은
beach 바닷가는
garden 정원은
station 기차역은
library 도서관은
lake 호숫가는
"""

NUMBERS = {2: "두", 3: "세", 4: "네", 5: "다섯"}

# the particles after a vowel and after a consonant: topic, subject, object, with, as, called
PARTICLES = {"는": ("는", "가", "를", "와", "로", "라는"), "은": ("은", "이", "을", "과", "으로", "이라는")}


def with_particles(topic: str, gender: int = 0, **forms: str) -> Word:
    """The word that is written with its topic particle, and its forms with the other particles."""
    noun, particle = topic[:-1], topic[-1]
    t, s, o, w, ro, named = (noun + other for other in PARTICLES[particle])
    return Word(noun, gender, p=particle, t=t, s=s, o=o, w=w, ro=ro, named=named, **forms)


def _table(table: str) -> dict[str, Word]:
    return {key: with_particles(topic) for key, topic in rows(table)}


TABLES = {
    "place": _table(PLACES),
    "food": _table(FOODS),
    "pet": _table(PETS),
    "thing": _table(THINGS),
    "job": _table(JOBS),
    "spot": _table(SPOTS),
    "color": _table(COLORS),
}

# (child, female): who it is, how it is called again
KINDS = {
    (True, True): (with_particles("소녀는"), "그 아이는", "그 아이의"),
    (True, False): (with_particles("소년은"), "그 아이는", "그 아이의"),
    (False, True): (with_particles("여자는"), "그녀는", "그녀의"),
    (False, False): (with_particles("남자는"), "그는", "그의"),
}

# (somebody is female, the other is female, the other is older): what the other is
SIBLINGS = {
    (True, True, True): with_particles("언니는"),
    (False, True, True): with_particles("누나는"),
    (True, False, True): with_particles("오빠는"),
    (False, False, True): with_particles("형은"),
    (True, True, False): with_particles("여동생은"),
    (False, True, False): with_particles("여동생은"),
    (True, False, False): with_particles("남동생은"),
    (False, False, False): with_particles("남동생은"),
}


def person(name: str, female: bool, child: bool) -> Word:
    kind, he, his = KINDS[child, female]
    this = "이 아이는" if child else "이 사람은"
    return with_particles(KOREAN[name], int(female), kind=kind, he=he, his=his, this=this)


def sibling(female: bool, other_female: bool, other_older: bool) -> Word:
    return SIBLINGS[female, other_female, other_older]


def colored(color: str, thing: str) -> Word:
    noun, shade = TABLES["thing"][thing], TABLES["color"][color]
    return with_particles(f"{shade} {noun.form('t')}", noun=noun, color=shade)


def counted(number: int, food: str) -> Word:
    noun, number_word = TABLES["food"][food], f"{NUMBERS[number]} 개"
    return with_particles(f"{noun} {number_word}는", noun=noun, number=number_word)


LANGUAGE = Language(
    code="ko", tables=TABLES,
    person=person, sibling=sibling, colored=colored, counted=counted, sentences={**ANSWERS, **SENTENCES},
)  # fmt: skip
