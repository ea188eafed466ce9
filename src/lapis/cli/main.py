"""`lapis`: the table of commands, and how errors end.

A command's module is imported when the command is run, so `lapis --help` is quick and imports no torch. Exit status:
0 = done, 1 = a refusal (one line), 2 = wrong usage, 130 = stopped by Ctrl-C, 143 = by SIGTERM. Errors of the system
(system_errors.py, streams.py) are refusals too; only a bug shows a traceback.
"""

import atexit
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from cyclopts import UNSET, App, ArgumentCollection, CycloptsError, Group, Parameter

from lapis import __version__
from lapis.cli.streams import NotShown, discard, standard_streams
from lapis.cli.system_errors import system_error
from lapis.errors import ConfigError, LapisError
from lapis.generation.text import for_terminal

TEXTS = ("TEXT", "PROMPT")  # arguments that may be empty, beside options that are so by default
LONGEST = 4000  # characters of a line that ends a command

# name -> (where it lives, what `lapis --help` says of it), in the order in which a user meets them
COMMANDS = {
    "tour": ("lapis.cli.tour:tour", "The whole story in minutes: build, tune, move, graft, measure, show."),
    "inspect": ("lapis.cli.inspect:inspect", "Parameters, memory and FLOPs, without reading a weight."),
    "tokens": ("lapis.cli.tokens:tokens", "Text as tokens, ids and vectors, and the way back."),
    "tokenizer train": ("lapis.cli.tokenizer:train", "Train a byte-level BPE tokenizer on text files."),
    "tokenizer extend": ("lapis.cli.tokenizer:extend", "Add tokens of a language to a model, with rows for them."),
    "fertility": ("lapis.cli.fertility:fertility", "What a language costs a model, and whether more tokens pay."),
    "adapt": ("lapis.cli.adapt:adapt", "A model and text of a language in, a model that speaks it out."),
    "card": ("lapis.cli.card:card", "Models side by side in two languages, as a page and a model card."),
    "push": ("lapis.cli.push:push", "A model folder to the hub; what is sent is listed first."),
    "data pack": ("lapis.cli.data:pack", "Text or chats as rows of tokens on disk."),
    "data show": ("lapis.cli.data:show", "Rows in color: loss, document borders, end tokens, padding."),
    "train": ("lapis.cli.train:train", "Train from a YAML file and key=value."),
    "fuse": ("lapis.cli.fuse:fuse", "Add an adapter to its base."),
    "eval": ("lapis.cli.eval:evaluate", "Bits per byte, response NLL, stop rate, choices."),
    "classify": ("lapis.cli.classify:classify", "The class of a text or a picture, with probabilities."),
    "diff": ("lapis.cli.diff:diff", "What a fine-tune changed: direction and magnitude."),
    "plan": ("lapis.cli.plan:plan", "Which layers to tune or merge, with evidence."),
    "lens": ("lapis.cli.lens:lens", "What every layer would say, and how words rank on the way."),
    "explain": ("lapis.cli.explain:explain", "What a model does with a text, from tokens to the next, on one page."),
    "graft": ("lapis.cli.graft:graft", "Add chat - base to a model: the chat vector."),
    "delta extract": ("lapis.cli.delta:extract", "What a chat model learned, as a small file."),
    "delta apply": ("lapis.cli.delta:apply", "Add such files to a model."),
    "delta show": ("lapis.cli.delta:show_delta", "What such a file holds, and what it loses."),
    "merge": ("lapis.cli.merge:merge", "Merge models by a recipe or a formula."),
    "gather": ("lapis.cli.gather:gather", "What merges by regmean or fisher weigh a model with."),
    "report": ("lapis.cli.report:report", "What some folders hold, as one page."),
    "export": ("lapis.cli.export:export", "A model as one GGUF file, for llama.cpp and Ollama."),
    "import": ("lapis.cli.export:import_", "A model folder from a GGUF file."),
    "generate": ("lapis.cli.generate:generate", "Continue a prompt."),
    "chat": ("lapis.cli.chat:chat", "Talk with a model in the terminal."),
    "serve": ("lapis.cli.serve:serve", "Serve models behind OpenAI's API, with a page to talk to them."),
}

_FIRST_SPEAKS = 2.0  # seconds that the first of several processes has to say what all would
_LOOK_AGAIN = 0.02  # seconds until a signal that came during an import is looked at again
GROUPS = {
    "tokenizer": "Train a tokenizer, or extend one.",
    "data": "Pack text into rows, and look at them.",
    "delta": "What a chat model learned as a small file: made, added to a model, shown.",
}


