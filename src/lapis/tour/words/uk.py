"""Ukrainian words. Every case that a sentence needs is written out, for every word; genders are 0 he, 1 she, 2 it.

The prepositions у and в take turns by the sounds around them, so they are written with the words too.
"""

from lapis.tour.sentences.uk import SENTENCES
from lapis.tour.words.base import ANSWERS, Language, Word, rows
from lapis.tour.words.names_uk import UKRAINIAN

# nominative; where, after a vowel; where, at the start or after a consonant
PLACES = """
penang|Пенанг|в Пенангу|у Пенангу
ipoh|Іпох|в Іпоху|в Іпоху
kuching|Кучинг|в Кучингу|у Кучингу
melaka|Малакка|в Малацці|у Малацці
seoul|Сеул|в Сеулі|у Сеулі
busan|Пусан|в Пусані|у Пусані
incheon|Інчхон|в Інчхоні|в Інчхоні
kyiv|Київ|в Києві|у Києві
lviv|Львів|у Львові|у Львові
odesa|Одеса|в Одесі|в Одесі
poltava|Полтава|в Полтаві|у Полтаві
kharkiv|Харків|в Харкові|у Харкові
beijing|Пекін|в Пекіні|у Пекіні
shanghai|Шанхай|в Шанхаї|у Шанхаї
nanjing|Нанкін|в Нанкіні|у Нанкіні
tokyo|Токіо|в Токіо|у Токіо
hanoi|Ханой|в Ханої|у Ханої
manila|Маніла|в Манілі|у Манілі
delhi|Делі|в Делі|у Делі
london|Лондон|в Лондоні|у Лондоні
paris|Париж|в Парижі|у Парижі
rome|Рим|в Римі|у Римі
berlin|Берлін|в Берліні|у Берліні
madrid|Мадрид|в Мадриді|у Мадриді
lisbon|Лісабон|в Лісабоні|у Лісабоні
dublin|Дублін|в Дубліні|у Дубліні
prague|Прага|в Празі|у Празі
cairo|Каїр|в Каїрі|у Каїрі
boston|Бостон|в Бостоні|у Бостоні
sydney|Сідней|в Сіднеї|у Сіднеї
"""

# what somebody likes: nominative, accusative; two to four, five (of those that are bought by number); two
FOODS = """
apple|яблука|яблука|яблука|яблук|два
mango|манго|манго|манго|манго|два
banana|банани|банани|банани|бананів|два
orange|апельсини|апельсини|апельсини|апельсинів|два
pear|груші|груші|груші|груш|дві
peach|персики|персики|персики|персиків|два
lemon|лимони|лимони|лимони|лимонів|два
coconut|кокоси|кокоси|кокоси|кокосів|два
tomato|помідори|помідори|помідори|помідорів|два
potato|картопля|картоплю|картоплини|картоплин|дві
durian|дуріани|дуріани|дуріани|дуріанів|два
egg|яйця|яйця|яйця|яєць|два
pumpkin|гарбузи|гарбузи|гарбузи|гарбузів|два
cucumber|огірки|огірки|огірки|огірків|два
rice|рис|рис
bread|хліб|хліб
soup|суп|суп
noodles|локшина|локшину
cheese|сир|сир
honey|мед|мед
fish|риба|рибу
chocolate|шоколад|шоколад
corn|кукурудза|кукурудзу
cake|торт|торт
porridge|каша|кашу
yogurt|йогурт|йогурт
"""

# gender; nominative, accusative, instrumental
PETS = """
cat 0 кіт кота котом
dog 0 собака собаку собакою
rabbit 0 кролик кролика кроликом
goat 1 коза козу козою
horse 0 кінь коня конем
duck 1 качка качку качкою
pigeon 0 голуб голуба голубом
turtle 1 черепаха черепаху черепахою
cow 1 корова корову коровою
sheep 1 вівця вівцю вівцею
hamster 0 хом’як хом’яка хом’яком
goose 1 гуска гуску гускою
donkey 0 осел осла ослом
camel 0 верблюд верблюда верблюдом
deer 0 олень оленя оленем
squirrel 1 білка білку білкою
"""

THINGS = """
bicycle 0 велосипед велосипед велосипедом
boat 0 човен човен човном
guitar 1 гітара гітару гітарою
drum 0 барабан барабан барабаном
lamp 1 лампа лампу лампою
umbrella 1 парасолька парасольку парасолькою
clock 0 годинник годинник годинником
hat 0 капелюх капелюх капелюхом
bag 1 сумка сумку сумкою
ball 0 м’яч м’яч м’ячем
book 1 книжка книжку книжкою
chair 0 стілець стілець стільцем
mirror 2 дзеркало дзеркало дзеркалом
violin 1 скрипка скрипку скрипкою
piano 2 піаніно піаніно піаніно
camera 1 камера камеру камерою
tent 0 намет намет наметом
ladder 1 драбина драбину драбиною
basket 0 кошик кошик кошиком
cup 1 чашка чашку чашкою
radio 2 радіо радіо радіо
ring 0 перстень перстень перснем
scarf 0 шарф шарф шарфом
telescope 0 телескоп телескоп телескопом
"""

