"""What GRPO, RLOO and PPO share: prompts in order, rollouts by the policy itself, rewards, and the figures to watch.

A step's prompts are replied to at once, before its first micro-batch; `updates` steps then learn from these replies.
The replies lie in the checkpoint until the last of those steps, so a run that is stopped among them goes on exactly.
Leaves out: advantages and losses (policy.py), replies that another engine writes.

Shapes: B replies (the group of each prompt stands together), R tokens of a reply.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lapis.errors import ConfigError, TrainingError
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.distributed.ranks import added, everybodys, mine
from lapis.training.loop.state import TrainState
from lapis.training.objectives.order import in_order
from lapis.training.objectives.policy.experience import Experience
from lapis.training.objectives.policy.figures import guard_figures, step_figures
from lapis.training.objectives.policy.guards import Guards
from lapis.training.objectives.policy.prompts import Prompt, Prompts, read_prompts
from lapis.training.objectives.policy.reference import Reference
from lapis.training.objectives.policy.replies import Replier
from lapis.training.objectives.policy.rollouts import Said, read_again
from lapis.training.rewards import Judge, Scores, make_judge

_SHOWN = 8  # prompts whose replies before and after are kept for people


@dataclass(frozen=True)
class Turn:
    """One micro-batch: which rollouts (round), which of the steps that learn from them (update), which part of the
    step, and the numbers of all prompts of the step."""

    round: int
    update: int
    part: int
    parts: int
    rows: int
    seed: int
    prompts: list[int]


@dataclass(eq=False)
class OnPolicy(ABC):
    """The options of every policy objective.

    data: .jsonl with prompt (text or messages), messages or question; or such records. batch is counted in prompts.
    rewards: functions (prompt, reply, record) -> float, or names, or mappings of name (number, json, length, language,
    ends, exact) or path (a reward model's folder, or module:function), with weight and options. context: tokens of
    prompt and reply. group: replies to a prompt. max_tokens: of a reply. temperature: of what is drawn and of what is
    learned. updates: steps that learn from the same replies. epsilon, epsilon_high: how far a ratio goes before it is
    clipped, down and up (0 = as down). kl: weight of the KL to the reference. reference: "start" (the model as it was
    handed over), or a folder. too_long: what a prompt without room for max_tokens gets. plain: continue texts as they
    are, without the chat template. reward_seconds: what one reward may take. guards: of collapse, reward hacking and
    KL runaway. valid: held-out prompts.
    """

    tokenizer: Tokenizer
    data: Any
    _: KW_ONLY
    rewards: Any
    context: int = 512
    group: int = 8
    max_tokens: int = 128
    temperature: float = 1.0
    updates: int = 1
    epsilon: float = 0.2
    epsilon_high: float = 0.0
    kl: float = 0.0
    reference: str = "start"
    too_long: Literal["refuse", "drop"] = "refuse"
    plain: bool = False
    reward_seconds: float = 5.0
    guards: Literal["warn", "stop", "off"] = "warn"
    valid: Any = None

    name = ""
    head = "language"
    compiles = False
    means = frozenset({
        "reward", "kl", "length", "entropy", "clip_share", "ended", "unscored", "rollout_gap", "value_loss",
        "kl_weight", "policy_shift",
    })  # fmt: skip

    def __post_init__(self) -> None:
        self._check()
        self.prompts = self._prompts(self.data)
        self.held = None if self.valid is None else self._prompts(self.valid)
        self.judge: Judge = make_judge(self.rewards, self.tokenizer, self.reward_seconds)
        for prompts in (self.prompts, *([self.held] if self.held else [])):
            self.judge.check([(row.record, row.where) for row in prompts.rows])
        self.replier = Replier(self.tokenizer, self.judge, self.max_tokens)
        self.means = self.means | {f"reward_{name}" for name in self.judge.names}
        self.rows = len(self.prompts.rows) * self.updates
        self.notes: list[str] = list(self.judge.notes)
        if not self.tokenizer.end_ids:
            self.notes.append("the tokenizer names no end token; every reply goes on to max_tokens")
        self.halt = ""
        self.watching = Guards()
        self._reference = Reference(self.reference, self.tokenizer) if self.needs_reference else None
        self._experience: tuple[int, Experience] | None = None
        self._before: list[dict[str, Any]] = []
        self._told: set[str] = set()
        self._gap = 0.0

    # what the three objectives differ in

    @abstractmethod
    def loss(self, model: Transformer, batch: Any) -> tuple[Tensor, int, dict[str, float]]:
        """See the protocol."""

    @abstractmethod
    def value(self, model: Transformer, experience: Experience, turn: Turn) -> Experience:
        """The experience with its advantages."""

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0 or self.reference != "start"

    @property
    def extra(self) -> nn.Module | None:
        """What is trained beside the model."""
        return None

    # the protocol

    def describe(self) -> dict[str, Any]:
        idle = ("data", "valid", "guards", "reward_seconds")  # the weights do not depend on them
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}
        told = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
        counts = {"prompts": len(self.prompts.rows), "dropped_prompts": self.prompts.dropped}
        if self._reference is not None and self._reference.digest:
            told["reference"] = self._reference.digest
        return {
            "objective": self.name,
            "data": self.prompts.digest(),
            "counts": counts,
            "rewards": self.judge.described,
            "tokenizer": self.tokenizer.digest(),
            **told,
        }

    def begin(self, model: Transformer, folder: Path | None = None) -> None:
        """Told once, of the model as it is handed over, before a run that was interrupted is put back."""
        if self._reference is not None:
            self._reference.begin(model)
            self.notes += self._reference.notes
        self._model = model
        self._before = self.replier.likeliest(model, self._shown())

    def batches(self, state: TrainState) -> Iterator[tuple[Turn, dict[str, Any]]]:
        cursor = state.cursor or {"order": None, "round": 0, "update": 0, "part": 0}
        parts = state.parts
        order, at, update, part = cursor["order"], cursor["round"], cursor["update"], cursor["part"]
        stream = in_order(len(self.prompts.rows), state.rows * parts, order, state.seed)
        while True:
            numbers, _, behind = next(stream)
            while update < self.updates:
                turn = Turn(at, update, part, parts, state.rows, state.seed, numbers)
                part = (part + 1) % parts
                update += part == 0
                now = {"order": order, "round": at, "update": update, "part": part}
                if update == self.updates:
                    now = {"order": behind, "round": at + 1, "update": 0, "part": 0}
                yield turn, now
            order, at, update = behind, at + 1, 0

    def prepare(self, model: Transformer, batch: Turn) -> tuple[Turn, Experience]:
        own = mine(batch.parts)
        if batch.update == 0 and batch.part == own[0]:
            experience = self._collect(model, batch, own)
            whole = self.updates > 1  # further steps read it, after a stop perhaps other processes
            self._experience = (batch.round, everybodys(own, experience) if whole else experience)
        if self._experience is None or self._experience[0] != batch.round:
            raise TrainingError("the replies that this step learns from are lost; start anew with --fresh")
        experience = self._experience[1]
        size, place = batch.rows * self.group, batch.part if self.updates > 1 else own.index(batch.part)
        device = next(model.parameters()).device
        piece = experience.rows(place * size, (place + 1) * size)
        return batch, Experience.of({name: t.to(device) for name, t in piece.tensors().items()})

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Mean reward of the likeliest reply to each held-out prompt, in all and of each reward."""
        if self.held is None:
            return {}
        rollouts = self.replier.roll(model, self.held.rows, range(len(self.held.rows)))
        scores = self.replier.score(self.held.rows, rollouts)
        found = {"reward": _mean(scores.total)}
        if len(scores.parts) > 1:
            found |= {f"reward_{name}": _mean(values) for name, values in scores.parts.items()}
        return {**found, "length": rollouts.mask_BR.sum(1).double().mean().item()}

    def sample(self, model: Transformer) -> str:
        """The first reply of the last rollouts, with its reward."""
        if self._experience is None:
            return ""
        rollouts, reward = self._experience[1].rollouts, self._experience[1].rewards_B[0].item()
        asked = self.tokenizer.decode(rollouts.ids_BT[0, : int(rollouts.prompt_B[0])].tolist(), True)
        said = self.tokenizer.decode(rollouts.reply_BR[0][rollouts.mask_BR[0]].tolist(), True)
        return f"{asked[-60:]} -> {said[:120]} (reward {reward:.2f})"

    def write(self, folder: Path) -> None:
        """replies.jsonl: what was said before and after, for people."""
        lines = []
        for old, new in zip(self._before, self.replier.likeliest(self._model, self._shown()), strict=True):
            said = {"before": old["reply"], "before_reward": old["reward"], "after": new["reply"]}
            row = {"prompt": old["prompt"], **said, "after_reward": new["reward"]}
            lines.append(json.dumps(row, ensure_ascii=False))
        (folder / "replies.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    # what a checkpoint holds beside the model

    def state_tensors(self) -> dict[str, Tensor]:
        """The replies that further steps learn from, and what the guards have seen; by name."""
        held: dict[str, Tensor] = {f"guards.{name}": value for name, value in self.watching.tensors().items()}
        if self._experience is not None and self.updates > 1:
            at, experience = self._experience
            held["round"] = torch.tensor(at)
            held |= {f"experience.{name}": value for name, value in experience.tensors().items()}
        return held

    def restore_tensors(self, held: dict[str, Tensor]) -> None:
        """The reverse of `state_tensors`."""
        self.watching = Guards.of({name[7:]: value for name, value in held.items() if name.startswith("guards.")})
        experience = {name[11:]: value for name, value in held.items() if name.startswith("experience.")}
        if experience:
            self._experience = int(held["round"]), Experience.of(experience)

    # rollouts and rewards

    def _collect(self, model: Transformer, turn: Turn, own: list[int]) -> Experience:
        """Replies to this process's prompts of the step, scored."""
        places = [part * turn.rows + i for part in own for i in range(turn.rows)]
        prompts = [self.prompts.rows[turn.prompts[place]] for place in places]
        draws = hashlib.sha256(f"{turn.seed}/{turn.round}".encode()).digest()
        rollouts = self.replier.roll(model, prompts, places, group=self.group, temperature=self.temperature,
                                     seed=int.from_bytes(draws[:7]))  # fmt: skip
        scores = self.replier.score(prompts, rollouts)
        self._tell(scores)
        device = rollouts.ids_BT.device
        rewards_B = torch.tensor(scores.total, dtype=torch.float32, device=device)
        known = added(rewards_B.isfinite().sum().double().reshape(1))
        if not known.item():
            raise TrainingError(f"no reply of the step could be scored: {scores.first_failure}; mend the reward")
        parts = {name: torch.tensor(values, dtype=torch.float32, device=device)
                 for name, values in scores.parts.items()}  # fmt: skip
        experience = Experience(rollouts, rewards_B, parts)
        if self._reference is not None:
            experience = self._reference.read(model, experience, self.temperature)
        experience = self.value(model, experience, turn)
        self._guard(turn, experience)
        return experience

    def _tell(self, scores: Scores) -> None:
        """A note for the first failure of each reward."""
        for name, why in scores.failures.items():
            if name not in self._told:
                self._told.add(name)
                self.notes.append(f"reward {name} failed: {why}; such replies teach nothing and are counted (unscored)")

    def _guard(self, turn: Turn, experience: Experience) -> None:
        for kind, warning in self.watching.see(turn.round, guard_figures(experience)):
            if self.guards == "stop":
                self.halt = warning
            if self.guards != "off" and kind not in self._told:
                self._told.add(kind)
                self.notes.append(f"guard: {warning}")

    def _read(self, model: Transformer, experience: Experience, learn_entropy: bool = False) -> Said:
        r = experience.rollouts
        rows = (r.ids_BT, r.prompt_B, r.reply_BR, r.mask_BR)
        return read_again(model, *rows, self.temperature, learn_entropy=learn_entropy)

    def figures(self, turn: Turn, experience: Experience, said: Said, stopped: Tensor) -> dict[str, float]:
        """What is reported. rollout_gap: the largest difference of a token's probability in the rollout and in
        training, of replies that no step has learned from yet."""
        if turn.update == 0:
            difference_BR = said.logprobs_BR.detach().exp() - experience.rollouts.logprobs_BR.exp()
            gap = (difference_BR * experience.rollouts.mask_BR).abs().max().item()
            self._compare(gap, torch.is_autocast_enabled(difference_BR.device.type))
        return {**step_figures(experience, said, stopped), "rollout_gap": self._gap}

    def _compare(self, gap: float, lowered: bool) -> None:
        """Rollout and training must say the same in float32; where a part is computed in less, the gap is only told."""
        self._gap = gap
        if not lowered and gap > 1e-4 and "gap" not in self._told:
            self._told.add("gap")
            self.notes.append(f"rollouts and training differ by {gap:.1e} in a probability; expected 1e-4 or less")

    def _prompts(self, data: Any) -> Prompts:
        room = self.context - self.max_tokens
        return read_prompts(data, self.tokenizer, room, plain=self.plain, too_long=self.too_long)

    def _shown(self) -> list[Prompt]:
        return (self.held or self.prompts).rows[:_SHOWN]

    def _check(self) -> None:
        for name, fits, wanted in (
            ("group", self.group >= 1, "1 or more"),
            ("max_tokens", 1 <= self.max_tokens < self.context, "1 or more, and less than context"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("updates", self.updates >= 1, "1 or more"),
            ("epsilon", 0 < self.epsilon < 1, "between 0 and 1"),
            ("epsilon_high", self.epsilon_high >= 0, "0 (as epsilon) or more"),
            ("kl", self.kl >= 0, "0 or more"),
            ("reward_seconds", self.reward_seconds > 0, "above 0"),
        ):
            if not fits:
                raise ConfigError(f"{self.name}: {name} is {getattr(self, name)}; expected {wanted}")

    @property
    def bounds(self) -> tuple[float, float]:
        return self.epsilon, self.epsilon_high or self.epsilon


def _mean(values: list[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
