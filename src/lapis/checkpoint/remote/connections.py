"""Ranges of one file by HTTP: an address and a range in, its bytes in the caller's memory out, every answer checked.

The standard library's client reads from the socket into the memory that the caller owns, which costs a fifth of the
processor time that the hub's own client does (benchmarks/results/stream.md). It has the same proxies and certificates
from the environment. Where a file really lies is asked once: a hub redirects each request to its store, and the store's
address is used until it no longer answers. A token goes to the host that it is for, and to no other.
"""

import base64
import http.client
import io
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import inf
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from lapis.checkpoint.remote import requests
from lapis.checkpoint.remote.requests import QUICK, AgainError, Refused, ShortReadError, check_encoding, refusal

REDIRECTS = 5
STEP = 1 << 20  # bytes that are read from a connection at a time
WINDOW = 1 << 18  # bytes on their way, of each connection to a server that answers at once: a kill loses them
_IDLE = 20.0  # seconds after which a connection that nobody uses is closed and not tried again
_BUFFER = 1 << 15  # less than a step, which then goes to where it is wanted at once
_PRIVATE = {"authorization", "cookie", "proxy-authorization"}  # headers that no other host may see
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class HttpFile:
    """One file on a server.

    Args:
        name: What it is called in messages.
        url: Its address.
        size: Its bytes.
        headers: Of each request; those that identify the user are left out where another host is asked.
        fixed: What some headers must say in each answer that has them, by name in lower case.

    Attributes:
        version: The ETag, or the time of the last change, that `look` has seen.
        delay: Seconds from a request to its answer's headers, the least so far.
    """

    def __init__(
        self, name: str, url: str, size: int, headers: Mapping[str, str], fixed: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.size, self.version, self.delay = name, size, "", inf
        self._start = (url, dict(headers))
        self._place = self._start  # where the last redirect led
        self._fixed = dict(fixed or {})
        self._versions: dict[tuple[str, str], str] = {}  # origin -> ETag, or the time of the last change
        self._conditional = True

    def read(self, first: int, buffer: memoryview) -> int:
        """Fills `buffer` with the bytes from `first` on, in order, by one request. Thread-safe.

        Returns:
            How many bytes came: fewer where the answer broke off.

        Raises:
            Refused: For an answer that is not the range of the file that was asked for.
            AgainError: For one to wait for.
        """
        last = first + len(buffer) - 1
        with self._answer(f"bytes={first}-{last}") as (answer, parts, conditional):
            if answer.status != 206:
                raise self._unlike(answer, parts, conditional)
            self._check(answer, parts, first, last)
            self.delay = min(self.delay, answer.delay)
            if self.delay < QUICK:
                answer.narrow()
            return answer.fill(buffer)

    @contextmanager
    def _answer(self, ranges: str) -> Iterator[tuple["_Exchange", SplitResult, bool]]:
        """The answer to one request, where redirects led, and whether it had a condition."""
        place = self._place
        url, headers = place
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(url)
            version = self._versions.get(_origin(parts))
            condition = {"If-Range": version} if version and self._conditional and not version.startswith("W/") else {}
            request = {**headers, **condition, "Range": ranges, "Accept-Encoding": "identity"}
            with _Exchange(parts, request) as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    self._check_fixed(answer)
                    url, headers = self._redirected(url, headers, answer)
                    continue
                if answer.status in (401, 403, 404, 410) and place is not self._start:
                    self._place = self._start  # the store's address has ended; the hub gives a new one
                    raise AgainError(f"status {answer.status}", 0.0)
                if answer.status == 206:
                    self._place = place if url == place[0] else (url, headers)
                yield answer, parts, bool(condition)
                return
        raise Refused(f"{self.name}: the server redirects without an end")

    def look(self) -> bool:
        """Learns size and version by asking for the first byte, once. Returns False where there is no such file."""
        with self._answer("bytes=0-0") as (answer, parts, _):
            if answer.status in (404, 410):
                return False
            if answer.status not in (200, 206, 416):
                raise refusal(self.name, answer.status, answer.headers)
            check_encoding(self.name, answer.headers)
            whole = answer.status == 200
            text = answer.headers.get("content-length" if whole else "content-range", "")
            match = re.fullmatch(r"(?:bytes (?:0-0|\*)/)?(\d{1,15})", text.strip())
            if match is None:
                raise Refused(f"{self.name}: the server does not say how large it is, and sends no ranges")
            self.size, self.version = int(match[1]), answer.version
            if self.version:
                self._versions[_origin(parts)] = self.version
            if answer.status == 206:
                answer.fill(memoryview(bytearray(1)))
            return True

    def _redirected(self, url: str, headers: dict[str, str], answer: "_Exchange") -> tuple[str, dict[str, str]]:
        target = urljoin(url, answer.headers.get("location", ""))
        before, after = urlsplit(url), urlsplit(target)
        if after.scheme not in ("http", "https") or not after.hostname or (before.scheme, after.scheme) == (
            "https", "http",
        ):  # fmt: skip
            raise Refused(f'{self.name}: the server redirects to "{target[:80]}", which is not followed')
        if _origin(before) != _origin(after):
            headers = {name: value for name, value in headers.items() if name.lower() not in _PRIVATE}
        return target, headers

    def _check(self, answer: "_Exchange", parts: SplitResult, first: int, last: int) -> None:
        """Raises Refused for an answer that is not exactly what was asked for."""
        check_encoding(self.name, answer.headers)
        self._check_fixed(answer)
        answered, expected = answer.headers.get("content-range", ""), f"bytes {first}-{last}/{self.size}"
        match = _RANGE.fullmatch(answered.strip())
        if match is None or tuple(map(int, match.groups())) != (first, last, self.size):
            raise Refused(
                f'{self.name}: the server answered with the range "{answered[:80]}" where {expected} was asked for'
            )
        length = answer.headers.get("content-length")
        if length is not None and length.strip() != str(last + 1 - first):
            raise Refused(
                f"{self.name}: the server sends {length[:20]} bytes where {last + 1 - first:,} were asked for"
            )
        version = answer.version
        if self._versions.setdefault(_origin(parts), version) != version:
            raise self._changed()

    def _check_fixed(self, answer: "_Exchange") -> None:
        for name, value in self._fixed.items():
            if answer.headers.get(name, value).strip('"') != value:
                raise self._changed()

    def _changed(self) -> Refused:
        return Refused(f"{self.name}: changed on the server while it was being read; run again")

    def _unlike(self, answer: "_Exchange", parts: SplitResult, conditional: bool) -> Exception:
        """What an answer means that is no range."""
        if answer.status == 200:
            check_encoding(self.name, answer.headers)
            known = self._versions.get(_origin(parts))
            if known is not None and answer.version != known:
                return self._changed()
            if conditional:  # a server that takes If-Range for something else
                self._conditional = False
                return AgainError("200 for a range", 0.0)
            return Refused(
                f"{self.name}: the server sends no ranges (200 for a range); download the model and give its folder",
                200,
            )
        if answer.status == 416:
            return Refused(f"{self.name}: the server has fewer than {self.size:,} bytes; it changed, or was cut", 416)
        return refusal(self.name, answer.status, answer.headers)


class _Exchange:
    """One request and its answer on a connection, which is used again where the answer was read to its end."""

    def __init__(self, parts: SplitResult, headers: Mapping[str, str]) -> None:
        self._origin = _origin(parts)
        for fresh in (False, True):
            line = None if fresh else _idle.take(self._origin)
            self._line = line or _connect(parts)
            began = time.monotonic()
            try:
                self._line.connection.request(
                    "GET", self._line.target(parts), headers={**headers, **self._line.headers}
                )
                answer: Any = self._line.connection.getresponse()
                break
            except (http.client.RemoteDisconnected, ConnectionError):
                self._line.connection.close()
                if line is None:  # one that was idle may have been closed by the server
                    raise
            except BaseException:
                self._line.connection.close()
                raise
        self._answer: _Answer = answer
        self._answer.paced.headers_came()
        self.delay = time.monotonic() - began
        self.status = self._answer.status
        self.headers = {
            name.lower(): value for name, value in reversed(self._answer.headers.items())
        }  # the first counts

    @property
    def version(self) -> str:
        """What tells one state of the file from another; "" where the server says nothing."""
        return str(self.headers.get("etag") or self.headers.get("last-modified") or "")

    def narrow(self) -> None:
        """Lets no more than WINDOW bytes be on their way, or twice that, as the system counts."""
        if (sock := self._line.connection.sock) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)

    def fill(self, buffer: memoryview) -> int:
        """Reads the body; returns how much of `buffer` it filled. Beyond `buffer` nothing is read."""
        done = 0
        try:
            while done < len(buffer):
                now = self._answer.readinto(buffer[done : done + STEP])
                if not now:
                    break
                done += now
        except (OSError, http.client.HTTPException, ShortReadError):
            if not done:
                raise
        return done

    def __enter__(self) -> "_Exchange":
        return self

    def __exit__(self, *_error: object) -> None:
        whole = self._answer.length == 0 and not self._answer.will_close
        self._answer.close()
        if whole and self._line.connection.sock is not None:
            _idle.give(self._origin, self._line)
        else:
            self._line.connection.close()


