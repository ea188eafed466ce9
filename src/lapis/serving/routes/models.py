"""GET /v1/models, /v1/models/NAME, /health and /metrics."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from lapis.serving.engine.served import ServedModel
from lapis.serving.routes.bodies import CheckedRoute
from lapis.serving.routes.orders import engine_of, model_of

router = APIRouter(route_class=CheckedRoute, tags=["models"])


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that are served."""
    return {"object": "list", "data": [card(served) for served in engine_of(request).models.values()]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return card(model_of(request, name))


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """That the server lives, and how busy it is."""
    engine = engine_of(request)
    running = sum(figures["running"] for figures in engine.figures().values())
    return {"status": "ok", "running": running, "waiting": engine.waiting}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    """Counters for Prometheus."""
    return PlainTextResponse(
        request.app.state.metrics.render(engine_of(request).figures()),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


def card(served: ServedModel) -> dict[str, Any]:
    """A model as OpenAI's list has it; context and what it can do are beyond that."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "lapis",
        "context": served.context,
        "dtype": str(served.dtype).removeprefix("torch."),
        "chat": served.chats,
        "completions": served.replies,
        "notes": [served.hides(note) for note in served.model.notes],
    }
