"""`lapis chat`: talk with a model in the terminal, or with two side by side.

Reads lines, shows pieces. Ctrl-C stops the reply and not the chat. Works from a pipe too: one line, one turn. Of two
replies in two columns the last lines stay in sight; at the end the whole is printed, with long words folded. Leaves
out what a conversation is (generation/conversation.py).
"""

import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lapis.cli.generate import ENDS
from lapis.cli.output import console
from lapis.config import nearest
from lapis.errors import DataError, LapisError, OutputError
from lapis.generation.options import DecodingRuntime, Sampling
from lapis.generation.text import for_terminal
from lapis.wording import format_count

if TYPE_CHECKING:
    from lapis.generation.conversation import Conversation


HELP = {
    "/system [TEXT]": "show the system's message, or set it",
    "/reset": "forget the conversation",
    "/retry": "another reply to the last turn",
    "/save FILE": "write the conversation as jsonl, as lapis train reads it",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D)",
}
INDENT = 14  # columns for a command's name in that list


@dataclass(frozen=True)
class ChatSampling(Sampling):
    """As Sampling, a little freer and longer, as talk is."""

    temperature: float = 0.7
    """0 takes the most likely token; higher is freer."""
    max_tokens: int = 1024
    """New tokens at most in a reply."""
    seed: int | None = None
    """Reply n draws from seed + n; none draws anew each time."""


def chat(
    model: str,
    /,
    *,
    against: str | None = None,
    system: str = "",
    sampling: Annotated[ChatSampling, Parameter(name="*")] = ChatSampling(),
    runtime: Annotated[DecodingRuntime, Parameter(name="*")] = DecodingRuntime(),  # noqa: B008
) -> None:
    """Talk with a model in the terminal. Type /help there for its commands; Ctrl-C stops a reply.

    Args:
        model: A model folder with a chat template.
        against: A second model, which answers beside the first.
        system: The system's message.
    """
    from lapis.cli.output import line

    conversations: dict[str, Conversation] = {}
    for folder in (model, against):
        if folder is not None:
            conversations[_name(folder, conversations)] = meet(folder, system, sampling, runtime)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history in input()
        line(f"{' and '.join(conversations)}: /help lists commands, Ctrl-D leaves", "dim")
    talk(conversations, ChatLines(interactive))


def meet(folder: str, system: str, sampling: Sampling, runtime: DecodingRuntime) -> "Conversation":
    """Opens a model to talk with, and passes on what loading had to say."""
    from lapis.cli.output import line, progress

    with progress(f"reading {folder}"):
        from lapis.generation.conversation import Conversation
        from lapis.generation.ready import choose_device, open_ready
        from lapis.model.threads import settle_threads

        settle_threads(choose_device(runtime.device))
        model, tokenizer = open_ready(folder, runtime)
        conversation = Conversation(model, tokenizer, sampling, system)
    for note in model.notes:
        line(f"note: {note}", "dim", error=True)
    return conversation


def talk(conversations: "dict[str, Conversation]", lines: "ChatLines") -> None:
    """Reads turns and commands until there are no more."""
    while (line := lines.read()) is not None:
        text = line.strip()
        if not text or text == "/quit":
            if text:
                return
            continue
        try:
            if text.startswith("/") and not text.startswith("//"):
                command(conversations, text)
            else:
                turn = text.removeprefix("/")  # "//" begins a turn with a slash
                answer(conversations, lambda conversation, turn=turn: conversation.send(turn))  # type: ignore[misc]
        except LapisError as error:
            print_status(str(error))


class ChatLines:
    """What the user types, line by line; a line that ends in a backslash goes on in the next."""

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive

    def read(self) -> str | None:
        """The next turn; None at the end of input (Ctrl-D). Ctrl-C throws the line away."""
        line, prompt = "", "> "
        while True:
            try:
                line += self._line(prompt)
            except EOFError:
                if self._interactive:
                    print()
                return line or None
            except KeyboardInterrupt:
                print()
                print_status("Ctrl-D or /quit leaves")
                line, prompt = "", "> "
                continue
            if not line.endswith("\\"):
                return line
            line, prompt = line[:-1] + "\n", ". "

    def _line(self, prompt: str) -> str:
        if self._interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


