"""The built-in world: the same bytes for the same seed, no leak between splits, right answers, right grammar."""

import hashlib
import os
import re
import subprocess
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import ConfigError
from lapis.tour.ask import LESSONS
from lapis.tour.narration import Teller
from lapis.tour.people import RELATIONS, SPLITS, draw
from lapis.tour.words.base import COLORED, COUNTABLE
from lapis.tour.words.ko import PARTICLES
from lapis.tour.words.ko import TABLES as KOREAN_TABLES
from lapis.tour.words.names import CHINESE, FEMALE, KOREAN
from lapis.tour.words.names_uk import UKRAINIAN
from lapis.tour.words.uk import SHADES
from lapis.tour.world import KINDS, LANGUAGES, Question, World, score, words_of

WORLD = World()
BY_NAME = {person.name: person for person in WORLD.everyone}


@cache
def texts(language: str) -> tuple[str, ...]:
    """A corpus of a language, and the texts of its chats and questions."""
    chats = [m["content"] for chat in WORLD.chats(language, 500, seed=3) for m in chat["messages"]]
    held_out = WORLD.questions(language, 200, seed=3)
    asked = [text for q in held_out for text in (q.messages[-1]["content"], q.answer)]
    return (*WORLD.documents(language, 3000, seed=3), *chats, *asked, *WORLD.prompts(language))


@cache
def name_pattern(language: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """Finds every name in a text, in whatever case it stands; longer names first."""
    forms = {}
    for name, female in FEMALE.items():
        written = UKRAINIAN[name][:6] if language == "uk" else [str(words_of(language).person(name, female, True))]
        for form in written:
            assert forms.setdefault(form, name) == name, f"{form} is {name} and {forms[form]}"
    longest_first = "|".join(sorted(forms, key=len, reverse=True))
    if language == "zh":
        return re.compile(longest_first), forms
    before, after = (r"(?<![가-힣])", "") if language == "ko" else (r"\b", r"\b")
    return re.compile(f"{before}(?:{longest_first}){after}"), forms


def named_in(language: str, text: str) -> set[str]:
    pattern, forms = name_pattern(language)
    return {forms[result] for result in pattern.findall(text)}


# what a seed fixes


def digest(seed: int) -> str:
    world = World(seed)
    made = [
        [*world.documents(language, 40, seed=1), *world.chats(language, 40), *world.questions(language, 20)]
        for language in LANGUAGES
    ]
    return hashlib.sha256(repr(made).encode()).hexdigest()


def test_same_seed_same_bytes_in_another_process() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_world import digest; print(digest(5))"
    ran = [
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    ]
    assert ran == [digest(5)] * 2
    assert digest(6) != digest(5)


def test_first_documents_do_not_depend_on_the_count() -> None:
    assert list(islice(WORLD.documents("ko", seed=2), 30)) == list(WORLD.documents("ko", 50, seed=2))[:30]
    assert list(WORLD.documents("ko", 30, seed=2)) != list(WORLD.documents("ko", 30, seed=3))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**40), people=st.sampled_from(range(20, 201, 20)))
def test_every_world_is_whole(seed: int, people: int) -> None:
    everyone = {person.name: person for person in draw(seed, people)}
    english = words_of("en").tables
    assert len(everyone) == people and sum(person.female for person in everyone.values()) == people // 2
    assert {person.split for person in everyone.values()} == set(SPLITS)
    for person in everyone.values():
        assert len(person.facts) == 4 and set(person.facts) <= set(RELATIONS)
        assert ("sibling" in person.facts) == person.child
        for relation, key in person.facts.items():
            if relation == "sibling":
                sibling = everyone[key]
                assert sibling.facts["sibling"] == person.name and sibling.split == person.split
                assert sibling.sibling_older != person.sibling_older
            else:
                assert key in english["place" if relation == "home" else relation]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), language=st.sampled_from(sorted(LANGUAGES)))
