"""Bodies of requests, read as JSON from nobody in particular."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from lapis.parsing import ParseError, parse_json
from lapis.serving.errors import ApiError


class CheckedRequest(Request):
    """A request whose body is read as JSON from nobody in particular."""

    async def json(self) -> Any:
        """The value of the body. Raises ApiError 400 for what is no JSON, nests deeply, or holds half a character."""
        try:
            return parse_json(await self.body(), constants=False)
        except ParseError as error:
            raise ApiError(400, f"the body is {error}") from None


class CheckedRoute(APIRoute):
    """A route that is given CheckedRequests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As in APIRoute."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handle(CheckedRequest(request.scope, request.receive))

        return checked