class _Paced(io.RawIOBase):
    """What comes from a socket, with an end to waiting: for all headers, for each byte, and for a rate.

    The system does the waiting, and fills large buffers by one call: many short ones cost as much as the copying.
    """

    def __init__(self, raw: Any, sock: Any) -> None:
        self._raw, self._sock = raw, sock
        sock.settimeout(None)
        self._deadline: float | None = time.monotonic() + requests.ANSWER
        self._begin, self._count = time.monotonic(), 0
        self._fill = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_WAITALL

    def headers_came(self) -> None:
        """From here on bytes are the body's."""
        self._deadline = None
        self._wait_at_most(requests.TIMEOUT)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        now = time.monotonic()
        if self._deadline is not None:
            if now >= self._deadline:
                raise ShortReadError(f"no answer in {requests.ANSWER:.0f} s")
            self._wait_at_most(min(self._deadline - now, requests.TIMEOUT))
        elif now - self._begin >= requests.WINDOW:
            rate = self._count / (now - self._begin)
            if rate < requests.LOWEST:
                raise ShortReadError(f"{rate:,.0f} bytes a second came, which is too slow to go on")
            self._begin, self._count = now, 0
        try:
            count = int(self._sock.recv_into(buffer, 0, self._fill if len(buffer) > _BUFFER else 0))
        except (BlockingIOError, ssl.SSLWantReadError):
            raise ShortReadError("nothing came any more") from None
        self._count += count
        return count

    def _wait_at_most(self, seconds: float) -> None:
        whole, part = divmod(max(1000, int(seconds * 1e6)), 1_000_000)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole, part))

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, **more: Any) -> None:
        super().__init__(sock, *arguments, **more)
        self.fp.close()
        self.paced = _Paced(sock.makefile("rb", buffering=0), sock)
        self.fp = io.BufferedReader(self.paced, _BUFFER)


