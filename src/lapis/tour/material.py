"""What a tour is made from: a folder of texts and chats, the built-in world's or the user's own.

    DIR/corpus/<language>/*.jsonl           one document per line, {"text": ...}; "valid" in the name = held out
    DIR/instruct/<language>.jsonl           chats, {"messages": [...]}; <language>.valid.jsonl = held out
    DIR/questions/<language>.jsonl          optional: questions with one right answer (the built-in world has them)

Leaves out: how documents become rows (text/rows/packing.py).
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from lapis.checkpoint.commit import commit
from lapis.errors import DataError
from lapis.text.corpus.corpus import documents
from lapis.tour.ask import PRACTICE
from lapis.tour.world import World

ENGLISH = "en"
T = TypeVar("T")
ReportShare = Callable[[float], None]
"""Gets the share of a piece of work that is done."""


@dataclass(frozen=True)
class Material:
    """The texts and chats of English and one target language, checked to be there. root: a folder as drawn above."""

    root: Path
    target: str

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"{self.root}: there is no such folder; --data wants corpus/ and instruct/ in it")
        if self.target == ENGLISH:
            raise DataError("the tour moves from English to another language; choose --language from the others")
        held = {place.name for place in (self.root / "corpus").glob("*") if place.is_dir()} - {ENGLISH}
        if self.target not in held:
            raise DataError(
                f"{self.root}: has no corpus/{self.target}; --language may be {', '.join(sorted(held)) or '-'}"
            )
        for language in self.languages:
            self.texts(language, held_out=False)
            self.texts(language, held_out=True)
            self.chats(language, held_out=True)
        self.chats(ENGLISH, held_out=False)

    @property
    def languages(self) -> tuple[str, str]:
        return ENGLISH, self.target

    def texts(self, language: str, *, held_out: bool) -> list[Path]:
        """The files of documents of one language."""
        files = sorted((self.root / "corpus" / language).glob("*.jsonl"))
        chosen = [path for path in files if ("valid" in path.stem) == held_out]
        if not chosen:
            raise DataError(f"{self.root}: corpus/{language} has no {'*valid' if held_out else ''}*.jsonl")
        return chosen

    def chats(self, language: str, *, held_out: bool) -> Path:
        """The file of chats of one language."""
        path = self.root / "instruct" / f"{language}{'.valid' if held_out else ''}.jsonl"
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; a tour needs it")
        return path

    @property
    def yardstick(self) -> Path | None:
        """Chats of the target language for training a yardstick; None where the folder has none."""
        path = self.root / "instruct" / f"{self.target}.jsonl"
        return path if path.is_file() else None

    def questions(self, language: str) -> Path | None:
        """The file of questions with one right answer, where the folder has one."""
        path = self.root / "questions" / f"{language}.jsonl"
        return path if path.is_file() else None

    def mix(
        self, shares: Mapping[str, float], path: Path, characters: int, seed: int, report: ReportShare = lambda _: None
    ) -> None:
        """Writes documents to `path` until `characters` are reached, each language by its share of the characters.

        A language whose documents run out starts again, in another order. report: gets the share that is written.
        """
        sources = {language: self._endless(language, seed) for language in shares}
        written = dict.fromkeys(shares, 0)
        with path.open("w", encoding="utf-8") as file:
            while (whole := sum(written.values())) < characters:
                report(whole / characters)
                language = min(shares, key=lambda name: written[name] / shares[name])
                text = next(sources[language])
                written[language] += len(text)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")

    def _endless(self, language: str, seed: int) -> Iterator[str]:
        texts = [document.text for document in documents(self.texts(language, held_out=False))]
        for turn in count():
            random.Random(f"{seed} {language} {turn}").shuffle(texts)
            yield from texts

    def held_out_texts(self, language: str, characters: int) -> tuple[list[str], list[str]]:
        """Two disjoint halves of the held-out documents, for choosing and for reporting, of `characters` each at most.

        Documents are cut into pieces of about 2,000 characters at paragraph ends. Pieces from all over the files then
        go to either half in turn.
        """
        halves: tuple[list[str], list[str]] = ([], [])
        sizes = [0, 0]
        texts = documents(self.texts(language, held_out=True))
        pieces = [piece for document in texts for piece in _pieces(document.text, 2000)]
        chosen = evenly(range(len(pieces)), 2 * characters * len(pieces) // max(1, sum(map(len, pieces))))
        for number in [*chosen, *sorted({*range(len(pieces))} - {*chosen})]:  # the others where these are too long
            piece, half = pieces[number], 0 if sizes[0] <= sizes[1] else 1
            if sizes[half] + len(piece) <= characters:
                halves[half].append(piece)
                sizes[half] += len(piece)
        return halves


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many, as far apart as can be: files are often sorted by source, and their beginning is of one kind."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]


def write_world(
    world: World, root: Path, target: str, characters: int, talks: int, report: ReportShare = lambda _: None
) -> None:
    """Lays the built-in world out as a folder of material: `characters` of text in each language, chats, questions.

    Training chats, `talks` of them, are in English only; the held-out ones, and the questions, are about people of whom
    no training chat asks for a fact (it may name them in invented scenes). Chats of the target language that are
    written for training are for a yardstick, and marked so. report: gets the share that is written.
    """
    with commit(root) as staging:
        for number, language in enumerate((ENGLISH, target)):

            def tell(share: float, number: int = number) -> None:
                report((number + share) / 2)

            corpus = staging.path / "corpus" / language
            corpus.mkdir(parents=True)
            _write(corpus / "train.jsonl", _texts(world.documents(language, seed=1), characters, tell))
            _write(corpus / "valid.jsonl", _texts(world.documents(language, seed=2), 130_000))
            chats = staging.path / "instruct"
            chats.mkdir(exist_ok=True)
            _write(chats / f"{language}.jsonl", world.chats(language, talks, seed=1, tasks=PRACTICE))
            _write(chats / f"{language}.valid.jsonl", world.chats(language, 200, seed=2, people="held_out"))
            folder = staging.path / "questions"
            folder.mkdir(exist_ok=True)
            splits = ("held_out",) if language == ENGLISH else ("held_out", "local")
            questions = [(split, q) for split in splits for q in world.questions(language, 300, seed=3, split=split)]
            _write(
                folder / f"{language}.jsonl", ({"split": split, **asdict(question)} for split, question in questions)
            )


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _texts(texts: Iterator[str], characters: int, report: ReportShare = lambda _: None) -> Iterator[dict[str, str]]:
    written = 0
    while written < characters:
        text = next(texts)
        written += len(text)
        report(min(1.0, written / characters))
        yield {"text": text}


def _pieces(text: str, size: int) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > size:
            yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    if piece:
        yield piece
