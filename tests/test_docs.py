"""The docs say what is: the API page is up to date, and links inside the repository lead somewhere."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_api_page_is_up_to_date() -> None:
    command = [sys.executable, "scripts/api_page.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def translations(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/translations.py", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_code_blocks_are_the_same_in_five_languages() -> None:
    """A translation that is older than its source is told of, and stays until somebody translates."""
    checked = translations("--check")
    assert checked.returncode == 0, checked.stdout
    for line in checked.stdout.splitlines():
        warnings.warn(line, stacklevel=1)
    readmes = sorted(path.name for path in ROOT.glob("README*.md"))
    assert readmes == ["README.ko.md", "README.md", "README.ms.md", "README.uk.md", "README.zh.md"]
    for name in readmes:
        text = (ROOT / name).read_text(encoding="utf-8")
        languages = text.splitlines()[2]
        assert sorted(re.findall(r"\((README[.a-z]*md)\)", languages)) == [other for other in readmes if other != name]
        assert "make tour " in text and "make test " in text


def test_a_translation_that_differs_is_named(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/translations.py", *(path.name for path in ROOT.glob("README*.md"))):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    source = tmp_path / "README.md"
    translations("--mark", "ms", "zh", "uk", "ko", root=tmp_path)
    assert translations("--check", root=tmp_path).stdout == ""
    source.write_text(source.read_text(encoding="utf-8") + "\nMore.\n", encoding="utf-8")
    older = translations("--check", root=tmp_path)
    assert older.returncode == 0 and older.stdout.count(" is older than README.md") == 4
    source.write_text(source.read_text(encoding="utf-8").replace("make tour ", "make tours"), encoding="utf-8")
    other = translations("--check", root=tmp_path)
    assert other.returncode == 1 and other.stdout.count(" has other code blocks than README.md") == 4
    assert translations(root=tmp_path).returncode == 0, "the blocks were copied"
    source.write_text(source.read_text(encoding="utf-8") + "\n```\nx\n```\n", encoding="utf-8")
    assert "README.uk.md has 5 code blocks, README.md has 6" in translations("--check", root=tmp_path).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs" and page.name != "api.md"])
def test_lines_are_short_but_in_tables(page: Path) -> None:
    assert not [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > 120 and line[0] != "|"]


def test_every_term_has_its_five_forms() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    section = glossary.partition("## Five languages")[2].partition("How each is written")[0]
    header, _, *terms = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", section, re.M)
    ]
    assert header == ["English", "Malay", "Chinese", "Ukrainian", "Korean"]
    assert len(terms) >= 60
    assert [row for row in terms if len(row) != 5 or not all(row)] == []
    assert len({row[0] for row in terms}) == len(terms), "a term stands twice"