@dataclass(frozen=True)
class _Line:
    """A connection. proxied: whether a proxy reads the requests; headers: what it wants of each."""

    connection: http.client.HTTPConnection
    proxied: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def target(self, parts: SplitResult) -> str:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return f"http://{parts.netloc}{path}" if self.proxied else path


class _Idle:
    """Connections that nobody uses at the moment, by origin; the one that was used last is taken first."""

    def __init__(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()
        self._waiting: dict[tuple[str, str], list[tuple[float, _Line]]] = {}

    def take(self, origin: tuple[str, str]) -> _Line | None:
        with self._lock:
            if self._process != os.getpid():  # a child shares no connection with its parent
                self._waiting, self._process = {}, os.getpid()
            waiting = self._waiting.get(origin, [])
            while waiting:
                since, line = waiting.pop()
                if time.monotonic() - since < _IDLE:
                    return line
                line.connection.close()
        return None

    def give(self, origin: tuple[str, str], line: _Line) -> None:
        with self._lock:
            self._waiting.setdefault(origin, []).append((time.monotonic(), line))


_idle = _Idle()


def _origin(parts: SplitResult) -> tuple[str, str]:
    return parts.scheme, parts.netloc.rsplit("@", 1)[-1].lower()


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address."""
    address = getproxies().get(parts.scheme) or getproxies().get("all")
    if not address or proxy_bypass(parts.hostname or ""):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    if proxy.scheme not in ("http", "https"):
        raise Refused(f"the proxy {proxy.scheme}://{proxy.hostname} cannot be used for ranges; set one of http://")
    return proxy


def _connect(parts: SplitResult) -> _Line:
    proxy = _proxy(parts)
    host, port = (proxy or parts).hostname or "", (proxy or parts).port
    headers = _authorization(proxy) if proxy is not None else {}
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=requests.TIMEOUT, context=_certificates())
        if proxy is not None:
            connection.set_tunnel(parts.hostname or "", parts.port or 443, headers)
        headers = {}
    else:
        connection = http.client.HTTPConnection(host, port, timeout=requests.TIMEOUT)
    connection.response_class = _Answer
    return _Line(connection, proxy is not None and parts.scheme == "http", headers)


def _authorization(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


@cache
def _certificates() -> ssl.SSLContext:
    """Those that the hub's client trusts: SSL_CERT_FILE's or SSL_CERT_DIR's, or certifi's."""
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context()
    import certifi

    return ssl.create_default_context(cafile=certifi.where())
