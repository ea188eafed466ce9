"""The docs say what is: the API page is up to date, and links inside the repository lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_api_page_is_up_to_date() -> None:
    command = [sys.executable, "scripts/api_page.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


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