# nominative and instrumental of a man's, of a woman's
JOBS = """
teacher вчитель вчителем вчителька вчителькою
doctor лікар лікарем лікарка лікаркою
farmer фермер фермером фермерка фермеркою
fisher рибалка рибалкою рибалка рибалкою
driver водій водієм водійка водійкою
singer співак співаком співачка співачкою
painter художник художником художниця художницею
nurse медбрат медбратом медсестра медсестрою
actor актор актором акторка акторкою
writer письменник письменником письменниця письменницею
librarian бібліотекар бібліотекарем бібліотекарка бібліотекаркою
engineer інженер інженером інженерка інженеркою
dancer танцюрист танцюристом танцюристка танцюристкою
journalist журналіст журналістом журналістка журналісткою
lawyer юрист юристом юристка юристкою
photographer фотограф фотографом фотографка фотографкою
"""

# of a he (nominative and accusative of a thing), of a she: nominative, accusative
COLORS = """
red червоний червона червону
blue синій синя синю
green зелений зелена зелену
yellow жовтий жовта жовту
white білий біла білу
black чорний чорна чорну
gray сірий сіра сіру
purple фіолетовий фіолетова фіолетову
"""

# nominative, where to, where
SPOTS = """
market|ринок|на ринок|на ринку
river|річка|на річку|біля річки
park|парк|до парку|біля парку
school|школа|до школи|біля школи
forest|ліс|до лісу|біля лісу
beach|пляж|на пляж|на пляжі
garden|сад|до саду|біля саду
station|станція|на станцію|на станції
library|бібліотека|до бібліотеки|біля бібліотеки
lake|озеро|на озеро|біля озера
"""

# (the other is female, the other is older): nominative, genitive, dative, accusative, instrumental
SIBLINGS = {
    (True, True): "старша сестра|старшої сестри|старшій сестрі|старшу сестру|старшою сестрою",
    (False, True): "старший брат|старшого брата|старшому братові|старшого брата|старшим братом",
    (True, False): "молодша сестра|молодшої сестри|молодшій сестрі|молодшу сестру|молодшою сестрою",
    (False, False): "молодший брат|молодшого брата|молодшому братові|молодшого брата|молодшим братом",
}

NUMBERS = {3: "три", 4: "чотири", 5: "п’ять"}


def _gendered(table: str) -> dict[str, Word]:
    return {key: Word(nom, int(gender), acc=acc, ins=ins) for key, gender, nom, acc, ins in rows(table)}


def _job(man: str, as_man: str, woman: str, as_woman: str) -> dict[bool, Word]:
    return {False: Word(man, 0, ins=as_man), True: Word(woman, 1, ins=as_woman)}


JOBS_BY_GENDER = {key: _job(*cells) for key, *cells in rows(JOBS)}
TABLES = {
    "place": {key: Word(nom, loc=loc, in_=start) for key, nom, loc, start in rows(PLACES, "|")},
    "food": {key: Word(nom, acc=acc) for key, nom, acc, *_ in rows(FOODS, "|")},
    "pet": _gendered(PETS),
    "thing": _gendered(THINGS),
    "job": {key: job[False] for key, job in JOBS_BY_GENDER.items()},
    "spot": {key: Word(nom, to=to, at=at) for key, nom, to, at in rows(SPOTS, "|")},
    "color": {key: Word(he) for key, he, _, _ in rows(COLORS)},
}
SHADES = {key: cells for key, *cells in rows(COLORS)}
COUNTS = {key: cells for key, _, _, *cells in rows(FOODS, "|") if cells}

# (child, female): nominative, accusative
KINDS = {
    (True, True): Word("дівчинка", 1, acc="дівчинку"),
    (True, False): Word("хлопчик", 0, acc="хлопчика"),
    (False, True): Word("жінка", 1, acc="жінку"),
    (False, False): Word("чоловік", 0, acc="чоловіка"),
}
PRONOUNS = {
    False: {"he": "він", "his": "його", "he_at": "у нього", "at_he": "в нього"},
    True: {"he": "вона", "his": "її", "he_at": "у неї", "at_he": "в неї"},
}


def person(name: str, female: bool, child: bool) -> Word:
    nom, gen, dat, acc, ins, voc, start, after = UKRAINIAN[name]
    return Word(
        nom, int(female), gen=gen, dat=dat, acc=acc, ins=ins, voc=voc, at_start=f"{start} {gen}", at=f"{after} {gen}",
        kind=KINDS[child, female], **PRONOUNS[female],
    )  # fmt: skip


def sibling(female: bool, other_female: bool, other_older: bool) -> Word:
    nom, gen, dat, acc, ins = SIBLINGS[other_female, other_older].split("|")
    return Word(nom, int(other_female), gen=gen, dat=dat, acc=acc, ins=ins)


def job(key: str, female: bool) -> Word:
    return JOBS_BY_GENDER[key][female]


def colored(color: str, thing: str) -> Word:
    noun, (he, she, her) = TABLES["thing"][thing], SHADES[color]
    if noun.gender == 2:
        raise ValueError(f"no neuter form of {color} is written down")
    nom, acc = (she, her) if noun.gender else (he, he)
    return Word(f"{nom} {noun}", noun.gender, acc=f"{acc} {noun.form('acc')}", noun=noun, color=nom)


def counted(number: int, food: str) -> Word:
    few, many, two = COUNTS[food]
    number_word = two if number == 2 else NUMBERS[number]
    return Word(f"{number_word} {few if number < 5 else many}", number=number_word, many=many)


LANGUAGE = Language(
    code="uk", tables=TABLES,
    person=person, sibling=sibling, colored=colored, counted=counted, sentences={**ANSWERS, **SENTENCES},
    job=job, plural_foods=True,
)  # fmt: skip
