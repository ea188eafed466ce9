"""Connections: the socket, uvicorn's server with deadlines for slow clients, and an end that lets replies finish."""

import asyncio
import errno
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lapis.errors import OutputError
from lapis.serving.errors import body_of
from lapis.serving.gate import HEAD_BYTES

DRAIN_SECONDS = 30  # that running replies have after SIGTERM
REQUEST_SECONDS = 15.0  # until the head of a request has come
STALL_SECONDS = 30.0  # that a client may leave its replies unread
SEND_BYTES = 262_144  # of a reply that the system holds for a client which does not read
CONNECTIONS = 500


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises OutputError where it is taken, or is none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OutputError(f"serve: {host} is no address here: {error.strerror or error}") from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # connections have it from here
    try:
        made.bind(address)
        made.listen(1)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise OutputError(f"serve: port {port} of {host} is in use; give another with --port, or 0") from None
        raise OutputError(f"serve: cannot listen at {host}, port {port}: {error.strerror}") from None
    return made


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which also closes connections whose requests do not come and whose replies are not read."""

    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """As in H11Protocol; the head of a request has to come soon."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """As in H11Protocol."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif not self.transport.is_closing() and self._late is None:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """As in H11Protocol."""
        self._forget()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """As in H11Protocol; a client that goes on reading nothing is let go."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """As in H11Protocol."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """A refusal in OpenAI's shape, for what is no HTTP or has too large a head."""
        body = json.dumps(body_of(400, "this is no HTTP request that can be read; its head may be too large")).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"),
                   (b"content-length", str(len(body)).encode())]  # fmt: skip
        try:
            for part in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        except h11.LocalProtocolError:  # a reply is under way: nothing else can be said on this connection
            pass
        self.transport.close()

    def _expect(self) -> None:
        self._late = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class DrainingServer(uvicorn.Server):
    """uvicorn's server; the first signal lets replies finish, a second one ends it at once.

    cut: requests that were broken off.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.cut = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While inside, SIGINT and SIGTERM ask the server to end; afterwards they mean what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As in Server; counts what did not finish."""
        await super().shutdown(sockets)
        self.cut = len(self.server_state.tasks)


def make_server(app: FastAPI, drain_seconds: int = DRAIN_SECONDS) -> DrainingServer:
    """The server of an application."""
    return DrainingServer(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            log_level="error",
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=drain_seconds,
            h11_max_incomplete_event_size=HEAD_BYTES,
            limit_concurrency=CONNECTIONS,
            proxy_headers=False,
        )
    )