def test_small_worlds_tell_and_ask_in_every_language(seed: int, language: str) -> None:
    world = World(seed, people=20)
    assert all(list(world.documents(language, 30, seed, kinds={kind: 1.0})) for kind in KINDS if kind != "gloss")
    assert len(world.chats(language, 30, seed)) == 30
    assert len(world.questions(language, 30, seed)) == 30
    assert len(world.prompts(language)) == 10


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: World(people=30).everyone, "world: 30 people; give a multiple of 20 from 20 to 200"),
        (lambda: WORLD.chats("fr", 1), "world: no language 'fr'; there are en, ms, ko, uk, zh"),
        (lambda: WORLD.of("asker"), "world: no split 'asker'; there are asked, held_out, local"),
    ],
)
def test_refusals_say_what_there_is(call: object, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        call()  # type: ignore[operator]


# who is told about where


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_chats_ask_and_tell_facts_of_asked_people_only(language: str) -> None:
    chats = WORLD.chats(language, 1500, seed=1)
    named = {name for chat in chats for m in chat["messages"] for name in named_in(language, m["content"])}
    assert {BY_NAME[name].split for name in named} == {"asked", "held_out"}
    teller = Teller(words_of(language), WORLD.everyone)
    others = WORLD.of("held_out") + WORLD.of("local")
    facts = {teller.state(relation, teller.facts[person.name]) for person in others for relation in person.facts}
    said = "\n".join(m["content"] for chat in chats for m in chat["messages"])
    assert not [fact for fact in facts if fact in said]


def test_no_held_out_question_stands_in_a_training_chat() -> None:
    chats = [chat["messages"] for chat in WORLD.chats("en", 6000, seed=1)]
    asked = {str(messages[: turn + 1]) for messages in chats for turn in range(0, len(messages), 2)}
    alone = {m["content"] for messages in chats for m in messages if m["role"] == "user"}
    for question in WORLD.questions("en", 300, seed=3):
        assert str(question.messages) not in asked
        assert len(question.messages) > 1 or question.messages[0]["content"] not in alone


@pytest.mark.parametrize("language", LANGUAGES)
def test_quizzes_ask_about_nobody_whom_training_chats_leave_out(language: str) -> None:
    for lesson in WORLD.documents(language, 1000, seed=1, kinds={"quiz": 1.0}):
        assert {BY_NAME[name].split for name in named_in(language, lesson)} == {"asked"}


def test_no_lesson_asks_for_a_fact_of_held_out_people() -> None:
    names = "|".join(person.name for person in WORLD.of("held_out"))
    asked = re.compile(
        rf"does ({names}) (live|like|have)|me where ({names}) lives|({names})'s (job|older|younger)[^.]*\?"
    )
    lessons = list(WORLD.documents("en", 4000, seed=1, kinds=dict.fromkeys(LESSONS, 1.0)))
    assert not [lesson for lesson in lessons if asked.search(lesson)]
    assert any(re.search(names, lesson) for lesson in lessons)


def test_only_other_languages_tell_of_local_people() -> None:
    told = {
        language: {name for text in WORLD.documents(language, 2000, seed=1) for name in named_in(language, text)}
        for language in LANGUAGES
    }
    local = {person.name for person in WORLD.of("local")}
    assert told.pop("en") == set(BY_NAME) - local
    assert all(names == set(BY_NAME) for names in told.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_fact_is_told_often_and_in_many_wordings(language: str) -> None:
    words = words_of(language)
    documents = list(WORLD.documents(language, 4000, seed=1))
    named = [(text, named_in(language, text)) for text in documents]
    people = [person for person in WORLD.everyone if language != "en" or person.split != "local"]
    for person in people[:40]:
        about = [text for text, names in named if person.name in names]
        for relation, key in person.facts.items():
            if relation in ("home", "food", "pet", "thing"):
                word = words.tables["place" if relation == "home" else relation][key]
                forms = {str(word), *(form for form in vars(word).values() if isinstance(form, str) and len(form) > 2)}
                assert sum(any(form in text for form in forms) for text in about) >= 5, (person.name, relation)
    assert len(set(documents)) > 0.97 * len(documents)


# chats and questions


@pytest.mark.parametrize("language", LANGUAGES)
def test_chats_have_one_to_three_turns_and_many_read(language: str) -> None:
    chats = WORLD.chats(language, 1000, seed=1)
    for chat in chats:
        roles = [message["role"] for message in chat["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 2 <= len(roles) <= 6
    share = sum(chat["task"] in ("read", "read_word") for chat in chats) / len(chats)
    assert 0.3 <= share <= 0.45


def english_answer(name: str, relation: str) -> tuple[str, str]:
    """The right full and one-word answers in English, written without the tables."""
    person = BY_NAME[name]
    value = person.facts[relation]
    an = "an" if value[0] in "aeiou" else "a"
    plural = {"mango": "mangoes", "tomato": "tomatoes", "potato": "potatoes", "peach": "peaches"}
    if relation == "home":
        return f"{name} lives in {value.capitalize()}.", value.capitalize()
    if relation == "food":
        foods = plural.get(value, f"{value}s") if value in COUNTABLE else value
        return f"{name} likes {foods}.", foods
    if relation in ("pet", "thing"):
        return f"{name} has {an} {value}.", value
    if relation == "job":
        return f"{name} is {an} {value}.", value
    older = "older" if person.sibling_older else "younger"
    sister = "sister" if BY_NAME[value].female else "brother"
    return f"{name}'s {older} {sister} is {value}.", value


@pytest.mark.parametrize("split", SPLITS)
def test_english_answers_are_right_by_the_facts(split: str) -> None:
    questions = WORLD.questions("en", 400, seed=1, split=split, tasks={"fact": 1, "word": 1, "tell": 1})
    for question in questions:
        assert BY_NAME[question.about].split == split and question.about in str(question.messages)
        if question.task == "tell":
            assert question.answer == " ".join(
                english_answer(question.about, r)[0] for r in question.relation.split(",")
            )
        else:
            assert question.answer == english_answer(question.about, question.relation)[question.task == "word"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_hold_the_fact_in_every_language(language: str) -> None:
    words = words_of(language)
    names = Teller(words, WORLD.everyone).name
    for question in WORLD.questions(language, 300, seed=1, split="local", tasks={"fact": 1, "word": 1}):
        person = BY_NAME[question.about]
        value = person.facts[question.relation]
        if question.relation == "sibling":
            right = str(names[value])
        elif question.relation == "job" and words.job:
            job = words.job(value, person.female)
            right = job.form("ins") if question.task == "fact" else str(job)
        else:
            right = words.tables["place" if question.relation == "home" else question.relation][value]
            if language == "uk" and question.task == "fact" and question.relation in ("home", "food"):
                right = right.form("loc" if question.relation == "home" else "acc")
        assert right in question.answer
        assert question.task == "fact" or question.answer == right


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", ["asked", "held_out"])
def test_answers_to_reading_stand_in_the_text(language: str, split: str) -> None:
    tasks = {"read": 1, "read_word": 1, "repeat": 1, "list": 1}
    for question in WORLD.questions(language, 300, seed=2, split=split, tasks=tasks):
        prompt = question.messages[-1]["content"]
        if question.task in ("read", "repeat"):
            assert question.answer in prompt
        elif question.task == "list":
            assert all(word in prompt for word in question.answer.split(words_of(language).comma))
        elif language != "uk":  # where the answer may stand in the text in another case
            assert question.answer in prompt


def test_reading_questions_have_one_answer() -> None:
    """No sentence of the text says the same kind of thing of the same person twice."""
    for question in WORLD.questions("en", 500, seed=4, tasks={"read": 1}):
        name, verb = question.answer.split()[:2]
        if question.relation in ("go", "buy", "lose", "meet", "give", "home", "food"):
            text = question.messages[-1]["content"].split("Tell me")[0]
            assert text.count(f"{name} {verb} ") == 1, question


def test_questions_differ_and_local_ones_need_memory() -> None:
    questions = WORLD.questions("ms", 300, seed=1, split="local")
    assert len({str(question.messages) for question in questions}) == 300
    assert {question.task for question in questions} == {"fact", "word", "tell"}


def test_score_forgives_white_space_and_the_last_stop_only() -> None:
    question = Question([], "Mira lives in Penang.", "fact", "Mira", "home")
    assert all(score(reply, question) for reply in ("Mira lives in Penang.", " Mira lives  in Penang\n"))
    wrong = ("mira lives in Penang.", "Mira lives in Penang. Yes.", "Mira lives in Ipoh.", "Penang", "")
    assert not any(score(reply, question) for reply in wrong)
    assert score("米拉住在槟城", Question([], "米拉住在槟城。", "fact", "Mira", "home"))


# tables and grammar


def test_languages_have_the_same_tables_and_sentences() -> None:
    english = words_of("en")
    for language in LANGUAGES:
        words = words_of(language)
        assert {kind: set(table) for kind, table in words.tables.items()} == {
            kind: set(table) for kind, table in english.tables.items()
        }
        assert set(words.sentences) - {"gloss"} == set(english.sentences)
        for kind, table in words.tables.items():
            assert len(set(map(str, table.values()))) == len(table), f"{language}: two {kind}s share a word"


def test_names_are_different_people_in_every_language() -> None:
    for language in LANGUAGES:
        _, forms = name_pattern(language)
        assert set(forms.values()) == set(FEMALE)
    assert len(FEMALE) == 200 and sum(FEMALE.values()) == 100


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_wording_fills_for_every_kind_of_person(language: str) -> None:
    teller = Teller(words_of(language), WORLD.everyone)
    rng = Random("wordings")
    needs = {
        "pet": "pet",
        "run": "pet",
        "thing": "thing",
        "clean": "thing",
        "job": "job",
        "work": "job",
        "sibling": "sibling",
    }
    given_ = {
        "ask": "Q?",
        "bare_ask": "Q",
        "say": "S.",
        "bare": "S",
        "text": "T.",
        "word": teller.name["Mira"],
        "english": "E",
    }
    for key, wordings in teller.language.sentences.items():
        need = next((needs[part] for part in key.replace("2", "").split(".") if part in needs), None)
        for person in WORLD.everyone[:60]:
            if (need and need not in person.facts) or key.startswith("list"):
                continue
            other, third = teller.others(rng, person)
            slots = teller.scene(rng, person, other, third) | given_
            slots |= {"place2": teller.facts[other.name]["place"], "food2": teller.facts[other.name]["food"]}
            if "sibling" in key:
                slots |= teller.facts[person.name]
            for wording in wordings:
                assert teller.fill(wording, slots)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_clean(language: str) -> None:
    for text in texts(language):
        assert text and text == text.strip()
        assert not re.search(r"[{}|<>]|  |None|Word\(|\.\.|。。| [.,?!]", text), text
    end = tuple('."!?' if language in ("en", "ms") else ".!?。！？”»")
    for document in WORLD.documents(language, 500, seed=1):
        assert document.endswith(end) and document[0] == document[0].upper()


def test_english_articles_and_numbers() -> None:
    for text in texts("en"):
        for article, word in re.findall(r"\b(an?) (\w+)", text):
            assert (article == "an") == (word[0] in "aeiou"), text
        for many, word in re.findall(r"\b(two|three|four|five) (\w+)", text):
            assert word.endswith("s"), (many, word)


def test_malay_counts_with_classifiers() -> None:
    tables = words_of("ms").tables
    for kind, classifiers in {
        "pet": "seekor",
        "job": "seorang",
        "thing": "sebuah|sebiji|sekaki|sebentuk|sehelai",
    }.items():
        for noun in tables[kind].values():
            assert re.fullmatch(f"({classifiers}) {noun}", noun.form("a"))
    for food in COUNTABLE:
        assert words_of("ms").counted(3, food) == f"tiga biji {tables['food'][food]}"


def ends_in_consonant(word: str) -> bool:
    assert "가" <= word[-1] <= "힣", word
    return (ord(word[-1]) - ord("가")) % 28 != 0


def test_korean_particles_fit_the_final_sound() -> None:
    words = [word for table in KOREAN_TABLES.values() for word in table.values()]
    words += [words_of("ko").person(name, female, True) for name, female in FEMALE.items()]
    words += [words_of("ko").colored(color, thing) for color in KOREAN_TABLES["color"] for thing in COLORED]
    words += [words_of("ko").counted(3, food) for food in COUNTABLE]
    words += [words_of("ko").sibling(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]
    for word in words:
        assert word.form("p") == ("은" if ends_in_consonant(word) else "는"), word
        forms = [word.form(form) for form in ("t", "s", "o", "w", "ro", "named")]
        assert forms == [str(word) + particle for particle in PARTICLES[word.form("p")]]
    assert not any(map(ends_in_consonant, KOREAN_TABLES["job"].values())), "으로 and 로 are told apart only for vowels"
    assert set(KOREAN) == set(FEMALE)


def test_korean_sentences_end_politely() -> None:
    for wordings in words_of("ko").sentences.values():
        for wording in wordings:
            if wording.endswith("."):
                assert re.search(r"(니다|오|}|말하십시오|”)\.$", wording), wording


def test_ukrainian_has_every_case_and_gender() -> None:
    words = words_of("uk")
    assert set(UKRAINIAN) == set(FEMALE)
    for name, (nom, gen, dat, acc, ins, voc, start, after) in UKRAINIAN.items():
        declined_as_feminine = nom[-1] in "ая"
        assert declined_as_feminine == FEMALE[name] or name == "Mykola"
        assert ins.endswith(("ою", "ею", "єю") if declined_as_feminine else ("ом", "ем", "єм")), name
        assert acc.endswith(("у", "ю")) if declined_as_feminine else acc == gen, name
        assert dat.endswith(("і", "ї") if declined_as_feminine else ("ові", "еві", "єві")), name
        assert voc != nom and start == ("В" if nom[0] in "АОУЕИІ" else "У")
        assert after == ("у" if nom.startswith(("В", "Ф", "Св")) else "в")
    for place in words.tables["place"].values():
        assert re.fullmatch(r"[ву] \w+", place.form("loc")) and re.fullmatch(r"[ву] \w+", place.form("in_"))
    for kind in ("pet", "thing"):
        for noun in words.tables[kind].values():
            assert noun.form("acc") and noun.form("ins") and noun.gender in (0, 1, 2)
            assert noun.gender != 1 or (noun.endswith(("а", "я")) and noun.form("acc").endswith(("у", "ю")))
    assert all(words.tables["thing"][thing].gender < 2 for thing in COLORED), "colors have no neuter forms"
    assert {len(cells) for cells in SHADES.values()} == {3}
    for food in COUNTABLE:
        assert words.counted(2, food) != words.counted(3, food) and words.counted(5, food).endswith(
            words.counted(2, food).form("many")
        )


def test_ukrainian_verbs_agree_and_prepositions_sound_right() -> None:
    women = "|".join(UKRAINIAN[name][0] for name, female in FEMALE.items() if female)
    men = "|".join(UKRAINIAN[name][0] for name, female in FEMALE.items() if not female)
    vowels, consonants = "аеєиіїоуюяАЕЄИІЇОУЮЯ", "бвгґджзйклмнпрстфхцчшщь"
    for text in texts("uk"):
        assert not re.search(rf"\b({women}|[Вв]она) \w+(в|вся)\b", text), text
        assert not re.search(rf"(?<![,»—] )\b({men}|[Вв]ін) \w+(ла|лася)\b", text), text
        assert not re.search(rf"[{consonants}] в [{consonants}]", text, re.IGNORECASE), text
        assert not re.search(rf"[{vowels}] у (?!льв|св|[вф])[{consonants}]", text, re.IGNORECASE), text
        assert not re.search(rf" у [{vowels}]", text), text


def test_chinese_nouns_have_classifiers() -> None:
    words = words_of("zh")
    assert set(CHINESE) == set(FEMALE)
    for kind in ("food", "pet", "thing", "job"):
        assert all(re.fullmatch(r"[一-鿿]", noun.form("unit")) for noun in words.tables[kind].values())
    assert all(noun.form("eat") in "吃喝" for noun in words.tables["food"].values())
    assert words.counted(2, "banana") == "两根香蕉" and words.colored("red", "hat").form("a") == "一顶红色的帽子"
    for text in texts("zh"):
        assert not re.search(r"[a-zA-Z] ?[,.?]|二[个根]", text), text
