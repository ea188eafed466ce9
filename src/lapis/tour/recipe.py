"""The story of the tour: build, tune, move, graft, tune again, measure. Each step is a call that a user could make.

    base      pre-trained on English with some of the target language mixed in; in real/ a public model
    chat      base, tuned on English chats
    adapted   base, continued on the target language with some English replayed
    tuned     adapted, tuned on the same English chats: the yardstick
    grafted   adapted + scale x (chat - base): no training step

A step whose folder is there is not done again, so a tour that was stopped goes on. Leaves out: how a score is taken
(measure.py), the page (page.py), and the built-in world (world.py).

Shapes: B rows, T places.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from lapis.checkpoint.commit import commit_file
from lapis.checkpoint.staging import is_made
from lapis.generation.generate import Reply, generate_batch
from lapis.generation.options import Sampling
from lapis.model.load import load
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import documents
from lapis.text.rows.mixture import Draw, draws
from lapis.text.rows.rows import RowBatch
from lapis.text.tokenizer.tokenizer import TURN_END, TURN_START, Tokenizer
from lapis.tour import measure
from lapis.tour.clock import Clock
from lapis.tour.material import ENGLISH, Material
from lapis.tour.page import WHAT
from lapis.tour.setup.copying import write_copying
from lapis.tour.setup.machine import Machine
from lapis.tour.setup.size import CONTEXT, RunSizes, StorySize
from lapis.tour.world import LANGUAGES
from lapis.training.config import GuardOptions, TrainConfig
from lapis.training.loop.loop import train
from lapis.training.objectives.objective import Cursor, DataPlace, Objective
from lapis.training.objectives.supervised.next_token import Causal, Chat
from lapis.training.setup.select import select_parts
from lapis.weights.diff.diff import diff
from lapis.weights.graft.graft import graft

SHOWN = 4  # prompts of each language whose replies stand in the report
ENGLISH_IN_ADAPTED = 0.25  # share of English replayed in what adapted reads
SCALES = (0.5, 1.0, 1.5)


@dataclass
class Story(ABC):
    """A tour on its way: its folder, its material, and the models so far. Base class of those that begin differently.

    Args:
        out: Where the models go.
        seed: Of the weights and of the order of the data.
        size: How much of everything.
        machine: Threads and precision.
        clock: Shows how far the story is.
    """

    out: Path
    seed: int
    size: RunSizes
    machine: Machine
    material: Material
    tokenizer: Tokenizer
    clock: Clock
    models: dict[str, Path] = field(default_factory=dict)

    @abstractmethod
    def make_models(self, chats: Path) -> None:
        """Every model but the grafted one.

        Args:
            chats: English ones, to learn from.
        """

    def tell(self) -> dict[str, Any]:
        """Trains, grafts and measures.

        Returns:
            The findings, as JSON.
        """
        english, target = self.material.languages
        self.make_models(self.material.chats(english, held_out=False))
        choosing, reporting = measure.held_out_halves(self.material, self.size.held_out, self.size.fewest)
        self.clock.begin("sweep", "the graft: trying scales on one half of the held-out material")
        rows = measure.sweep(
            self.models, choosing, self.tokenizer, SCALES, self.size.halvings, self.clock.note, self.clock.at
        )
        scale = measure.choose(rows)
        self.graft(scale)
        scores, replies = self.measured(reporting)
        gaps = {language: _gap(scores, language, "tuned") for language in self.material.languages}
        self.clock.begin("page", "what chat tuning changed, and the page")
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
            "names": {code: LANGUAGES.get(code, code) for code in self.material.languages},
            "tokens": {name: _learned(folder) for name, folder in self.trained.items()},
            "machine": asdict(self.machine),
            "difference": self.difference(),
            "curves": [row for name, folder in self.trained.items() for row in _curve(name, folder)],
            "replies": _replies(reporting, replies),
            "fluent": self.fluent(),
        }

    @property
    def trained(self) -> dict[str, Path]:
        """The models that this tour trained."""
        return {name: folder for name, folder in self.models.items() if folder.parent == self.out and name != "grafted"}

    def open(self, name: str) -> Transformer:
        """One of the models."""
        return load(self.models[name], torch.float32)

    def read(self, name: str, start: Callable[[], Transformer], shares: Mapping[str, float]) -> None:
        """Learns a text that is mixed from both languages, unless that is done.

        Args:
            name: Of the model that comes out.
            start: Gives the model that goes on.
            shares: Of the text, by language.
        """
        if self.is_done(name):
            return
        text = self.mixed(name, shares)
        self.clock.begin(name, f"{name}: {WHAT[name]}")
        torch.manual_seed(self.seed)
        self.train(name, start(), Causal(tokenizer=self.tokenizer, data=[text], context=CONTEXT))

    def adapt(self) -> None:
        """Moves base to the target language, with some English replayed."""
        english, target = self.material.languages
        shares = {target: 1 - ENGLISH_IN_ADAPTED, english: ENGLISH_IN_ADAPTED}
        self.read("adapted", lambda: self.open("base"), shares)

    def chat(self, name: str, start: str, chats: Path) -> None:
        """Learns chats, with some text beside them where the recipe says so, unless that is done.

        Then the embedding stays as it is, but for the rows of the chat template's own tokens: a graft leaves it alone
        as well, and what the blocks learn must not rely on words that moved.
        """
        if self.is_done(name):
            return
        rows_of_text = self.size.recipe.rows_of_text
        beside = [self.mixed("beside", dict.fromkeys(self.material.languages, 0.5))] if rows_of_text else []
        self.clock.begin(name, f"{name}: {WHAT[name]}")
        model = self.open(start)
        objective: Objective = Chat(tokenizer=self.tokenizer, data=[chats], context=CONTEXT)
        if beside:
            select_parts(model, freeze=["embed"], tokens=[TURN_START, TURN_END], tokenizer=self.tokenizer)
            text = Causal(tokenizer=self.tokenizer, data=beside, context=CONTEXT)
            objective = Lessons(
                tokenizer=self.tokenizer, data=[chats], context=CONTEXT, text=text, rows_of_text=rows_of_text
            )
        self.train(name, model, objective)

    def is_done(self, name: str) -> bool:
        """Whether a model is there. It is listed from now on."""
        self.models[name] = self.out / name
        return is_made(self.models[name])

    def train(self, name: str, model: Transformer, objective: Objective) -> None:
        """One run. Its length is a number of tokens, whatever the machine does."""
        config = TrainConfig(
            **self.size.learning(name), seed=self.seed, precision=self.machine.precision, threads=self.machine.threads,
            compile="off", guards=GuardOptions(spike="off"),  # small batches are noisy
        )  # fmt: skip
        train(model, objective, config, self.models[name], watch=self.clock)

    def mixed(self, name: str, shares: Mapping[str, float]) -> Path:
        """A file of text, mixed from the languages."""
        path = self.out / "data" / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            self.clock.begin(f"text for {name}", f"text: {name}")
            with commit_file(path) as temporary:
                self.material.mix(shares, temporary, self.size.characters(name), self.seed, self.clock.at)
        return path

    def graft(self, scale: float) -> None:
        """adapted + scale x (chat - base)."""
        folder = self.models["grafted"] = self.out / "grafted"
        if not is_made(folder):
            self.clock.note(f"grafted: adapted + {scale:g} x (chat - base)")
            graft(self.models["base"], self.models["chat"], self.models["adapted"], folder, scale)

    def measured(
        self, held_out: measure.HeldOutMaterial
    ) -> tuple[dict[str, measure.Scores], dict[str, dict[str, list[Reply | None]]]]:
        """Scores and replies of every model."""
        self.clock.begin("measuring", "measuring every model on the other half of the held-out material")
        scores, replies = {}, {}
        for number, name in enumerate(self.models):

            def tell(share: float, number: int = number, name: str = name) -> None:
                self.clock.at((number + share) / len(self.models), name)

            scores[name], replies[name] = held_out.score_model(self.open(name), self.tokenizer, tell)
        return scores, replies

    def difference(self) -> dict[str, Any]:
        """Direction and magnitude between base and chat, per tensor and per row of the embedding."""
        table = diff(self.models["base"], self.models["chat"], rows=True)
        return {"tensors": table.tensors, "rows": table.rows}

    def fluent(self) -> list[str]:
        """Ten beginnings of held-out English texts, continued by base."""
        texts = documents(self.material.texts(ENGLISH, held_out=True))
        starts = [_first_sentence(text.text) for text, _ in zip(texts, range(10), strict=False)]
        sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=50, seed=self.seed)
        replies = generate_batch(self.open("base"), self.tokenizer, starts, sampling)
        return [f"{start} …{reply.text}" for start, reply in zip(starts, replies, strict=True)]


class StoryFromScratch(Story):
    """The story that begins with random weights."""

    size: StorySize

    def make_models(self, chats: Path) -> None:
        english, target = self.material.languages
        share = self.size.recipe.target_in_base
        self.read("base", self.new_model, {english: 1 - share, target: share})
        self.chat("chat", "base", chats)
        self.adapt()
        self.chat("tuned", "adapted", chats)
        if self.material.yardstick:
            self.chat("yardstick", "adapted", self.material.yardstick)

    def new_model(self) -> Transformer:
        """With random weights, but for the heads that copy."""
        model = Transformer(self.size.model(self.tokenizer.vocab_size))
        write_copying(model)
        return model


def _replies(
    held_out: measure.HeldOutMaterial, replies: Mapping[str, Mapping[str, Sequence[Reply | None]]]
) -> list[dict[str, Any]]:
    """What every chatting model replied to a few prompts of each language that can be read at a glance."""
    names = [name for name in WHAT if name in replies and name != "base"]
    rows = []
    for code, prompts in held_out.prompts.items():
        fit = [i for i, prompt in enumerate(prompts) if len(prompt.messages) == 1 and len(prompt.text) <= 200]
        for i in fit[:SHOWN]:
            given = {name: replies[name][code][i] for name in names}
            rows.append(
                {
                    "prompt": prompts[i].text,
                    "wanted": prompts[i].answer,
                    "language": code,
                    "replies": {name: reply.text if reply else "" for name, reply in given.items()},
                    "right": [name for name, reply in given.items() if prompts[i].right(reply)],
                }
            )
    return rows


def _learned(folder: Path) -> int:
    """Tokens that a run learned."""
    return int(json.loads((folder / "training.json").read_text(encoding="utf-8"))["tokens"])


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


@dataclass(eq=False, kw_only=True)
class Lessons(Chat):
    """Chats, and beside them text.

    A graft adds what tuning changed. What tuning forgot would be added as well; where a few rows of every batch are
    text, little is forgotten.

    Args:
        text: In both languages. It holds no chat.
        rows_of_text: Of each batch.
    """

    separable: ClassVar[bool] = False  # a micro-batch has so many rows of text, however many chats
    text: Causal
    rows_of_text: int

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "text": self.text.describe(), "rows_of_text": self.rows_of_text}

    def batches(self, state: DataPlace) -> Iterator[tuple[Any, Cursor]]:
        place = state.cursor or {"chats": None, "text": None}
        chats = draws(self.examples, state.rows - self.rows_of_text, state.seed, place["chats"])
        texts = draws(self.text.examples, self.rows_of_text, state.seed, place["text"])
        for (chat, after_chat), (text, after_text) in zip(chats, texts, strict=True):
            yield (chat, text), {"chats": after_chat, "text": after_text}

    def prepare(self, model: Transformer, batch: tuple[Draw, Draw] | Draw | RowBatch) -> RowBatch:
        device = next(model.parameters()).device
        parts = [part.to(device) for part in (batch if isinstance(batch, tuple) else (batch,))]
        return RowBatch(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(RowBatch))
        )
