"""`lapis serve`: models behind OpenAI's API, and a page to talk to them."""

from typing import Annotated

from cyclopts import Parameter

from lapis.generation.options import DecodingRuntime
from lapis.serving.options import ServeOptions


def serve(
    model: str,
    /,
    *others: str,
    options: Annotated[ServeOptions, Parameter(name="*")] = ServeOptions(),  # noqa: B008
    runtime: Annotated[DecodingRuntime, Parameter(name="*")] = DecodingRuntime(),  # noqa: B008
) -> None:
    """Serve models behind OpenAI's API, with a page to talk to them. Ctrl-C or SIGTERM ends it.

    Args:
        model: A model folder, or an adapter, which is served with its base.
        others: More models.
    """
    from contextlib import ExitStack

    from lapis.cli.output import line, progress
    from lapis.serving.serve import serve as run

    names = [model, *others]
    with ExitStack() as stack:
        stack.enter_context(progress(f"reading {', '.join(names)}"))

        def ready(address: str, notes: list[str]) -> None:
            stack.close()
            for note in notes:
                line(f"note: {note}", "dim", error=True)
            line(f"serving at {address}/v1, the page is {address}/", error=True)

        run(names, options, runtime, ready=ready)
    line("stopped", error=True)
