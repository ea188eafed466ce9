"""The gate: who may ask, how large a body may be, and how long it may take to come. ASGI middleware, before all routes.

A Host header that is not ours is refused, since a page of another origin can point its own name at this machine (DNS
rebinding); so is a foreign Origin. The key is compared in constant time, and stands in no answer and no log.
"""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lapis.serving.errors import ApiError, body_of
from lapis.serving.metrics import Metrics
from lapis.serving.options import LOOPBACK

HEAD_BYTES = 32_768  # of a request: its headers and what stands after the question mark
OPEN = ("/", "/health")  # may be read without a key, and so may the page's files
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
           (b"cross-origin-resource-policy", b"same-origin"))  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """hosts: names of this server. origins: that may call it from a page. key: None asks for none.

    body_bytes: of a request, at most. body_seconds: until all of it has come.
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    key: str | None = None
    body_bytes: int = 4_000_000
    body_seconds: float = 30.0


class Gate:
    """Refuses, or hands on with a body that is bounded in size and time."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if limits.key is None else _digest(limits.key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin", "")
        extra = [*HEADERS, *_cors(origin)] if origin in self._limits.origins else [*HEADERS]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS" and origin in self._limits.origins:
                await _answer(answer, 204, b"", {})
            else:
                await self._app(scope, self._bounded(receive), answer)
        except ApiError as error:
            body = json.dumps(body_of(error.status_code, error.detail, error.param, error.code)).encode()
            await _answer(answer, error.status_code, body, {"connection": "close", **(error.headers or {})})
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.add(route, status, time.monotonic() - start)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raises ApiError for a request that must not go on."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["query_string"]) > HEAD_BYTES:
            raise ApiError(431, f"the head of the request has more than {HEAD_BYTES:,} bytes, which is the most")
        host = headers.get("host", "")
        if not self._ours(host, scope):
            raise ApiError(421, f"{host[:100]!r} is no name of this server; --allow-host adds one", code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self._limits.origins:
            parts = _split(origin)
            if parts is None or parts.netloc.lower() != host.lower():
                raise ApiError(403, f"a page of {origin[:100]!r} may not call this server; --cors names one that may",
                               code="foreign_origin")  # fmt: skip
        if self._key is not None and scope["path"] not in OPEN and not scope["path"].startswith("/page/"):
            self._check_key(scope, headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > self._limits.body_bytes:
            raise ApiError(413, f"the body has {length[:20]} bytes; {self._limits.body_bytes:,} is the most")

    def _check_key(self, scope: Scope, given: str) -> None:
        if scope["method"] == "OPTIONS":
            return  # a browser asks first, without the key; nothing is told
        kind, _, key = given.partition(" ")
        assert self._key is not None
        if kind.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key):
            what = "the key is not the one that this server was given" if given else "this server asks for a key"
            raise ApiError(401, f"{what}; send it as Authorization: Bearer KEY", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    def _ours(self, host: str, scope: Scope) -> bool:
        """Whether a Host header names this server: loopback, the address that was called, or a name that was given."""
        parts = _split(f"//{host}")
        name = parts.hostname if parts else None
        if not host or name is None:
            return False
        local = scope.get("server") or ("", 0)
        known = {*LOOPBACK, str(local[0]).lower(), *(each.lower() for each in self._limits.hosts)}
        return name.lower() in known or host.lower() in known

    def _bounded(self, receive: Receive) -> Receive:
        """Receives a body within the limits, then whatever comes."""
        received, done = 0, False
        deadline = time.monotonic() + self._limits.body_seconds

        async def bounded() -> Message:
            nonlocal received, done
            if done:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise ApiError(408, f"the body did not come within {self._limits.body_seconds:g} s") from None
            received += len(message.get("body", b""))
            done = message["type"] != "http.request" or not message.get("more_body", False)
            if received > self._limits.body_bytes:
                raise ApiError(413, f"the body has more than {self._limits.body_bytes:,} bytes, which is the most")
            return message

        return bounded


def _split(url: str) -> Any:
    try:
        parts = urlsplit(url)
        _ = parts.port
        return parts
    except ValueError:
        return None


def _digest(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin"),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type"),
    ]  # fmt: skip


async def _answer(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    lines += [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
