"""Settings come from one dataclass; whatever does not fit is one line with the nearest name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lapis.config import build, dump_yaml, load_yaml, override, parse_yaml
from lapis.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class Outer:
    steps: int
    out: Path | None = None
    files: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    loud: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    note: str | None = None
    rows: Literal["auto"] | int = "auto"


@dataclass(frozen=True)
class Usual:
    rank: int = 8


def test_yaml_and_key_value_fill_nested_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("steps: 3\nfiles: [a, b]\ninner: {kind: muon}\n")
    settings = override(load_yaml(path), ["inner.rate=3e-4", "out=runs/x", "loud=true"])
    assert build(Outer, settings, "c.yaml") == Outer(3, Path("runs/x"), ("a", "b"), Inner(3e-4, "muon"), True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stesp": 3}, 'unknown key "stesp"; did you mean "steps"'),
        ({}, '"steps" is missing'),
        ({"steps": "many"}, "steps is 'many'; expected a whole number"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"steps": 1.5}, "steps is 1.5; expected a whole number"),
        ({"steps": 1, "rows": "many"}, "rows is 'many'; expected auto or a whole number"),
        ({"steps": 1, "inner": {"kind": "muno"}}, "inner: kind is 'muno'; did you mean \"muon\""),
        ({"steps": 1, "inner": {"rat": 1}}, 'inner: unknown key "rat"; did you mean "rate"'),
    ],
)
def test_what_does_not_fit_is_told(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, settings, "c.yaml")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1, 2", "c.yaml:2: not YAML"),
        ("- 1", "c.yaml: holds a list; give a file of key: value lines"),
        ("hello", "c.yaml: holds only 'hello'; give a file of key: value lines"),
        ("a: 1\na: 2", 'c.yaml:2: the key "a" stands twice; leave one of them out'),
    ],
)
def test_damaged_yaml(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        load_yaml(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "d.yaml")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: !!python/object/apply:os.system ['touch hacked']\n")
    with pytest.raises(ConfigError):
        load_yaml(path)


@pytest.mark.parametrize("text", ["*.jsonl", "*", "@file", "%a", "`a`"])
def test_what_no_yaml_begins_with_is_text(text: str) -> None:
    assert override({}, [f"data={text}"]) == {"data": text}


def test_assignments_without_a_value() -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        override({}, ["steps"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("on", "on"), ("no", "no"), ("Yes", "Yes"), ("true", True), ("FALSE", False), ("~", None),
        ("null", None), ("", None), ("2e-4", 2e-4), ("-2E-3", -2e-3), ("1e3", 1000.0), ("1_000", 1000),
        ("1_000.5", 1000.5), (".5", 0.5), ("5.", 5.0), ("+3", 3), ("010", 10), ("0x1F", 31), ("0o17", 15),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), ("1e", "1e"), ("1__0", "1__0"), ("'2e-4'", "2e-4"),
        ('"off"', "off"), ("1_000_", "1_000_"), ("12e03", 12000.0), ("-.inf", float("-inf")), ("!!str 1", "1"),
    ],
)  # fmt: skip
def test_plain_words_and_numbers_mean_what_a_person_means(text: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"key: {text}\nlist: [{text or '~'}]\n")
    read = load_yaml(path)
    assert read == {"key": value, "list": [value]} and type(read["key"]) is type(value)
    assert override({}, [f"key={text}"]) == {"key": value}


@pytest.mark.parametrize("text", ["loud: on", "loud: Yes", "loud: 'on'", "loud: true"])
def test_words_are_switches_where_a_setting_is_true_or_false(text: str) -> None:
    assert build(Outer, {"steps": 1, **parse_yaml(text, "c.yaml")}, "c.yaml").loud is True
    with pytest.raises(ConfigError, match="loud is 'maybe'; expected on or off"):
        build(Outer, {"steps": 1, "loud": "maybe"}, "c.yaml")


@pytest.mark.parametrize(
    ("written", "value"),
    [("off", "off"), ("no", "off"), ("false", "off"), ("on", "on"), ("true", "on"), ("auto", "auto")],
)
def test_words_choose_among_on_off_and_auto(written: str, value: str) -> None:
    assert build(Outer, override({"steps": 1}, [f"compile={written}"]), "c.yaml").compile == value


def test_words_say_that_there_is_none_or_the_usual() -> None:
    @dataclass(frozen=True)
    class Outer:
        inner: Usual | None = None
        most: int | None = 3
        name: str | None = None

    for word in ("off", "no", "None", "null", "false"):
        assert build(Outer, override({}, [f"inner={word}", f"most={word}"]), "x") == Outer(None, None)
    assert build(Outer, override({}, ["inner=on"]), "x").inner == Usual()
    assert build(Outer, override({}, ["name=off"]), "x").name == "off"
    assert build(Inner, override({}, ["rate=off"]), "x").rate == 0
    with pytest.raises(ConfigError, match="most is 'on'; expected a whole number"):
        build(Outer, override({}, ["most=on"]), "x")


def test_a_word_stays_text_where_text_is_expected() -> None:
    settings = parse_yaml("steps: 1e3\nnote: no\nfiles: [on, off]", "c.yaml")
    built = build(Outer, settings, "c.yaml")
    assert (built.steps, built.note, built.files) == (1000, "no", ("on", "off"))


@pytest.mark.parametrize(
    "text", ["!!int x", "9" * 5000, "[" * 3000, "!!timestamp 2024-13-99", "!!bool maybe", "{[1]: 2}", "\x00"]
)
def test_yaml_that_cannot_be_read_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "c.yaml")
    assert str(caught.value).startswith("c.yaml") and "\n" not in str(caught.value)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False),
    st.text("aenofE.+-_0123456789:~x <=\n'#", max_size=8),
    st.sampled_from(["off", "2e-4", "1_000", "010", "null", "1:30", "2024-01-01", "0o17", ".5", "no", "<<", "="]),
)  # fmt: skip


@given(st.dictionaries(st.text("abc", min_size=1), st.one_of(VALUES, st.lists(VALUES)), max_size=4))
def test_what_is_dumped_is_read_back_by_every_reader(settings: dict[str, object]) -> None:
    text = dump_yaml(settings)
    assert parse_yaml(text, "c.yaml") == settings
    assert yaml.safe_load(text) == settings
