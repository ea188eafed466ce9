"""Chat templates rendered in a process of their own, started when first needed, reused, and killed when it overstays.

A template is a program that came with a model. jinja2's sandbox stops escapes but neither endless loops nor texts that
double forty times; a process can be stopped, whatever it does. See sandbox.py for what runs inside, docs/decisions.md
for why jinja2 and not minijinja.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.errors import DataError, TemplateError
from lapis.processes import process_environment, python

WALL_SECONDS = 1.6  # for one request; the process itself ends at half of that in processor time (sandbox.py)
STARVED_SECONDS = 30.0  # the longest wait where the machine is so busy that the process got next to no time
START_SECONDS = 60.0
JOBS_AT_ONCE = 32
TEMPLATE_LIMIT = 1_000_000  # characters
REPLY_LIMIT = 256_000_000  # bytes


@dataclass(frozen=True)
class Rendering:
    """One text, and [start, end) in characters for each {% generation %} block. error: why there is no text."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    error: str | None = None


def check_syntax(source: str, where: str) -> None:
    """Raises TemplateError with the line where a template does not parse. Runs nothing of it."""
    import jinja2

    from lapis.text.chat.sandbox import environment

    if len(source) > TEMPLATE_LIMIT:
        raise TemplateError(f"{where}: a chat template of {len(source):,} characters; the limit is {TEMPLATE_LIMIT:,}")
    try:
        environment().parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"{where}: the chat template is wrong in line {error.lineno}: {_line(error.message or '')}"
        ) from None
    except RecursionError:
        raise TemplateError(f"{where}: the chat template is nested too deeply") from None
    except (ArithmeticError, ValueError, SyntaxError) as error:  # numbers that Python does not read
        raise TemplateError(f"{where}: the chat template holds what cannot be read: {_line(str(error))}") from None


def render_jobs(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    jobs: Sequence[tuple[int, bool]],
    variables: Mapping[str, Any],
) -> list[Rendering]:
    """Renders the first `count` messages for each (count, add_generation_prompt). Thread-safe.

    Args:
        source: Of the template.
        messages: Of the whole chat.
        jobs: Pairs as above.
        variables: What else the template gets.

    Returns:
        A Rendering for each job; one that the template itself refuses has an error.

    Raises:
        TemplateError: Where the template does not compile, or had to be stopped: too long, too much memory, too
            much text.
    """
    results: list[dict[str, Any]] = []
    for first in range(0, len(jobs), JOBS_AT_ONCE):  # a chat of hundreds of turns must not use up the time of one
        request = {"messages": messages, "jobs": jobs[first : first + JOBS_AT_ONCE], "variables": variables}
        with _lock:
            reply = _current().ask(source, request)
        if "broken" in reply:
            raise TemplateError(f"the chat template was stopped: {_line(reply['broken'])}")
        results += reply["results"]
    return [
        Rendering(
            r.get("text", ""), tuple((a, b) for a, b in r.get("spans", ())), _line(r["error"]) if "error" in r else None
        )
        for r in results
    ]


class _Worker:
    """The other process, and the templates it has been given."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.templates: dict[str, int] = {}
        self.used = 0.0  # processor time, as of the last reply
        self.process = subprocess.Popen(
            python(str(Path(__file__).with_name("sandbox.py"))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent
            bufsize=0,
            env=process_environment(whole=False),  # no secret of ours; the import path, since it needs jinja2
        )
        try:
            self._receive(START_SECONDS, starting=True)
        except _Gone as gone:
            self.close()
            raise TemplateError(f"the process that renders chat templates did not start ({gone})") from None

    def ask(self, source: str, request: dict[str, Any]) -> dict[str, Any]:
        number = self.templates.get(source)
        if number is None:
            number = len(self.templates)
            request = {**request, "source": source}
        try:
            raw = json.dumps({**request, "template": number}, default=_placeholder).encode()
        except (ValueError, RecursionError) as error:
            raise DataError(f"a chat cannot be given to a template: {error}") from None
        try:
            self._write(len(raw).to_bytes(4, "little") + raw)
            reply = self._receive(WALL_SECONDS)
        except _Gone as gone:
            self.close()
            raise TemplateError(f"the chat template was stopped: {gone}") from None
        except BaseException:  # Ctrl-C between question and answer: the next answer would be the wrong one
            self.close()
            raise
        if "broken" in reply:
            self.close()
        else:
            self.templates[source] = number
        return reply

    def _write(self, raw: bytes) -> None:
        assert self.process.stdin is not None
        view = memoryview(raw)
        try:
            while view:
                view = view[self.process.stdin.write(view) :]
        except OSError:
            raise _Gone("its process ended") from None

    def _receive(self, seconds: float, starting: bool = False) -> dict[str, Any]:
        length = int.from_bytes(self._read(4, seconds, starting), "little")
        if length > REPLY_LIMIT:
            raise _Gone(f"it writes more than {REPLY_LIMIT:,} bytes")
        reply = json.loads(self._read(length, seconds, starting))
        assert isinstance(reply, dict)
        self.used = float(reply["used"])
        return reply

    def _read(self, size: int, seconds: float, starting: bool) -> bytes:
        assert self.process.stdout is not None
        handle, parts = self.process.stdout.fileno(), []
        begin = time.monotonic()
        while size:
            if not select.select([handle], [], [], seconds)[0]:
                waited = time.monotonic() - begin
                starved = self._processor_seconds() - self.used < 0.3 and waited < STARVED_SECONDS
                if starting or not starved:
                    raise _Gone(f"it ran too long ({waited:.1f} s)")
                continue
            part = os.read(handle, min(size, 1 << 20))
            if not part:
                code = self.process.wait()
                raise _Gone("it ran too long" if code == -signal.SIGPROF else "its process ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _processor_seconds(self) -> float:
        """What the process has used so far; infinite where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return float("inf")

    def close(self) -> None:
        if os.getpid() == self.owner:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        global _worker
        if _worker is self:
            _worker = None


class _Gone(Exception):
    """The process ended or overstayed."""


_lock = threading.Lock()
_worker: _Worker | None = None


def _current() -> _Worker:
    """The process of this process: a fork does not share it, since two could not take turns on one pipe."""
    global _worker
    if _worker is not None and (_worker.owner != os.getpid() or _worker.process.poll() is not None):
        _worker.close()
    if _worker is None:
        _worker = _Worker()
    return _worker


@atexit.register
def _close_at_exit() -> None:
    if _worker is not None:
        _worker.close()


def _placeholder(value: Any) -> str:
    return f"<{type(value).__name__}>"


def _line(text: str) -> str:
    """A template's own words as one short printable line."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))[:300]
