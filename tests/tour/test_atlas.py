"""The book's countries: the same texts each time, one right answer to each question, nobody held out in a chat."""

import pytest

from lapis.errors import ConfigError
from lapis.text.tokenizer.tokenizer import train_tokenizer
from lapis.tour.atlas.countries import COUNTRIES, HELD_OUT, TAUGHT, chats, questions, texts
from lapis.tour.atlas.models import VOCABULARY


@pytest.mark.parametrize("language", ["en", "ms"])
def test_texts_are_the_same_each_time_and_tell_every_fact(language: str) -> None:
    one, two = texts(language, 600, seed=1), texts(language, 600, seed=2)
    assert one == texts(language, 600, seed=1) and one[:50] == texts(language, 50, seed=1) and one != two
    whole = " ".join(one)
    assert all(fact in whole for country in COUNTRIES for fact in country.facts(language).values())


@pytest.mark.parametrize("language", ["en", "ms"])
def test_every_question_has_one_answer_and_knows_it(language: str) -> None:
    listed = questions(language)
    assert len({question.text for question in listed}) == len(listed) == 5 * len(COUNTRIES)
    for question in listed:
        assert all(question.is_right(reply) and question.answer in reply for reply in question.replies)
        others = [other for other in listed if other.topic == question.topic and other is not question]
        assert not any(question.is_right(other.reply) for other in others)
        assert not question.is_right(question.answer) and not question.is_right(question.reply + " And more.")


def test_no_chat_is_about_a_held_out_country() -> None:
    talks = " ".join(message["content"] for chat in chats("en", 500, seed=1) for message in chat["messages"])
    assert not any(fact in talks for country in HELD_OUT for fact in (country.name, country.capital, country.dish))
    assert all(country.capital in talks for country in TAUGHT)


def test_the_countries_that_a_lens_tracks_are_one_token_each() -> None:
    tokenizer = train_tokenizer([*texts("en", 4000, seed=1), *texts("ms", 1500, seed=1)], VOCABULARY)
    assert all(len(tokenizer.encode(f" {name}")) == 1 for name in ("Malaysia", "Indonesia", "Myanmar"))


def test_an_unknown_language_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match='no language "fr"; there are en, ms'):
        texts("fr", 1)
