"""`lapis generate`: continue a prompt, or answer it in the model's chat template."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lapis.generation.options import DecodingRuntime, Sampling
from lapis.inside.compared.options import SteerOptions
from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.inside.compared.vectors import DifferenceVectors


def generate(
    model: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    chat: bool = False,
    system: str = "",
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),  # noqa: B008
    steering: Annotated[SteerOptions, Parameter(name="*")] = SteerOptions(),  # noqa: B008
    runtime: Annotated[DecodingRuntime, Parameter(name="*")] = DecodingRuntime(),  # noqa: B008
    json: bool = False,
) -> None:
    """Continue a prompt with a model, or answer it.

    Args:
        model: A model folder.
        prompt: The text to continue; "-" reads it from standard input. What spells a special token is plain text.
        chat: Answer the prompt in the model's chat template.
        system: The system's message, with --chat.
        json: Print one JSON object.
    """
    from lapis.cli.output import line, progress, show, stderr
    from lapis.errors import ConfigError

    if system and not chat:
        raise ConfigError("generate: --system is for --chat; plain text has no system message")
    if prompt == "-":
        prompt = sys.stdin.read()
    start = time.perf_counter()
    with progress(f"reading {model}"):
        from lapis.generation.generate import Prompt, stream
        from lapis.generation.ready import choose_device, open_ready
        from lapis.generation.text import for_terminal
        from lapis.model.threads import settle_threads

        settle_threads(choose_device(runtime.device))
        vectors = None if steering.steer is None else _vectors(steering.steer)
        opened, tokenizer = open_ready(model, runtime)
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
    request: Prompt = turns if chat else prompt
    live, shown = not json, for_terminal if sys.stdout.isatty() else str
    loaded = time.perf_counter()
    first = 0.0
    notes = list(opened.notes)
    with ExitStack() as stack:
        if vectors is not None:
            from lapis.inside.compared.vectors import steer

            strength = 1.0 if steering.strength is None else steering.strength
            notes.append(stack.enter_context(steer(opened, vectors, steering.layer, strength, steering.place)))
        pieces = stream(opened, tokenizer, request, sampling)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                reply = end.value
                break
            first = first or time.perf_counter()
            if live:
                sys.stdout.write(shown(piece))
                sys.stdout.flush()
    done = time.perf_counter()
    if not reply.text:
        remedy = "; --chat asks it in its chat template" if tokenizer.chat_template and not chat else ""
        notes.append(
            f"the reply is empty: {ENDS[reply.stop_reason]} after {format_count(len(reply.ids), 'new token')}{remedy}"
        )
    result = {
        "model": model,
        "prompt": prompt,
        "text": reply.text,
        "ids": list(reply.ids),
        "stop_reason": reply.stop_reason,
        "prompt_tokens": reply.prompt_tokens,
        "tokens": len(reply.ids),
        "load_seconds": loaded - start,
        "first_text_seconds": (first or done) - start,
        "seconds": done - start,
        "tokens_per_second": len(reply.ids) / (done - loaded),
        "notes": notes,
    }

    def render() -> None:
        sys.stdout.write("\n")
        if stderr.is_terminal:
            speed = f"{format_count(result['tokens'], 'token')}, {result['tokens_per_second']:.1f} a second"
            speed += f", {ENDS[reply.stop_reason]}"
            line(speed, "dim", error=True)

    show(result, json, render)
    for note in notes:
        line(f"note: {note}", "dim", error=True)


def _vectors(path: Path) -> "DifferenceVectors":
    from lapis.inside.compared.vectors import DifferenceVectors

    return DifferenceVectors.open(path)


ENDS = {"end": "complete", "stop": "ended at a stop text", "length": "cut short", "stopped": "stopped"}
