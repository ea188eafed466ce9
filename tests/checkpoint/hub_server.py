"""A server on this machine that speaks as much of the hub's API as downloading needs, and fails on request.

Large files are redirected to a second server of another name, as the hub redirects to its store.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = ".safetensors"


@dataclass
class Asked:
    """One request. host: as the client named it."""

    method: str
    host: str
    path: str
    range: str | None
    token: str | None
    condition: str | None = None
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """repos: name -> commit -> file -> bytes; branches: name -> branch -> commit. fault: called before each answer;
    what it returns (status, headers, body) is sent in its place. drip: seconds between two bytes of a body.
    drip_headers: between two bytes of the headers, which then have no end."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    fault: Callable[[Asked], "tuple[int, dict[str, str], bytes] | None"] | None = None
    drip: Callable[[Asked], float] = lambda asked: 0.0
    drip_headers: float = 0.0
    url: str = ""
    store: str = ""

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        commit = hashlib.sha1(repr(sorted((n, hashlib.sha256(b).hexdigest()) for n, b in files.items())).encode())
        self.repos.setdefault(repo, {})[commit.hexdigest()] = files
        self.branches.setdefault(repo, {})[branch] = commit.hexdigest()
        return commit.hexdigest()

    def weights_sent(self) -> int:
        """Bytes of large files that went over the wire."""
        return sum(one.sent for one in self.asked if one.path.startswith("/store/"))

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(repo, {}).get(revision, revision)
        files = self.repos.get(repo, {}).get(commit)
        return None if files is None else (commit, files)


@contextmanager
def serving(hub: Hub, handler: "type[_Handler] | None" = None):
    """Runs the hub under 127.0.0.1 and its store under localhost, another port."""
    with ExitStack() as stack:
        urls = []
        for name in ("127.0.0.1", "localhost"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler or _Handler,), {"hub": hub}))
            server.handle_error = lambda *whose: None  # of connections that a test cuts
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            urls.append(f"http://{name}:{server.server_port}")
        hub.url, hub.store = urls
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = Asked(self.command, self.headers["Host"].split(":")[0], self.path.split("?")[0],
                      self.headers["Range"], self.headers["Authorization"], self.headers["If-Range"])  # fmt: skip
        self.hub.asked.append(asked)
        answer = self.hub.fault(asked) if self.hub.fault else None
        status, headers, body = answer or self._answer(asked)
        asked.status = status
        if self.hub.drip_headers:
            self._drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000, self.hub.drip_headers)
            return
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if seconds := self.hub.drip(asked):
                self._drip(body, seconds)
                return
            self.wfile.write(body)
            asked.sent = len(body)
        if int(headers["Content-Length"]) != len(body):
            self.close_connection = True

    def _drip(self, data: bytes, seconds: float) -> None:
        """One byte after the other, until the other side has had enough."""
        self.close_connection = True
        try:
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                self.wfile.flush()
                time.sleep(seconds)
        except OSError:
            pass

    def _answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        hub = self.hub
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", asked.path):
            if match[1] not in hub.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            result = hub.find(match[1], (match[2] or "main").replace("%2F", "/"))
            return (404, {"X-Error-Code": "RevisionNotFound"}, b"{}") if result is None else _info(match[1], *result)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", asked.path):
            result = hub.find(match[1], match[2])
            if result is None or match[3] not in result[1]:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            commit, body = result[0], result[1][match[3]]
            known = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if match[3].endswith(LARGE):
                digest = hashlib.sha256(body).hexdigest()
                place = f"{hub.store}/store/{match[1]}/{commit}/{match[3]}"
                linked = {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{digest}"', "Location": place}
                return 302, known | linked, b""
            return part(asked, body, known | {"ETag": f'"{git_digest(body)}"'})
        if match := re.fullmatch(r"/store/([^/]+/[^/]+)/([^/]+)/(.+)", asked.path):
            body = hub.repos[match[1]][match[2]][match[3]]
            return part(asked, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'})
        return 404, {}, b""


def git_digest(body: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _info(repo: str, commit: str, files: dict[str, bytes]) -> tuple[int, dict[str, str], bytes]:
    siblings = []
    for name, body in files.items():
        one = {"rfilename": name, "size": len(body), "blobId": git_digest(body)}
        if name.endswith(LARGE):
            one["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        siblings.append(one)
    answer = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []}
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def part(asked: Asked, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.range or "")
    if match is None or asked.condition not in (None, headers["ETag"]):
        return 200, headers, body
    first, last = int(match[1]), int(match[2] or len(body) - 1)
    if first >= len(body):
        return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
    last = min(last, len(body) - 1)
    return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(body)}"}, body[first : last + 1]
