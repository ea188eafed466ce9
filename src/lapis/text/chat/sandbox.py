"""The inside of the process that renders chat templates. A script for template.py; imports jinja2 and nothing else.

A template comes with a model, from anybody. So it runs here: in jinja2's immutable sandbox, in a process without the
parent's environment, that may use little memory, little processor time, and open no file. The dialect (tags, filters,
globals, whitespace) is that of `transformers` 5, so that texts come out equal to the byte.

A request is four bytes of length and JSON: {template, source?, messages, jobs: [[count, add_generation_prompt], ...],
variables}; the reply has one {text, spans} or {error} for each job. spans: [start, end) in characters of what stood
between {% generation %} and {% endgeneration %}. Leaves out: tokens, masks, and any trust.
"""

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_LIMIT = 400_000_000  # bytes of address space
SECONDS_LIMIT = 0.8  # of processor time for one request
OUTPUT_LIMIT = 16_000_000  # characters of one rendering


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: renders its body and notes where it stands in the output."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it as it is)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.spans: list[tuple[int, int]] = []
        environment.extend(generation=self)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = str(caller())
        start = sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text

    @contextmanager
    def watch(self) -> Iterator[tuple[list[str], list[tuple[int, int]]]]:
        self.blocks, self.spans = [], []
        yield self.blocks, self.spans


class _PlainNamespace(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # the first argument is not named, so `namespace(self=1)` works
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")


class _Dict:
    """`dict(...)` as a function and not as a type, so that nothing can be reached through it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def environment() -> ImmutableSandboxedEnvironment:
    """The dialect of chat templates. Safe for parsing anywhere; rendering belongs into the limited process."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_PlainNamespace
    )
    return made


def _answer(
    made: ImmutableSandboxedEnvironment, templates: dict[int, jinja2.Template], request: dict[str, Any]
) -> dict[str, Any]:
    if "source" in request:
        try:
            templates[request["template"]] = made.from_string(request["source"])
        except jinja2.TemplateSyntaxError as error:
            return {"broken": f"line {error.lineno}: {error.message}"}
    template, messages = templates[request["template"]], request["messages"]
    results: list[dict[str, Any]] = []
    for count, prompt in request["jobs"]:
        values = {**request["variables"], "messages": messages[:count], "add_generation_prompt": prompt}
        watch: Generation = made.generation  # type: ignore[attr-defined]
        try:
            with watch.watch() as (blocks, spans):
                size = 0
                for block in template.generate(values):
                    blocks.append(block)
                    size += len(block)
                    if size > OUTPUT_LIMIT:
                        return {"broken": f"it writes more than {OUTPUT_LIMIT:,} characters"}
                results.append({"text": "".join(blocks), "spans": spans})
        except Exception as error:  # whatever a template does wrong is the template's fault
            if isinstance(error, MemoryError):
                raise
            results.append({"error": str(error) or type(error).__name__})
    return {"results": results}


def _serve() -> None:
    made = environment()
    templates: dict[int, jinja2.Template] = {}
    # what jinja2 and the standard library import late is imported now, since no file can be opened afterwards
    made.from_string("{{ strftime_now('%d %b %Y') }}{{ [1.5] | tojson }}{{ 'é' | title }}").render()
    with suppress(TemplateError):
        made.from_string("{{ raise_exception('') }}").render()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_LIMIT),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(limit, (value, value))
    _send(sink, {"used": time.process_time()})
    while length := source.read(4):
        request = json.loads(source.read(int.from_bytes(length, "little")))
        signal.setitimer(signal.ITIMER_PROF, SECONDS_LIMIT)  # its signal ends the process, whatever that is doing
        try:
            reply = _answer(made, templates, request)
        except MemoryError:
            reply = {"broken": f"it needs more than {MEMORY_LIMIT // 1_000_000} MB of memory", "leave": True}
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sink, {**reply, "used": time.process_time()})
        if "leave" in reply:
            break


def _send(sink: Any, reply: dict[str, Any]) -> None:
    raw = json.dumps(reply).encode()
    sink.write(len(raw).to_bytes(4, "little") + raw)
    sink.flush()


if __name__ == "__main__":
    _serve()