def command(conversations: "dict[str, Conversation]", text: str) -> None:
    """One slash command."""
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    first = next(iter(conversations.values()))
    if word == "/help":
        for name, meaning in HELP.items():
            print_status(f"{name:{INDENT + 2}}{meaning}")
    elif word == "/system":
        if rest:
            for conversation in conversations.values():
                conversation.system = rest
        print_status(f"system: {first.system or '(none)'}")
    elif word == "/reset":
        for conversation in conversations.values():
            conversation.reset()
        print_status("the conversation is forgotten")
    elif word == "/retry":
        answer(conversations, lambda conversation: conversation.retry())
    elif word == "/save":
        if not rest:
            raise DataError("/save needs a file: /save chat.jsonl")
        print_status(f"saved {save(conversations, Path(rest).expanduser())}")
    else:
        known = [name.split()[0] for name in HELP]
        raise DataError(f"there is no {word}; {nearest(word, known)}")


def save(conversations: "dict[str, Conversation]", path: Path) -> Path:
    """Writes one line per model. Raises OutputError where the file exists, DataError where there are no turns."""
    import json

    from lapis.checkpoint.commit import commit_file

    if not any(conversation.turns for conversation in conversations.values()):
        raise DataError("there is nothing to save yet")
    if os.path.lexists(path):
        raise OutputError(f"{path}: exists already; give another name")
    with commit_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, conversation in conversations.items():
            file.write(json.dumps({"messages": conversation.messages, "model": name}, ensure_ascii=False) + "\n")
    return path


def answer(
    conversations: "dict[str, Conversation]", ask: "Callable[[Conversation], Generator[str, None, None]]"
) -> None:
    """Shows the reply, or both side by side where there is a terminal; Ctrl-C stops them."""
    replies = {name: ask(conversation) for name, conversation in conversations.items()}
    with no_echo():
        if len(replies) > 1 and sys.stdout.isatty():
            side_by_side(replies)
        else:
            for name, pieces in replies.items():
                if len(replies) > 1:
                    print_status(name)
                one(pieces)
    replies_ended = [conversation.last_reply for conversation in conversations.values()]
    if sys.stdout.isatty():
        speeds = (
            f"{format_count(r.tokens, 'token')}, {r.tokens / r.seconds:.0f}/s, {ENDS[r.stop_reason]}"
            for r in replies_ended if r
        )  # fmt: skip
        print_status(" | ".join(speeds))


@contextmanager
def no_echo() -> Iterator[None]:
    """While a reply comes, typed keys (and ^C) are not shown in the midst of it."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def one(pieces: Generator[str, None, None]) -> None:
    """Prints one reply as it comes."""
    from lapis.generation.text import for_terminal

    shown = for_terminal if sys.stdout.isatty() else str
    try:
        for piece in pieces:
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
    sys.stdout.write("\n")
    sys.stdout.flush()


def print_status(text: str) -> None:
    """Prints a line of lapis' own, apart from the model's text: dim, or to standard error where output is a pipe."""
    from lapis.cli.output import line

    line(text, "dim", error=not sys.stdout.isatty())


def _name(folder: str, taken: "dict[str, Conversation]") -> str:
    """A model's short name; the whole path where two would share it."""
    short = Path(folder).resolve().name
    return folder if short in taken else short


GAP = 3  # columns between the two


def side_by_side(replies: Mapping[str, Generator[str, None, None]]) -> None:
    """Takes a piece from each reply in turn, until all have ended or Ctrl-C stops them."""
    texts = dict.fromkeys(replies, "")
    going = dict(replies)
    try:
        with Live(console=console, refresh_per_second=10, transient=True) as live:
            while going:
                for name, pieces in list(going.items()):
                    try:
                        texts[name] += for_terminal(next(pieces))
                    except StopIteration:
                        del going[name]
                live.update(columns(texts, console, console.height - 4))
    except KeyboardInterrupt:
        pass
    finally:
        for pieces in replies.values():
            pieces.close()
    console.print(columns(texts, console))


def columns(texts: Mapping[str, str], console: Console, most: int | None = None) -> Table:
    """One column per name, of equal width; of each text the last `most` lines."""
    width = (console.width - GAP * (len(texts) - 1)) // len(texts)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, expand=False)
    cells = []
    for name, text in texts.items():
        table.add_column(Text(name, style="bold"), width=width, overflow="fold")
        lines = Text(text).wrap(console, width, overflow="fold")
        cells.append(Text("\n").join(lines if most is None else lines[-most:]))
    table.add_row(*cells)
    return table
