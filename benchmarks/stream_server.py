"""A hub on this machine for benchmarks/stream.py: files by sendfile, round trips and a line as slow as is wanted.

    python benchmarks/stream_server.py DIR --delay 0.05 --rate 125e6

Serves DIR/NAME as the model o/NAME with the hub's API, weights from the same port. Each answer waits one round trip, a
new connection one more, and all bodies together leave at the rate of the line: that much is slept in user space, which
needs no rights of the system and leaves out how TCP finds a line's rate. Prints its address; GET /sent says how many
bytes of each model's weights have come where they were sent: what was still in the memory of this end when a client was
killed is taken off.
"""

import argparse
import array
import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

COMMIT = "a" * 40
PART = 1 << 18  # bytes that leave at a time where the line has a rate


class Line:
    """Lets bytes through at a rate, first come, first served."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free, self.lock = rate, 0.0, threading.Lock()

    def wait(self, size: int) -> None:
        """Returns when `size` bytes have left."""
        with self.lock:
            self.free = max(self.free, time.monotonic()) + size / self.rate
            until = self.free
        time.sleep(max(0.0, until - time.monotonic()))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    digests: dict[Path, str]
    delay = 0.0
    line: Line | None = None
    sent: ClassVar[dict[str, int]] = {}
    lock = threading.Lock()
    last = ""  # the model whose weights this connection has sent

    def log_message(self, *_arguments: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        time.sleep(self.delay)  # the handshake

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()
        left = array.array("i", [0])
        fcntl.ioctl(self.connection, termios.TIOCOUTQ, left)
        with self.lock:
            self.sent[self.last] = self.sent.get(self.last, 0) - left[0]

    def do_GET(self) -> None:
        time.sleep(self.delay)
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/o/([^/]+)(?:/revision/.+)?", path):
            files = [self._listed(file) for file in sorted((self.root / match[1]).iterdir())]
            body = json.dumps({"id": match[1], "sha": COMMIT, "siblings": files}).encode()
            self._answer(200, {"Content-Length": str(len(body))})
            self.wfile.write(body)
        elif match := re.fullmatch(r"/o/([^/]+)/resolve/[^/]+/([^/]+)", path):
            self._send(self.root / match[1] / match[2])
        elif path == "/sent":
            body = json.dumps(self.sent).encode()
            self._answer(200, {"Content-Length": str(len(body))})
            self.wfile.write(body)
        else:
            self._answer(404, {"Content-Length": "0"})

    do_HEAD = do_GET

    def _listed(self, file: Path) -> dict:
        digest, size = self.digests[file], file.stat().st_size
        return {"rfilename": file.name, "size": size, "lfs": {"sha256": digest, "size": size, "pointerSize": 134}}

    def _send(self, file: Path) -> None:
        size = file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or size - 1)) if match else (0, size - 1)
        about = {"ETag": f'"{self.digests[file]}"', "X-Repo-Commit": COMMIT, "Content-Length": str(last + 1 - first)}
        self._answer(206 if match else 200, about | {"Content-Range": f"bytes {first}-{last}/{size}"})
        if self.command == "HEAD":
            return
        with file.open("rb") as data:
            at = first
            while at <= last:
                now = last + 1 - at if self.line is None else min(PART, last + 1 - at)
                if self.line is not None:
                    self.line.wait(now)
                gone = os.sendfile(self.connection.fileno(), data.fileno(), at, now)
                at += gone
                if file.suffix != ".safetensors":
                    continue
                self.last = file.parent.name
                with self.lock:
                    self.sent[self.last] = self.sent.get(self.last, 0) + gone

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()


def sha256_of(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds of a round trip")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second of the line; 0 has no limit")
    given = parser.parse_args()
    Handler.root, Handler.delay = given.root, given.delay
    Handler.line = Line(given.rate) if given.rate else None
    Handler.digests = {file: sha256_of(file) for file in given.root.glob("*/*") if file.is_file()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
