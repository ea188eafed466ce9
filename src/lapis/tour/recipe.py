"""The story of the tour: build, tune, move, graft, tune again, measure. Each step is a call that a user could make.

    base      pre-trained on English with a fifth of the target language mixed in
    chat      base, tuned on English chats
    adapted   base, continued on the target language with some English replayed
    tuned     adapted, tuned on the same English chats: the yardstick
    grafted   adapted + scale x (chat - base): no training step

A step whose folder is there is not done again, so a tour that was stopped goes on. Leaves out: how a score is taken
(measure.py), the page (story.py), and the built-in world (world.py).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint.commit import commit, commit_file, full_disk_told
from lapis.errors import ConfigError, OutputError
from lapis.families.config import ModelConfig
from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import documents
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.tour import measure
from lapis.tour.material import ENGLISH, Material, write_world
from lapis.tour.story import WHAT, page
from lapis.tour.world import LANGUAGES, World
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.objectives.supervised.next_token import Causal, Chat
from lapis.weights.diff.diff import diff
from lapis.weights.graft.graft import graft

VOCABULARY = 4096
CONTEXT = 256
TARGET_IN_BASE = 0.2  # share of the target language's text in what base reads
ENGLISH_IN_ADAPTED = 0.25  # share of English replayed in what adapted reads
SHARES = {"base": 0.38, "chat": 0.22, "adapted": 0.2}  # of the minutes; tuned as chat, and yardstick beyond them
CHARACTERS = 1_600_000  # of text for each minute: somewhat more than a model reads in its share of it
SCALES = (0.5, 1.0, 1.5)
LEARNING: dict[str, dict[str, Any]] = {
    "base": {"lr": 3e-3},
    "adapted": {"lr": 1e-3},  # a gentle move: the further adapted drifts from base, the less a graft takes
    "chat": {"lr": 4e-4, "weight_decay": 0.0},
}


@dataclass(frozen=True)
class Tour:
    """What is asked for. minutes: of training. data: a folder of real text (material.py), or None for the world."""

    minutes: float = 5.0
    language: str = "ms"
    data: Path | None = None
    out: Path = Path("runs/tour")
    seed: int = 0


@dataclass
class Story:
    """A tour on its way: its folder, its material, and the models so far."""

    tour: Tour
    material: Material
    tokenizer: Tokenizer
    say: Callable[[str], None]
    models: dict[str, Path] = field(default_factory=dict)

    def tell(self) -> dict[str, Any]:
        """Trains, grafts and measures; what was found, as JSON."""
        english, target = self.material.languages
        self.learn("base", None, Causal, self.mixed("base", {english: 1 - TARGET_IN_BASE, target: TARGET_IN_BASE}))
        self.learn("chat", "base", Chat, self.material.chats(english, held_out=False))
        replay = {target: 1 - ENGLISH_IN_ADAPTED, english: ENGLISH_IN_ADAPTED}
        self.learn("adapted", "base", Causal, self.mixed("adapted", replay))
        self.learn("tuned", "adapted", Chat, self.material.chats(english, held_out=False))
        if self.material.yardstick:
            self.learn("yardstick", "adapted", Chat, self.material.yardstick)
        choosing, reporting = measure.exams(self.material)
        rows = measure.sweep(self.models, choosing, self.tokenizer, SCALES, self.say)
        scale = measure.choose(rows)
        self.graft(scale)
        self.say("measuring every model on the other half of the held-out material")
        scores = {name: reporting.take(load(folder), self.tokenizer) for name, folder in self.models.items()}
        gaps = {language: _gap(scores, language, "tuned") for language in self.material.languages}
        return {
            "models": {name: str(folder) for name, folder in self.models.items()},
            "scores": scores,
            "gap_closed": gaps,
            "gap_closed_to_yardstick": _gap(scores, target, "yardstick") if "yardstick" in scores else None,
            "cost": scores["grafted"][target]["bits_per_byte"] / scores["adapted"][target]["bits_per_byte"] - 1,
            "scale": scale,
            "sweep": rows,
            "budget": None if self.material.questions(english) else measure.BUDGET,
            "languages": [english, target],
            "difference": self.difference(),
            "curves": [row for name, folder in self.models.items() for row in _curve(name, folder)],
            "replies": self.replies(reporting),
            "fluent": self.fluent(),
        }

    def learn(self, name: str, start: str | None, objective: type[Causal] | type[Chat], data: Path) -> None:
        """One training run, unless its folder is there. Both chat tunings take the same number of steps."""
        folder = self.tour.out / name
        self.models[name] = folder
        if folder.is_dir():
            return
        self.say(f"{name}: {WHAT[name]}")
        torch.manual_seed(self.tour.seed)
        model = load(self.models[start]) if start else Transformer(self.shape())
        minutes, steps = None, None
        if name in SHARES:
            minutes = self.tour.minutes * SHARES[name]
        else:
            steps = json.loads((self.models["chat"] / "training.json").read_text())["steps"]
        learning = LEARNING[name if name in SHARES else "chat"]
        config = TrainConfig(**learning, optimizer="muon", batch=8, minutes=minutes, steps=steps, seed=self.tour.seed)
        train(model, objective(self.tokenizer, [data], context=CONTEXT), config, folder)

    def shape(self) -> ModelConfig:
        """A Llama-shaped decoder of about three million parameters."""
        return ModelConfig(
            dim=256, layers=4, heads=4, kv_heads=2, ffn_dim=512,
            vocab=self.tokenizer.vocab_size, context=CONTEXT, tied=True,
        )  # fmt: skip

    def mixed(self, name: str, shares: Mapping[str, float]) -> Path:
        """The file of text that a model reads, mixed from the languages."""
        path = self.tour.out / "data" / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            characters = int(CHARACTERS * self.tour.minutes * (1 if name == "base" else 0.6))
            with commit_file(path) as temporary:
                self.material.mix(shares, temporary, characters, self.tour.seed)
        return path

    def graft(self, scale: float) -> None:
        """adapted + scale x (chat - base)."""
        folder = self.models["grafted"] = self.tour.out / "grafted"
        if not folder.is_dir():
            self.say(f"grafted: adapted + {scale:g} x (chat - base)")
            graft(self.models["base"], self.models["chat"], self.models["adapted"], folder, scale)

    def difference(self) -> dict[str, Any]:
        """Direction and magnitude between base and chat, per tensor and per row of the embedding."""
        table = diff(self.models["base"], self.models["chat"], rows=True)
        return {"tensors": table.tensors, "rows": table.rows}

    def replies(self, exam: measure.Exam) -> list[dict[str, Any]]:
        """The greedy replies of all chatting models to a few held-out prompts of each language."""
        names = [name for name in WHAT if name in self.models and name != "base"]
        chosen = [(code, chat) for code in self.material.languages for chat in _short(exam.chats[code], 4)]
        said = {}
        for name in names:
            model = load(self.models[name])
            sampling = Sampling(max_tokens=measure.REPLY_TOKENS)
            said[name] = generate_batch(model, self.tokenizer, [chat[:-1] for _, chat in chosen], sampling)
        return [
            {
                "prompt": chat[-2]["content"],
                "wanted": chat[-1]["content"],
                "language": code,
                "replies": {name: said[name][i].text for name in names},
                "right": [name for name in names if said[name][i].text.strip() == chat[-1]["content"].strip()],
            }
            for i, (code, chat) in enumerate(chosen)
        ]

    def fluent(self) -> list[str]:
        """Ten beginnings of held-out English texts, continued by base."""
        texts = documents(self.material.texts(ENGLISH, held_out=True))
        starts = [_first_sentence(text.text) for text, _ in zip(texts, range(10), strict=False)]
        sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=50, seed=self.tour.seed)
        replies = generate_batch(load(self.models["base"]), self.tokenizer, starts, sampling)
        return [f"{start} …{reply.text}" for start, reply in zip(starts, replies, strict=True)]


def tour(wanted: Tour, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a tour, or goes on with it, or reads what a finished one found. say: is told each step.

    The result has the keys of `lapis tour --json`. Raises OutputError where the folder holds a tour that was asked for
    otherwise, DataError where the material is not what material.py draws.
    """
    out = wanted.out
    if wanted.minutes <= 0:
        raise ConfigError(f"tour: minutes is {wanted.minutes:g}; it must be above 0")
    if wanted.data is None and wanted.language not in set(LANGUAGES) - {ENGLISH}:
        known = ", ".join(sorted(set(LANGUAGES) - {ENGLISH}))
        raise ConfigError(
            f'tour: the built-in world moves from English to another language, {known}; not to "{wanted.language}"'
        )
    if wanted.data is not None:
        Material(wanted.data, wanted.language)  # refused now, before a folder is made
    settings = {**asdict(wanted), "data": str(wanted.data) if wanted.data else None, "out": None}
    _claim(out, settings)
    result, report = out / "tour.json", out / "report.html"
    if not result.exists():
        ran = _run(wanted, say) | {"report": str(report), "folder": str(out)}
        with commit_file(result) as path:
            path.write_text(json.dumps(ran, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if not report.exists():
        with commit_file(report) as path:
            path.write_text(page(found), encoding="utf-8")
    return found


def _run(wanted: Tour, say: Callable[[str], None]) -> dict[str, Any]:
    """What the story found, with the seconds that all sittings took together."""
    out, begun = wanted.out, time.monotonic()
    clock = out / ".seconds"
    earlier = float(clock.read_text()) if clock.exists() else 0.0
    try:
        root = wanted.data or out / "world"
        if wanted.data is None and not root.is_dir():
            say(f"a world of its own, told in English and {LANGUAGES[wanted.language]}")
            write_world(World(wanted.seed), root, wanted.language, int(CHARACTERS * wanted.minutes))
        material = Material(root, wanted.language)
        found = Story(wanted, material, _tokenizer(out / "tokenizer", material), say).tell()
    finally:
        clock.write_text(str(earlier + time.monotonic() - begun))
    names = {code: LANGUAGES.get(code, code) for code in material.languages}
    return found | {"seconds": earlier + time.monotonic() - begun, "names": names}


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or finds in it a tour that was asked for in the same way."""
    note = out / ".tour"
    if note.is_file():
        before = json.loads(note.read_text())
        other = [f"{key} was {before.get(key)}" for key, value in settings.items() if before.get(key) != value]
        if other:
            raise OutputError(f"{out}: holds another tour ({', '.join(other)}); give another --out, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise OutputError(f"{out}: exists already and is no tour; give another --out")
    else:
        with full_disk_told(out):
            out.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps(settings))


def _tokenizer(folder: Path, material: Material) -> Tokenizer:
    """A byte-level BPE of both languages, as much of the one as of the other in the mixture that base reads."""
    if not folder.is_dir():
        texts = [path for language in material.languages for path in material.texts(language, held_out=False)]
        with commit(folder) as staging:
            train_tokenizer(texts, VOCABULARY).save(staging.path)
    return Tokenizer.open(folder)


def _gap(scores: Mapping[str, measure.Scores], language: str, end: str) -> float | None:
    nll = {name: part[language]["response_nll"] for name, part in scores.items()}
    return measure.gap_closed(nll["adapted"], nll["grafted"], nll[end])


def _curve(name: str, folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{"run": name, **row} for row in rows]


def _first_sentence(text: str) -> str:
    end = text.find(". ")
    return text[: end + 1] if 0 < end < 120 else " ".join(text.split()[:8])


def _short(chats: Sequence[Any], count: int) -> list[list[dict[str, Any]]]:
    """The first single-turn chats whose prompt is short enough to read at a glance."""
    turns = [chat.messages for chat in chats]
    return [t for t in turns if len(t) == 2 and len(t[0]["content"]) <= 200][:count]
