"""`lapis.serve`: models behind OpenAI's API, until the process is asked to end."""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from lapis.errors import ConfigError, LapisError, MissingExtra
from lapis.generation.options import DecodingRuntime
from lapis.serving.options import ServeOptions

Result = TypeVar("Result")


def serve(
    models: str | Path | Sequence[str | Path],
    options: ServeOptions = ServeOptions(),  # noqa: B008
    runtime: DecodingRuntime = DecodingRuntime(),  # noqa: B008
    *,
    ready: Callable[[str, list[str]], None] | None = None,
) -> None:
    """Serves models behind OpenAI's API, with a page to talk to them. Returns when SIGTERM or Ctrl-C ended it.

    Replies that are under way then have 30 seconds to finish; no further request is taken.

    Args:
        models: A folder, an adapter (served with its base), a model of the hub, or several.
        options: Where to listen, for whom, and how much at once.
        runtime: Device and precision.
        ready: Called with the address and with notes when the server takes requests.

    Raises:
        MissingExtra: Where lapis[serve] is not installed.
        ConfigError: For a model twice, a key that is not there, an address that others reach without a key.
        OutputError: For a port in use.
        CheckpointError: For a folder that cannot be served.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtra(str(error.name), "serve") from None
    from lapis.serving.app import make_app
    from lapis.serving.engine.engine import Engine
    from lapis.serving.engine.served import name_models, open_models
    from lapis.serving.gate import Limits
    from lapis.serving.listener import bind, make_server

    sources = [str(models)] if isinstance(models, (str, Path)) else [str(model) for model in models]
    if not sources:
        raise ConfigError("serve: there is no model to serve; name one")
    name_models(sources)
    key = read_key(options.api_key_env)
    socket = bind(options.host, options.port)
    with socket:
        served = in_own_thread(lambda: open_models(sources, runtime, options.rows, options.context))
        engine = Engine(served, rows=options.rows, queue=options.queue)
        server = make_server(make_app(engine, Limits((options.host, *options.allow_host), options.cors, key)))
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{socket.getsockname()[1]}"

        async def run() -> None:
            engine.start(asyncio.get_running_loop())
            if ready is not None:
                ready(address, [note for each in served for note in each.model.notes])
            await server.serve([socket])

        try:
            asyncio.run(run())
        finally:
            engine.stop()
    if server.cut:
        raise LapisError(f"serve: {server.cut} requests had not finished in time and were broken off")


def in_own_thread(function: Callable[[], Result]) -> Result:
    """What a function gives, computed in a thread that ends with it; the caller can be interrupted.

    Each thread that computes has threads of OpenMP of its own. With more of them than cores they stop waiting for each
    other busily, and a step of the engine takes nearly twice its time; so the one that listens must never have any.

    Args:
        function: Takes nothing.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="lapis-open", daemon=True)
    thread.start()
    result = future.result()
    thread.join()
    return result


def read_key(name: str | None) -> str | None:
    """The key of an environment variable. Raises ConfigError where it is empty or not there."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(f"serve: the environment has no {name}; export it with the key that clients must send")
    if not key.isascii():
        raise ConfigError(f"serve: the key in {name} has characters that no header can hold; use ASCII")
    return key
