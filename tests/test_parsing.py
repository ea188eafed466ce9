"""JSON and YAML from anybody: read, or refused in one short line, in time and memory that grow with the text alone."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.checkpoint.files import read_json
from lapis.config import load_yaml, nearest, parse_yaml
from lapis.errors import CheckpointError, ConfigError
from lapis.parsing import LEVELS, ParseError, parse_json, quoted

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**39), 10**39) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN, st.booleans())
def test_what_python_writes_is_read_back(value: Any, plain: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=plain)) == value
    assert parse_json(json.dumps(value, ensure_ascii=plain).encode()) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1', "not JSON at column 8"), (b'{"a": 1,\n"b" 2}', "line 2, column 5"), (b'"\xff"', "UTF-8 at byte 1"),
        (b'{"a": 1, "a": 2}', 'the key "a" stands twice'), (b"[" * 100_000, "nested"),
        (b"[" * (LEVELS + 1) + b"]" * (LEVELS + 1), "nested"), (b"9" * 5000, "a number of 5,000 digits"),
        (b'{"a": -' + b"9" * 100 + b"}", "digits"), (b'"\\ud83d"', "surrogate"), (b'{"\\udE00": 1}', "surrogate"),
        (b"", "not JSON"), (b"[" + b"0," * 4_000_000 + b"0]", "more than 4,000,000 values"),
        (b'{"' + b"k" * 1000 + b'": 1, "' + b"k" * 1000 + b'": 1}', "twice"),
    ],
)  # fmt: skip
def test_faults_05_33_and_54_json_beyond_the_limits(text: bytes, says: str) -> None:
    with pytest.raises(ParseError, match=says) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_what_published_files_have_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"time_step_limit": [0.0, Infinity]}') == {"time_step_limit": [0.0, float("inf")]}
    assert parse_json(r'"\ud83d\ude00"') == "😀"
    assert parse_json("[" * LEVELS + "]" * LEVELS)
    for word in ("NaN", "-Infinity"):
        with pytest.raises(ParseError, match="is not JSON"):
            parse_json(f'{{"a": {word}}}', constants=False)


def measured(call: Callable[[], Any]) -> tuple[str, float, int]:
    """What the refusal says, processor seconds, and by how many bytes the peak of memory grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        call()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return str(caught.value), time.process_time() - begin, grown


def test_fault_05_a_key_that_stands_twice_among_many(tmp_path: Path) -> None:
    """The search for it was quadratic: 95 s for sixty thousand keys. It now costs no more than reading them."""
    path = tmp_path / "config.json"
    keys = ", ".join(f'"key{i}": {i}' for i in range(60_000))
    path.write_text(f'{{{keys}, "key59999": 0}}')
    says, seconds, _ = measured(lambda: read_json(path))
    begin = time.process_time()
    json.loads(path.read_text().replace('"key59999": 0', '"other": 0'))
    assert 'the key "key59999" stands twice' in says
    assert seconds < 50 * (time.process_time() - begin) + 0.5


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "more than 20,000 values"), (LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "YAML"),
        ("&a [*a]", r"\*a is in itself"), ("a: &a {b: *a}", r"\*a is in itself"), ("[" * 5000, "nested"),
        ("- " * 3000 + "a", "nested"), ("? " * 3000, "nested"), ("a: " + "9" * 900_000, "no number"),
        ("a: 0x" + "f" * 900_000, "no number"), ("- a\n" * 30_000, "more than 20,000 values"),
        ("a: '" + "x" * 1_000_000, "more than 1,000,000 bytes"), ('a: "\\ud800"', "surrogate"),
        ("!!set [a]", "YAML"), ("!!binary aGk=", "YAML"), ("a: !!timestamp 2001-12-15", "YAML"), ("[a]: b", "YAML"),
        ("k" * 300 + ": 1\n" + "k" * 300 + ": 1", "twice"),
    ],
)  # fmt: skip
def test_yaml_beyond_the_limits(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for call in (lambda: parse_yaml(text, "recipe.yaml"), lambda: load_yaml(path)):
        with pytest.raises(ConfigError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_aliases_that_people_write_are_read() -> None:
    text = "usual: &usual {weight: 0.5, density: 0.3}\nmodels: [{model: a, parameters: *usual}, {<<: *usual, model: b}]"
    models = parse_yaml(text, "recipe.yaml")["models"]
    assert models == [
        {"model": "a", "parameters": {"weight": 0.5, "density": 0.3}}, {"model": "b", "weight": 0.5, "density": 0.3},
    ]  # fmt: skip


def test_an_error_shows_a_few_words_of_what_is_wrong() -> None:
    deep: Any = {"a": 1}
    for _ in range(40):
        deep = {f"key{i}": deep for i in range(10)}  # ten to the fortieth entries, if they were written out
    for value in (deep, ["x" * 10**6] * 10**6, "x" * 10**7, {"a" * 10**6: 1}, [[[[1]]]] * 100, 10**39):
        assert len(quoted(value)) < 400 and "\n" not in quoted(value)
    assert quoted({"b": [1, 2], "a": "x"}) == "{'b': [1, 2], 'a': 'x'}"
    assert len(nearest("x" * 10**7, (f"word{i}" for i in range(10**6)))) < 1100