def _check_number(_kind: Any, value: Any) -> None:
    """Refuses a number that no option can be; what an option is a number of looks at its range."""
    if isinstance(value, (int, float)):
        from lapis.config import check_number

        try:
            check_number(value, "it")
        except ConfigError as error:
            raise ValueError(f"{error}") from None


def _check_names(arguments: ArgumentCollection) -> None:
    """Refuses an empty path or name, which an unset variable of a shell leaves: as a path it is the current folder."""
    for argument in arguments:
        text = argument.name in TEXTS or argument.field_info.default == ""
        if not text and any(not token.value and token.implicit_value is UNSET for token in argument.tokens):
            raise CycloptsError(msg=f"{argument.name} is empty; give a value, or leave it out")


def make_app() -> App:
    """The command tree, with every command still unimported."""
    app = App(
        name="lapis", version=__version__, help="See inside, train and graft language models, layer by layer.",
        # else each list has an --empty-LIST beside it, and what is empty by default says so
        default_parameter=Parameter(
            negative_iterable=(), show_default=_shown_default, validator=_check_number
        ),
        group_arguments=Group("Arguments", validator=_check_names),
        group_parameters=Group("Parameters", validator=_check_names),
        suppress_keyboard_interrupt=False,  # `main` says that it was stopped
    )  # fmt: skip
    groups: dict[str, App] = {}
    for order, (name, (place, text)) in enumerate(COMMANDS.items()):
        group, _, last = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = App(name=group, help=GROUPS[group], sort_key=order)
            app.command(groups[group])
        (groups[group] if group else app).command(place, name=last, help=text, sort_key=order)
    return app


def _shown_default(value: object) -> str | None:
    """A default as the help shows it; nothing where it is empty."""
    return None if value is None or value in ("", ()) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """Run one command line and exit."""
    gc.set_threshold(100_000, 50, 50)  # importing torch makes half a million objects, and none of them is garbage
    atexit.register(gc.freeze)  # else the interpreter looks through all of them once more before it ends
    if not any(isinstance(handler, _Warnings) for handler in logging.getLogger("lapis").handlers):
        logging.getLogger("lapis").addHandler(_Warnings())
    with _stop_signals() as received:
        try:
            with standard_streams():
                make_app()(arguments, exit_on_error=False, print_error=False, result_action="return_none")
                sys.stdout.flush()
        except CycloptsError as error:
            command = " ".join(["lapis", *(error.command_chain or ())])
            _end(f"{error} (see {command} --help)", 2, alike=True)
        except NotShown as error:
            discard(sys.stdout)
            _end(str(error), 1)
        except LapisError as error:
            _end(str(error), 1)
        except SystemExit:
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                if isinstance(error.__context__, LapisError):  # it was on its way: torchrun ends all where one has
                    _end(str(error.__context__), 1)
                _end("stopped" if _is_first() else "", 128 + (received or [signal.SIGINT])[-1])
            line = system_error(error)
            if line is None:
                raise
            _end(line, 1)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """While inside, SIGINT and SIGTERM both raise KeyboardInterrupt. Yields the numbers that came so far.

    One that comes while a module is imported or a thread is started waits until that is done: libraries swallow what is
    raised in an import, or make other errors of it, and a thread that may or may not run cannot be joined. One that
    comes while an object ends, such as a generator that nobody read to its end, is raised once more: Python would print
    it and go on.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            received.append(number)
        while frame is not None:
            code = frame.f_code
            if code.co_filename == "<frozen importlib._bootstrap>" or code is threading.Thread.start.__code__:
                look_again()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    def look_again() -> None:
        signal.signal(signal.SIGALRM, receive)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN)

    def raised_in_vain(unraisable: "sys.UnraisableHookArgs") -> None:
        if received and issubclass(unraisable.exc_type, KeyboardInterrupt):
            look_again()
        else:
            hook(unraisable)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    listened = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, receive) for number in listened}
    hook, sys.unraisablehook = sys.unraisablehook, raised_in_vain
    try:
        yield received
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Warnings(logging.Handler):
    """Warnings of the library as lines on standard error, whatever the files that they name are called."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            with suppress(OSError):
                print(for_terminal(" ".join(record.getMessage().split()))[:LONGEST], file=sys.stderr)


def _end(message: str, status: int, *, alike: bool = False) -> None:
    """Exits with a line, or "" without. alike: All processes that torchrun started end with it; the first says it."""
    if threading.current_thread() is threading.main_thread():  # this is the end already
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if alike and not _is_first():
        time.sleep(_FIRST_SPEAKS)  # torchrun ends all where one has ended
    elif message and sys.stderr is not None:  # closed
        with suppress(OSError):
            print("lapis: " + for_terminal(" ".join(message.split()))[:LONGEST], file=sys.stderr)
    sys.exit(status)


def _is_first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
