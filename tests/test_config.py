"""Settings come from one dataclass; whatever does not fit is one line with the nearest name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from lapis.config import build, load_yaml, override
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
        ({"steps": "many"}, "steps is 'many'; expected int"),
        ({"steps": True}, "steps is True; expected int"),
        ({"steps": 1.5}, "steps is 1.5; expected int"),
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
        ("- 1", "holds list"),
        ("a: 1\na: 2", 'c.yaml:2: not YAML: the key "a" stands twice'),
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


def test_assignments_without_a_value() -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        override({}, ["steps"])
