"""`lapis`: the table of commands, and how errors end.

A command's module is imported when the command is run, so `lapis --help` is quick and imports no torch. Exit status:
0 = done, 1 = a refusal (one line), 2 = wrong usage, 130 = stopped by Ctrl-C.
"""

import atexit
import gc
import os
import sys

from cyclopts import App, CycloptsError, Parameter

from lapis import __version__
from lapis.errors import LapisError

# name -> (where it lives, what `lapis --help` says of it), in the order in which a user meets them
COMMANDS = {
    "tour": ("lapis.cli.tour:tour", "The whole story in minutes: build, tune, move, graft, measure, show."),
    "inspect": ("lapis.cli.inspect:inspect", "Parameters, memory and FLOPs, without reading a weight."),
    "tokens": ("lapis.cli.tokens:tokens", "Text as tokens, ids and vectors, and the way back."),
    "tokenizer train": ("lapis.cli.tokenizer:train", "Train a byte-level BPE tokenizer on text files."),
    "data pack": ("lapis.cli.data:pack", "Text or chats as rows of tokens on disk."),
    "data show": ("lapis.cli.data:show", "Rows in color: loss, document borders, end tokens, padding."),
    "train": ("lapis.cli.train:train", "Train from a YAML file and key=value."),
    "fuse": ("lapis.cli.fuse:fuse", "Add an adapter to its base."),
    "eval": ("lapis.cli.eval:evaluate", "Bits per byte, response NLL, stop rate, choices."),
    "classify": ("lapis.cli.classify:classify", "The class of a text or a picture, with probabilities."),
    "diff": ("lapis.cli.diff:diff", "What a fine-tune changed: direction and magnitude."),
    "plan": ("lapis.cli.plan:plan", "Which layers to tune or merge, with evidence."),
    "lens": ("lapis.cli.lens:lens", "What every layer would say, and how words rank on the way."),
    "graft": ("lapis.cli.graft:graft", "Add chat - base to a model: the chat vector."),
    "merge": ("lapis.cli.merge:merge", "Merge models by a recipe or a formula."),
    "report": ("lapis.cli.report:report", "What some folders hold, as one page."),
    "generate": ("lapis.cli.generate:generate", "Continue a prompt."),
    "chat": ("lapis.cli.chat:chat", "Talk with a model in the terminal."),
}

GROUPS = {"tokenizer": "Train a tokenizer.", "data": "Pack text into rows, and look at them."}


def make_app() -> App:
    """The command tree, with every command still unimported."""
    app = App(
        name="lapis", version=__version__, help="See inside, train and graft language models, layer by layer.",
        default_parameter=Parameter(negative_iterable=()),  # else each list has an --empty-LIST beside it
    )  # fmt: skip
    groups: dict[str, App] = {}
    for order, (name, (place, text)) in enumerate(COMMANDS.items()):
        group, _, last = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = App(name=group, help=GROUPS[group], sort_key=order)
            app.command(groups[group])
        (groups[group] if group else app).command(place, name=last, help=text, sort_key=order)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run one command line and exit."""
    gc.set_threshold(100_000, 50, 50)  # importing torch makes half a million objects, and none of them is garbage
    atexit.register(gc.freeze)  # else the interpreter looks through all of them once more before it ends
    app = make_app()
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_none")
    except CycloptsError as error:
        _end(f"{error} (see lapis --help)", 2)
    except LapisError as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        _end("stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        sys.exit(1)


def _end(message: str, status: int) -> None:
    print("lapis: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
