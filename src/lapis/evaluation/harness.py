"""lm-evaluation-harness on a lapis model: its tasks, its prompts and its metrics, our forward pass.

    run_tasks(model, tokenizer, ["arc_easy", "hellaswag"])               -> {task: {metric: value}}
    import lapis.evaluation.harness                                        # then lm_eval knows "lapis"
    lm_eval.simple_evaluate("lapis", model_args="pretrained=runs/chat", tasks=["arc_easy"])

Needs lm-eval (`lapis[eval]`), which nothing else of lapis imports. Scores are those that it gives for the same folder
with its own "hf" model. A task file may name Python that lm-eval runs: give folders that you trust.
Leaves out: pictures, more than one process, models that are not causal.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import open_checkpoint
from lapis.errors import ConfigError, DataError, MissingExtra
from lapis.generation.generate import generate_batch
from lapis.generation.options import Sampling
from lapis.model.reading.load import load_readable
from lapis.model.reading.readable import ReadableModel
from lapis.model.scoring import Precision, Progress, ScoredSequence, likelihoods
from lapis.text.chat.chat import render
from lapis.text.tokenizer.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows
except ImportError:
    raise MissingExtra("lm-evaluation-harness: lm-eval", "eval") from None


@register_model("lapis")
class LapisLM(TemplateLM):  # type: ignore[misc]
    """A causal lapis model as lm-eval's LM.

    pretrained: a folder, or a model with its tokenizer. max_length: tokens at once, by default the model's context.
    batch_size: replies generated at once. precision: as in `lapis.model.scoring.nll`. progress: called with how many
    tokens or replies of a task are done, and of how many.
    """

    def __init__(
        self,
        pretrained: str | Path | ReadableModel,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        precision: Precision | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, ReadableModel):
            if tokenizer is None:
                raise ConfigError("eval: a model is given without its tokenizer")
            self.model, self.text = pretrained, tokenizer
        else:
            kind = None if dtype in (None, "auto") else getattr(torch, str(dtype), None)
            if dtype not in (None, "auto") and not isinstance(kind, torch.dtype):
                raise ConfigError(f'eval: dtype is "{dtype}"; give float32, bfloat16 or float16')
            self.model = load_readable(open_checkpoint(pretrained, adapters=True), kind, device or "cpu")
            self.text = tokenizer or Tokenizer.open(pretrained)
        config = self.model.config
        if config.head != "lm" or not config.causal:
            raise ConfigError(f"eval: a {config.family} model with the head {config.head} does not continue text")
        self.max_length = min(max_length or config.context, config.context)
        self.max_gen_toks, self.precision, self.progress = max_gen_toks, precision, progress
        self.batch_size = batch_size if isinstance(batch_size, int) else max_batch_size or 32
        self._device = self.model.device
        self._templated = False

    @property
    def eot_token_id(self) -> int | None:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no other context."""
        prefix = self.text.bos_id if self.text.bos_id is not None else self.text.eos_id
        if prefix is None:
            raise DataError(f"{self.text.source}: has no token that a document begins with (eos_token or bos_token)")
        return prefix

    @property
    def tokenizer_name(self) -> str:
        return self.text.digest()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids; with what the tokenizer puts before a text, unless add_special_tokens says otherwise or it is there.

        Text that spells a special token is plain text, but for what the chat template wrote.
        """
        bos = self.text.named.get("bos_token")
        has_bos = self._templated and bos is not None and string.startswith(bos)
        around = not has_bos if add_special_tokens is None else add_special_tokens
        return self.text.encode(string, special=self._templated, add_special_tokens=around)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            first = max(1, len(ids) - len(continuation))
            sequences.append(ScoredSequence(ids, [place >= first for place in range(len(ids))]))
        scores = likelihoods(self.model, sequences, precision=self.precision, progress=self.progress)
        return [(-nats, greedy) for nats, greedy in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in the windows that lm-eval itself makes."""
        windows: list[ScoredSequence] = []
        counts: list[int] = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            before = len(windows)
            for seen, scored in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                whole = [*seen, scored[-1]]
                first = len(whole) - len(scored)
                windows.append(ScoredSequence(whole, [place >= first for place in range(len(whole))]))
            counts.append(len(windows) - before)
        scores = iter(likelihoods(self.model, windows, precision=self.precision, progress=self.progress))
        return [-sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Replies up to a stop text; those that ask for the same options share batches."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            sampling = self._sampling(requests[numbers[0]].args[1])
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise ConfigError(f"eval: a task asks for {sampling.max_tokens} new tokens; the model's context is "
                                  f"{self.max_length}, give max_gen_toks")  # fmt: skip
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            replies = generate_batch(self.model, self.text, prompts, sampling, batch_size=self.batch_size)
            for number, reply in zip(numbers, replies, strict=True):
                texts[number] = reply.text
        return texts

    def _sampling(self, request: Mapping[str, Any]) -> Sampling:
        until = request.get("until") or []
        length = next((request[name] for name in _LENGTHS if request.get(name) is not None), self.max_gen_toks)
        return Sampling(
            temperature=float(request.get("temperature") or 0.0) if request.get("do_sample", True) else 0.0,
            top_p=float(request.get("top_p") or 1.0),
            top_k=int(request.get("top_k") or 0),
            max_tokens=int(length),
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            seed=0,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._templated = True
        return render(self.text, chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text.chat_template if chat_template else None


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def run_tasks(
    model: ReadableModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of lm-eval's tasks, or of the task files in `folder`.

    fewshot: examples before each question (None = as the task says). limit: questions of each task. chat: ask through
    the chat template. Raises ConfigError for a task that is not known.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        from lapis.config import nearest

        raise ConfigError(f'eval: there is no task "{unknown[0]}"; {nearest(unknown[0], manager.all_tasks)[:300]}')
    results = simple_evaluate(
        LapisLM(model, tokenizer, precision=precision, progress=progress),
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert results is not None
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def mark_tasks(
    model: ReadableModel, tokenizer: Tokenizer, file: Path, *, progress: Progress | None = None
) -> list[bool]:
    """Of each question of a task file's multiple choice whether the model's answer is right (lm-eval's acc).

    Args:
        model: Whose answers.
        tokenizer: Of the model.
        file: A task of lm-eval, as YAML. What it includes lies beside it.
        progress: Called with how many tokens are done, and of how many.

    Raises:
        ConfigError: For a file that names no task, or a task without accuracy.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    name = task_name(file)
    results = simple_evaluate(
        LapisLM(model, tokenizer, progress=progress),
        tasks=[name],
        task_manager=TaskManager(include_path=str(file.parent), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    samples = results["samples"][name]
    if not samples or any("acc" not in sample for sample in samples):
        raise ConfigError(f"{file}: the task {name} has no acc; give a task of multiple choice")
    return [bool(sample["acc"]) for sample in samples]


def task_name(file: Path) -> str:
    """The task that a file of lm-eval defines. Raises ConfigError where it names none."""
    names = re.findall(r"^task:\s*['\"]?([\w.-]+)['\"]?\s*$", file.read_text(encoding="utf-8"), re.MULTILINE)
    if len(names) != 1:
        raise ConfigError(f"{file}: names no task; give a task file of lm-evaluation-harness, with one line task: NAME")
    return str(names[0])


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics without the filter's name where it is the usual one, "none"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "sample_len"
    }
