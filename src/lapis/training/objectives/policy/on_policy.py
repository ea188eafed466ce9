"""What GRPO, RLOO and PPO share: prompts in order, rollouts by the policy itself, rewards, and the figures to watch.

Replies to all prompts of a step are sampled before its first micro-batch; `updates` steps then learn from them. They
are in the checkpoint until the last of those steps, so a run that is stopped among them goes on exactly. Leaves out:
replies that another engine writes.

Shapes: B replies (those to one prompt are neighbors), R tokens of a reply.
"""

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lapis.errors import ConfigError, TrainingError
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.distributed.parallel import own_parts, sum_over_processes
from lapis.training.objectives.objective import Cursor, DataPlace, Objective, in_order
from lapis.training.objectives.policy.experience import Experience, gather_experience, reference_log_probabilities
from lapis.training.objectives.policy.guards import Guards, guard_figures, step_figures
from lapis.training.objectives.policy.prompts import Prompt, Prompts, Replier, read_prompts
from lapis.training.objectives.policy.rollouts import ReplyScores, Rollouts, score_replies
from lapis.training.objectives.reference import Reference
from lapis.training.rewards import Judge, Scores, make_judge
from lapis.wording import format_count

_SHOWN = 8  # prompts whose replies before and after go into the result
_OF_REPLIES = ("batch", "group", "rewards", "temperature")  # settings that replies are made with


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a step.

    Attributes:
        round: Number of the rollouts that it learns from.
        update: Number of the step among those that learn from them.
        part: Number of the micro-batch in the step.
        parts: Micro-batches of the step.
        rows: Prompts of a micro-batch.
        seed: Of the run.
        prompts: Numbers of all prompts of the step.
    """

    round: int
    update: int
    part: int
    parts: int
    rows: int
    seed: int
    prompts: list[int]


@dataclass(eq=False)
class OnPolicy(Objective):
    """Base class of the policy objectives, with the options of all of them. The batch is counted in prompts.

    Args:
        data: .jsonl with prompt (text or messages), messages or question; or such records.
        rewards: Functions (prompt, reply, record) -> float, or names, or mappings of name (number, json, length,
            language, ends, exact) or path (a reward model's folder, or module:function), with weight and options.
        context: Tokens of prompt and reply.
        group: Replies to a prompt.
        max_tokens: Of a reply.
        temperature: Of sampling, and of what is learned.
        updates: Steps that learn from the same replies.
        epsilon: How far a ratio may fall before it is clipped.
        epsilon_high: How far it may rise; 0 = as far as it may fall.
        kl: Weight of the KL to the reference.
        reference: "start" (the model as the run begins), or the folder of a model that the policy descends from.
        too_long: A prompt without room for max_tokens is refused, or dropped.
        plain: Continue texts as they are, without the chat template.
        reward_seconds: What one reward may take.
        reward_guards: Warn of collapse, reward hacking and KL runaway; or stop; or neither.
        valid: Held-out prompts: the rewards of their likeliest replies are measured.
    """

    tokenizer: Tokenizer
    _: KW_ONLY
    rewards: Any
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
    reward_guards: Literal["warn", "stop", "off"] = "warn"
    valid: Any = None

    compiles = False
    separable = False
    means = frozenset({
        "reward", "kl", "length", "entropy", "clip_share", "ended", "unscored", "rollout_gap", "value_loss",
        "kl_weight", "policy_shift",
    })  # fmt: skip

    def __post_init__(self) -> None:
        self._check_options()
        self.prompts = self._prompts(self.data)
        self.held_out = None if self.valid is None else self._prompts(self.valid)
        self.judge: Judge = make_judge(self.rewards, self.tokenizer, self.reward_seconds)
        for prompts in (self.prompts, *([self.held_out] if self.held_out else [])):
            self.judge.check([(row.record, row.where) for row in prompts.rows])
        self.replier = Replier(self.tokenizer, self.judge, self.max_tokens)
        self.means = self.means | {f"reward_{name}" for name in self.judge.names}
        self.rows = len(self.prompts.rows) * self.updates
        self.notes += self.judge.notes
        if not self.tokenizer.end_ids:
            self.notes.append("the tokenizer names no end token; every reply goes on to max_tokens")
        self.watching = Guards()
        self._reference = Reference(self.reference, self.tokenizer) if self.needs_reference else None
        self._experience: tuple[int, Experience] | None = None
        self._before: list[dict[str, Any]] = []
        self._warned: set[str] = set()
        self._gap = 0.0

    # where the three objectives differ

    @abstractmethod
    def with_advantages(self, model: Transformer, experience: Experience, turn: MicroBatch) -> Experience:
        """The experience with its advantages."""

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model is asked."""
        return self.kl > 0 or self.reference != "start"

    # the hooks of Objective

    def describe(self) -> dict[str, Any]:
        left_out = ("data", "valid", "reward_guards", "reward_seconds")  # told by a digest, or without effect
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        options = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
        counts = {"prompts": len(self.prompts.rows), "dropped_prompts": self.prompts.dropped}
        if self._reference is not None and self._reference.digest:
            options["reference"] = self._reference.digest
        return {
            "objective": self.name,
            "data": self.prompts.digest(),
            "valid": {} if self.held_out is None else {"": self.held_out.digest()},
            "counts": counts,
            "rewards": self.judge.described,
            "tokenizer": self.tokenizer.digest(),
            **options,
        }

    def begin(self, model: Transformer, folder: Path | None = None) -> None:
        if self._reference is not None:
            self._reference.begin(model)
            self.notes += self._reference.notes
        self._model = model
        self._before = self.replier.likeliest(model, self._shown(), self.heard)

    def check_changes(self, changes: Mapping[str, str], cursor: Cursor) -> None:
        """Refuses what replies were made with, where there are steps left that learn from them."""
        fixed = [line for name, line in changes.items() if name in _OF_REPLIES]
        if fixed and (left := self.updates - cursor["update"]) > 0 and cursor["update"]:
            steps = f"{format_count(left, 'more step learns', 'more steps learn')}"
            raise TrainingError(
                f"train: {'; '.join(fixed)}, but {steps} from replies that are there already; undo the change until "
                "the run is past them, or start anew with --fresh"
            )

    def batches(self, state: DataPlace) -> Iterator[tuple[MicroBatch, Cursor]]:
        cursor = state.cursor or {"order": None, "round": 0, "update": 0, "part": 0}
        parts = state.parts
        order, at, update, part = cursor["order"], cursor["round"], cursor["update"], cursor["part"]
        stream = in_order(len(self.prompts.rows), state.rows * parts, order, state.seed)
        while True:
            numbers, _, behind = next(stream)
            while update < self.updates:
                turn = MicroBatch(at, update, part, parts, state.rows, state.seed, numbers)
                part = (part + 1) % parts
                update += part == 0
                now = {"order": order, "round": at, "update": update, "part": part}
                if update == self.updates:
                    now = {"order": behind, "round": at + 1, "update": 0, "part": 0}
                yield turn, now
            order, at, update = behind, at + 1, 0

    def prepare(self, model: Transformer, batch: MicroBatch) -> tuple[MicroBatch, Experience]:
        own = own_parts(batch.parts)
        if batch.update == 0 and batch.part == own[0]:
            experience = self._collect(model, batch, own)
            whole = self.updates > 1  # further steps read it, after a stop perhaps other processes
            self._experience = (batch.round, gather_experience(own, experience) if whole else experience)
        if self._experience is None or self._experience[0] != batch.round:
            raise TrainingError("the replies that this step learns from are lost; start anew with --fresh")
        experience = self._experience[1]
        size, place = batch.rows * self.group, batch.part if self.updates > 1 else own.index(batch.part)
        device = next(model.parameters()).device
        piece = experience.rows(place * size, (place + 1) * size)
        return batch, Experience.of({name: t.to(device) for name, t in piece.tensors().items()})

    def small_batch(self, model: Transformer, state: DataPlace, tokens: int) -> tuple[MicroBatch, Experience]:
        """One group of made-up replies to the first prompt: sampling would take longer than what is measured, and needs
        the other processes."""
        device = next(model.parameters()).device
        size = max(2, min(tokens // self.group, self.context))
        prompt = list(self.prompts.rows[0].ids)[-(size // 2) :]
        ids_BT = torch.tensor([(prompt * size)[:size]] * self.group, device=device)
        reply_BR = ids_BT[:, len(prompt) :]
        rollouts = Rollouts(
            ids_BT=ids_BT,
            prompt_B=torch.full((self.group,), len(prompt), device=device),
            reply_BR=reply_BR,
            mask_BR=torch.ones_like(reply_BR, dtype=torch.bool),
            logprobs_BR=torch.zeros(reply_BR.shape, device=device),
            ended_B=torch.zeros(self.group, dtype=torch.bool, device=device),
        )
        zeros_B = torch.zeros(self.group, device=device)
        experience = Experience(rollouts, zeros_B, advantages=zeros_B)
        if self._reference is not None:
            experience = replace(experience, reference_BR=torch.zeros_like(rollouts.logprobs_BR))
        turn = MicroBatch(round=0, update=1, part=0, parts=1, rows=1, seed=state.seed, prompts=[0])
        return turn, experience

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """Mean reward of the likeliest reply to each held-out prompt, weighted and of each reward, and mean length."""
        if self.held_out is None:
            return {}
        rows = self.held_out.rows
        rollouts = self.replier.reply(model, rows, range(len(rows)), progress=self.heard)
        scores = self.replier.score(self.held_out.rows, rollouts)
        figures = {"reward": _mean(scores.total)}
        if len(scores.parts) > 1:
            figures |= {f"reward_{name}": _mean(values) for name, values in scores.parts.items()}
        return {**figures, "length": rollouts.mask_BR.sum(1).double().mean().item()}

    def sample(self, model: Transformer) -> str:
        """The first reply of the last rollouts, with its reward."""
        if self._experience is None:
            return ""
        rollouts, reward = self._experience[1].rollouts, self._experience[1].rewards_B[0].item()
        prompt = self.tokenizer.decode(rollouts.ids_BT[0, : int(rollouts.prompt_B[0])].tolist(), True)
        reply = self.tokenizer.decode(rollouts.reply_BR[0][rollouts.mask_BR[0]].tolist(), True)
        return f"{prompt[-60:]} -> {reply[:120]} (reward {reward:.2f})"

    def write(self, folder: Path) -> None:
        """replies.jsonl: replies before and after, for people."""
        lines = []
        for old, new in zip(self._before, self.replier.likeliest(self._model, self._shown()), strict=True):
            before = {"before": old["reply"], "before_reward": old["reward"]}
            row = {"prompt": old["prompt"], **before, "after": new["reply"], "after_reward": new["reward"]}
            lines.append(json.dumps(row, ensure_ascii=False))
        (folder / "replies.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def state_tensors(self) -> dict[str, Tensor]:
        """The replies that further steps learn from, and what the guards have seen; by name."""
        tensors: dict[str, Tensor] = {f"guards.{name}": value for name, value in self.watching.tensors().items()}
        if self._experience is not None and self.updates > 1:
            at, experience = self._experience
            tensors["round"] = torch.tensor(at)
            tensors["gap"] = torch.tensor(self._gap, dtype=torch.float64)
            tensors |= {f"experience.{name}": value for name, value in experience.tensors().items()}
        return tensors

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.watching = Guards.of({name[7:]: value for name, value in tensors.items() if name.startswith("guards.")})
        experience = {name[11:]: value for name, value in tensors.items() if name.startswith("experience.")}
        if experience:
            parts = [f"parts.{name}" for name in self.judge.names if f"parts.{name}" in experience]
            experience |= {name: experience.pop(name) for name in parts}  # in the order of the settings
            self._experience = int(tensors["round"]), Experience.of(experience)
            self._gap = float(tensors.get("gap", 0.0))

    # rollouts and rewards

    def _collect(self, model: Transformer, turn: MicroBatch, own: list[int]) -> Experience:
        """Replies to this process's prompts of the step, scored."""
        places = [part * turn.rows + i for part in own for i in range(turn.rows)]
        prompts = [self.prompts.rows[turn.prompts[place]] for place in places]
        draws = hashlib.sha256(f"{turn.seed}/{turn.round}".encode()).digest()
        rollouts = self.replier.reply(model, prompts, places, group=self.group, temperature=self.temperature,
                                     seed=int.from_bytes(draws[:7]))  # fmt: skip
        scores = self.replier.score(prompts, rollouts)
        self._note_failures(scores)
        device = rollouts.ids_BT.device
        rewards_B = torch.tensor(scores.total, dtype=torch.float32, device=device)
        known = sum_over_processes(rewards_B.isfinite().sum().double().reshape(1))
        if not known.item():
            raise TrainingError(f"no reply of the step could be scored: {scores.first_failure}; mend the reward")
        parts = {name: torch.tensor(values, dtype=torch.float32, device=device)
                 for name, values in scores.parts.items()}  # fmt: skip
        experience = Experience(rollouts, rewards_B, parts)
        if self._reference is not None:
            experience = self._with_reference(self._reference, model, experience, turn)
        experience = self.with_advantages(model, experience, turn)
        self._guard(turn, experience)
        return experience

    def _with_reference(
        self, reference: Reference, policy: Transformer, experience: Experience, turn: MicroBatch
    ) -> Experience:
        """The experience with the reference's log-probabilities. Raises ConfigError where the policy, before it has
        learned, is far from a folder."""
        model, as_reference = reference.on(policy)
        with as_reference:
            reference_BR = reference_log_probabilities(model, experience, self.temperature)
        if turn.round == 0 and reference.source != "start":
            rollouts = experience.rollouts
            sum_of_nats = ((rollouts.logprobs_BR - reference_BR) * rollouts.mask_BR).sum().double()
            nats, tokens = sum_over_processes(torch.stack((sum_of_nats, rollouts.mask_BR.sum().double()))).tolist()
            reference.compare(nats / tokens)
        return replace(experience, reference_BR=reference_BR)

    def _note_failures(self, scores: Scores) -> None:
        """A note for the first failure of each reward."""
        for name, why in scores.failures.items():
            if name not in self._warned:
                self._warned.add(name)
                self.notes.append(f"reward {name} failed: {why}; such replies teach nothing and are counted (unscored)")

    def _guard(self, turn: MicroBatch, experience: Experience) -> None:
        for kind, warning in self.watching.see(turn.round, guard_figures(experience)):
            if self.reward_guards == "stop":
                self.halt = warning
            if self.reward_guards != "off" and kind not in self._warned:
                self._warned.add(kind)
                self.notes.append(f"guard: {warning}")

    def _score(self, model: Transformer, experience: Experience, learn_entropy: bool = False) -> ReplyScores:
        return score_replies(model, experience.rollouts, self.temperature, learn_entropy=learn_entropy)

    def figures(
        self, turn: MicroBatch, experience: Experience, scores: ReplyScores, stopped: Tensor
    ) -> dict[str, float]:
        """What is reported. rollout_gap: the largest difference of a token's probability between rollout and training,
        of replies that no step has learned from yet."""
        if turn.update == 0:
            difference_BR = scores.logprobs_BR.detach().exp() - experience.rollouts.logprobs_BR.exp()
            gap = (difference_BR * experience.rollouts.mask_BR).abs().max().item()
            self._compare(gap, torch.is_autocast_enabled(difference_BR.device.type))
        return {**step_figures(experience, scores, stopped), "rollout_gap": self._gap}

    def _compare(self, gap: float, lowered: bool) -> None:
        """Warns of a gap in float32, where rollout and training must agree; with less precision it is only reported."""
        self._gap = gap
        if not lowered and gap > 1e-4 and "gap" not in self._warned:
            self._warned.add("gap")
            self.notes.append(f"rollouts and training differ by {gap:.1e} in a probability; expected 1e-4 or less")

    def _prompts(self, data: Any) -> Prompts:
        room = self.context - self.max_tokens
        return read_prompts(data, self.tokenizer, room, plain=self.plain, too_long=self.too_long)

    def _shown(self) -> list[Prompt]:
        return (self.held_out or self.prompts).rows[:_SHOWN]

    def _check_options(self) -> None:
        for name, fits, expected in (
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
                raise ConfigError(f"{self.name}: {name} is {getattr(self, name)}; expected {expected}")

    @property
    def bounds(self) -> tuple[float, float]:
        """How far a ratio may fall and rise."""
        return self.epsilon, self.epsilon_high or self.epsilon


def _mean(values: list[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
