"""Files that somebody made, or damaged: each is read, or refused in one line; nothing else, ever.

Seeded mutations of good files of every kind that lapis reads (cases.py). This is the short form of some seconds;
`make reliability` tries a million and more (benchmarks/fuzz.py), and looks at the time and memory of each.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from .cases import CASES, make_good
from .fuzzing import tried

SHORT = {"headers": 400, "config": 25, "index": 60, "recipes": 60, "records": 150, "adapters": 60, "deltas": 20,
         "tokenizers": 30, "rows": 60, "report": 60}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_good(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", CASES)
def test_mutated_files_are_read_or_refused(
    good: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("LAPIS_CACHE", str(tmp_path / "cache"))
    case = CASES[kind](good, tmp_path)
    crashes = [crash for number in range(1, SHORT[kind] + 1) if (crash := tried(kind, case, 0, number).crash)]
    assert not crashes
