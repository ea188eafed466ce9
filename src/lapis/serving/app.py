"""The application: routes, errors, and the gate before them. HTTP on one side, the engine on the other."""

from fastapi import FastAPI

from lapis import __version__
from lapis.serving import pages
from lapis.serving.engine.engine import Engine
from lapis.serving.engine.lens import LensReader
from lapis.serving.errors import handle_errors
from lapis.serving.gate import Gate, Limits
from lapis.serving.metrics import Metrics
from lapis.serving.routes import chat, completions, embeddings, lens, models, responses

ROUTERS = (
    models.router,
    chat.router,
    completions.router,
    responses.router,
    embeddings.router,
    lens.router,
    pages.router,
)


def make_app(engine: Engine, limits: Limits) -> FastAPI:
    """The ASGI application that answers for an engine.

    Args:
        engine: Started by whoever runs the application.
        limits: Who may ask, and how much.
    """
    app = FastAPI(
        title="lapis", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        summary="OpenAI's API for models of this machine.",
    )  # fmt: skip
    app.state.engine, app.state.metrics, app.state.lens = engine, Metrics(), LensReader(engine)
    for router in ROUTERS:
        app.include_router(router)
    handle_errors(app)
    app.add_middleware(Gate, limits=limits, metrics=app.state.metrics)
    return app
