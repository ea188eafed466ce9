"""What to adapt to what: the fields of plan.yaml in, an AdaptPlan out, with how much is trained in tokens.

How much is trained is a number of tokens, so that a run is the same on a busy machine. Minutes are turned into tokens
by `tokens_per_second`, which is measured once and stays in plan.yaml. Leaves out: the flow itself (adapt.py).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

from lapis.config import build
from lapis.errors import ConfigError
from lapis.language.replay import SELF
from lapis.language.rows.init import Init
from lapis.wording import format_count

PLAN = "plan.yaml"
EVALUATIONS = 10  # of a training on the way, unless train says otherwise
BYTES = 4  # of a token, about
# settings of a training -> what says them here; the rest of `train` goes to both trainings as it is
_SETTLED = {
    "objective": "causal", "model": "base", "new": "base", "data": "text and replay", "valid": "text and replay",
    "field": "text and replay", "tokenizer": "vocab", "out": "out", "steps": "tokens", "epochs": "tokens",
    "minutes": "minutes", "batch": "batch", "context": "context", "lr": "lr and rows_lr", "ema": "ema", "seed": "seed",
    "limits": "cost", "freeze": "old_rows", "tokens": "old_rows", "share_rows": "old_rows",
    "rates": "lr, rows_lr and old_rows",
}  # fmt: skip


@dataclass(frozen=True)
class AdaptPlan:
    """What to adapt to what. Every field is a key of plan.yaml.

    Args:
        base: The model to start from.
        text: Files, folders and globs of the language.
        out: The folder of the steps.
        replay: Text of what the model is not to lose; "self" has the model draw it.
        chat: The chat version of base, whose ability to chat is grafted on.
        onto: What is trained: "base", onto which chat is grafted then, or "chat" itself, which then gets back what it
            lost (ElChat, Yamaguchi et al., arXiv:2412.11704).
        chats: Chats of the language, to measure replies on.
        replay_chats: Chats of what the model knew.
        choices: Questions of multiple choice in the language: jsonl, JSON or parquet, or task files of
            lm-evaluation-harness.
        replay_choices: The same in what the model knew.
        vocab: New tokens; "auto" takes the recommendation of the first step, 0 adds none.
        init: How new rows begin (`lapis tokenizer extend --init`).
        language: A code such as "ms", for the model card.
        license: For the model card; by default what base states of itself.
        tokens: That are trained on, both trainings together.
        minutes: In place of tokens: as many as `tokens_per_second` gives in this time.
        tokens_per_second: That this machine trains; measured where it is not given, and kept in plan.yaml.
        embedded: The share of the tokens on which new rows are trained alone.
        replay_share: The share of replay in what is read while everything is trained.
        lr: Peak learning rate while everything is trained.
        rows_lr: Peak learning rate of new rows, in both trainings.
        old_rows: Whether rows of old tokens are trained, too, where there are new ones; then all have `lr`.
        ema: Decay of a running average of the weights while everything is trained, which is then the result; 0 = none.
        merge_back: The share of the weights that everything was trained from, mixed into the result; by default none,
            and half where the chat model itself is trained.
        calibrate_again: Whether new tokens become as likely again as they are frequent, once everything is trained;
            where rows began so (init: calibrated).
        context: Tokens of a row.
        batch: Rows of a step.
        train: More settings of both trainings (`lapis train`), such as {warmup: 20, precision: float32}. accumulate is
            chosen by the free memory where it is not given, and kept in plan.yaml.
        scale: Of the graft: a number, what `lapis graft --scale` takes, or "plan", which learns one for each component
            (`lapis plan --onto`) on replies of chat to text of the language. Where nothing is grafted it stays 1.
        cost: By which share bits per byte of the replay text may rise: training ends where they rise more, and what the
            result costs beyond it is told.
        scored: Bytes of held-out text of each language that models are measured on.
        card: Whether every model is measured at the end; `lapis card` does it later.
        seed: Of everything; of the training that follows another, a million more.
    """

    base: str
    text: tuple[str, ...]
    out: str
    replay: tuple[str, ...] = ()
    chat: str | None = None
    onto: Literal["base", "chat"] = "base"
    chats: tuple[str, ...] = ()
    replay_chats: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    replay_choices: tuple[str, ...] = ()
    vocab: Literal["auto"] | int = "auto"
    init: Init | None = "calibrated"
    language: str = ""
    license: str = ""
    tokens: int = 1_000_000
    minutes: float | None = None
    tokens_per_second: float | None = None
    embedded: float = 0.2
    replay_share: float = 0.1
    lr: float = 1e-4
    rows_lr: float = 1e-3
    old_rows: bool = False
    ema: float = 0.0
    merge_back: float | None = None
    calibrate_again: bool = True
    context: int = 512
    batch: int = 16
    train: dict[str, Any] = field(default_factory=dict)
    scale: float | str = 1.0
    cost: float = 0.03
    scored: int = 40_000
    card: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("adapt: text is missing; give files of the language")
        for name in ("embedded", "replay_share", "ema", "merge_back"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ConfigError(f"adapt: {name} is {getattr(self, name)}; it is a share, from 0 to below 1")
        if isinstance(self.vocab, int) and self.vocab < 0:
            raise ConfigError(f"adapt: vocab is {self.vocab}; give auto, 0 for no new tokens, or their number")
        for name in ("tokens", "minutes", "tokens_per_second", "batch", "context", "lr", "rows_lr", "scored"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"adapt: {name} is {value:g}; it must be above 0")
        if self.context < 2:
            raise ConfigError(f"adapt: context is {self.context}; give 2 tokens or more")
        if SELF in self.replay and len(self.replay) > 1:
            raise ConfigError(
                f"adapt: replay is {', '.join(self.replay)}; give self alone, which has the model draw it, or files"
            )
        if self.chat is None and (self.onto == "chat" or self.scale == "plan"):
            raise ConfigError("adapt: chat is missing; onto: chat and scale: plan need the chat version of base")
        if not self.grafts and self.scale not in (1, "1", "1.0"):
            what, other = ("onto: chat", "onto: base") if self.chat else ("a plan without chat", "chat")
            raise ConfigError(
                f"adapt: scale is {self.scale}, and {what} grafts nothing; leave scale out, or give {other}"
            )
        if self.cost < 0:
            raise ConfigError(f"adapt: cost is {self.cost:g}; it is a share, from 0 on")
        for name in self.train:
            if name in _SETTLED:
                raise ConfigError(f"adapt: train: {name} is settled by {_SETTLED[name]} of the plan; give that")

    @property
    def source(self) -> str:
        """The model that is trained."""
        return self.chat if self.onto == "chat" and self.chat is not None else self.base

    @property
    def merged_back(self) -> float:
        """`merge_back`, or what it is by default."""
        return (0.5 if self.onto == "chat" else 0.0) if self.merge_back is None else self.merge_back

    @property
    def calibrates(self) -> bool:
        """Whether new rows are calibrated once more after the training."""
        return self.calibrate_again and self.init == "calibrated"

    @property
    def grafts(self) -> bool:
        """Whether the difference of chat and base is added."""
        return self.chat is not None and self.onto == "base"

    @property
    def draws_replay(self) -> bool:
        """Whether the model writes the replay text itself."""
        return self.replay == (SELF,)

    @property
    def texts(self) -> dict[str, tuple[str, ...]]:
        """The files of text and of replay, where they are given."""
        given = {"text": self.text, "replay": () if self.draws_replay else self.replay}
        return {name: paths for name, paths in given.items() if paths}

    @property
    def trained_tokens(self) -> int:
        """How many tokens both trainings read."""
        if self.minutes is None or self.tokens_per_second is None:
            return self.tokens
        return max(1, int(self.minutes * 60 * self.tokens_per_second))

    @property
    def drawn_tokens(self) -> int:
        """How many tokens of replay the model draws itself: as many as are read, and held-out ones."""
        return int(self.replay_share * self.trained_tokens + self.scored / BYTES)

    def eval_every(self, steps: int) -> int:
        """Steps between the evaluations of a training of so many; 0 where there is one at its end alone."""
        every = self.train.get("eval_every")
        return every if isinstance(every, int) and every >= 0 else max(1, steps // EVALUATIONS)

    def tokens_of(self, *shares: float) -> int:
        """How many tokens trainings read, in whole steps, that are to read these shares of them."""
        return sum(self.steps(share, self.context) for share in shares) * self.batch * self.context

    def time_of(self, *shares: float) -> str:
        """About how long trainings take that read these shares of the tokens; "" where nobody has measured.

        Evaluations count: each reads the held-out text, and a token that is read costs a third of one that is trained.
        """
        if self.tokens_per_second is None:
            return ""
        tokens: float = self.tokens_of(*shares)
        for share in shares:
            steps = self.steps(share, self.context)
            every = self.eval_every(steps)
            times = ceil(steps / every) + bool(self.replay) if every else 1  # with replay one of the start, too
            tokens += times * self.scored / BYTES * (2 if self.replay else 1) / 3
        minutes = round(tokens / self.tokens_per_second / 60)
        length = f"about {format_count(minutes, 'minute')}" if minutes else "less than a minute"
        return f"{length} at {self.tokens_per_second:,.0f} tokens a second, evaluations included"

    @property
    def step_names(self) -> list[str]:
        """The steps, as far as they are known before the first one is done."""
        names = ["measure", *(["replay"] if self.draws_replay else [])]
        names += [*(["tokenizer", "start", *(["embedded"] if self.embedded else [])] if self.vocab else [])]
        names += ["adapted", *(["merged"] if self.merged_back else [])]
        names += ["calibrated"] if self.vocab and self.calibrates else []
        names += ["restored"] if self.onto == "chat" else []
        names += ["worded", "planned"] if self.grafts and self.scale == "plan" else []
        names += ["grafted"] if self.grafts else []
        return [*names, *(["card"] if self.card else [])]

    def steps(self, share: float, context: int) -> int:
        """Steps of a training that reads a share of the tokens, in rows of `context` tokens."""
        return max(1, round(self.trained_tokens * share / (self.batch * context)))


def whole_path(place: str) -> str:
    """A path from the root, where something is there; a name of the hub, or a text that is no path, as it is."""
    return os.path.abspath(place) if os.path.exists(place) else place


def read_plan(settings: Mapping[str, Any], where: str = "adapt") -> AdaptPlan:
    """A plan from the mapping of a file.

    Args:
        settings: Its keys; lists may be given as one text.
        where: Named in errors.

    Raises:
        ConfigError: For an unknown key, or a value of another type.
    """
    return build(AdaptPlan, settings, where)
