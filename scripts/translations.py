"""README.md in other languages: the same code blocks in all, and which one is older than its source.

    python scripts/translations.py            copies the code blocks of README.md into the translations (`make docs`)
    python scripts/translations.py --check    says what differs; exit status 1 where code blocks do
    python scripts/translations.py --mark uk  README.uk.md is up to date: it was translated from README.md as it is now

A translation's last line names the prose that it was made from. Leaves out translating.
"""

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "README.md"
LANGUAGES = ("ms", "zh", "uk", "ko")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- translated from README\.md ([0-9a-f]{12}) -->\n\Z")


def place(language: str) -> Path:
    """The README of a language."""
    return ROOT / f"README.{language}.md"


def prose_digest(text: str) -> str:
    """The first 12 hex digits of sha256 of all but the code blocks."""
    return hashlib.sha256(BLOCK.sub("", text).encode()).hexdigest()[:12]


def with_blocks(text: str, source: str) -> str | None:
    """A translation with the code blocks of the source, in order; None where it has another number of them."""
    blocks = BLOCK.findall(source)
    if len(BLOCK.findall(text)) != len(blocks):
        return None
    left = iter(blocks)
    return BLOCK.sub(lambda match: next(left), text)


def check(source: str) -> tuple[list[str], list[str]]:
    """What is wrong with the code blocks, and which translations are older than their source."""
    wrong, older = [], []
    for language in LANGUAGES:
        path = place(language)
        text = path.read_text(encoding="utf-8")
        changed = with_blocks(text, source)
        if changed is None:
            ours, theirs = (len(BLOCK.findall(each)) for each in (text, source))
            wrong.append(f"{path.name} has {ours} code blocks, README.md has {theirs}")
        elif changed != text:
            wrong.append(f"{path.name} has other code blocks than README.md; run: python scripts/translations.py")
        mark = MARK.search(text)
        if mark is None or mark[1] != prose_digest(source):
            again = f"translate what changed, then run: python scripts/translations.py --mark {language}"
            older.append(f"{path.name} is older than README.md: {again}")
    return wrong, older


def main(arguments: list[str]) -> int:
    """Exit status."""
    source = SOURCE.read_text(encoding="utf-8")
    if arguments[:1] == ["--mark"]:
        for language in arguments[1:]:
            text = MARK.sub("", place(language).read_text(encoding="utf-8")).rstrip("\n")
            mark = f"\n\n<!-- translated from README.md {prose_digest(source)} -->\n"
            place(language).write_text(text + mark, encoding="utf-8")
    elif not arguments:
        for language in LANGUAGES:
            changed = with_blocks(place(language).read_text(encoding="utf-8"), source)
            if changed is not None:
                place(language).write_text(changed, encoding="utf-8")
    wrong, older = check(source)
    print(*wrong, *older, sep="\n", end="\n" if wrong or older else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
