"""The hub of hub_server.py with the other half of its API: repositories are made, files come in, commits are made.

It holds to the rules that a hub holds to: a token, the right to write, one history, a largest file, and a head of
README.md that it knows the fields of.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from .hub_server import LARGE, Asked, Hub, _Handler, serving

LICENCES = ("apache-2.0", "mit", "gemma", "llama3", "other")


@dataclass
class WritableHub(Hub):
    """tokens: token -> owners that it may write for. private: repositories nobody else sees. objects: by sha256.
    parents: the head that a commit named. cut: (method, path) -> close the connection. cuts: how many were."""

    tokens: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"hf_writes": ("aina",), "hf_reads": ()})
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parents: list[str | None] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    largest: int = 10**9
    cut: Callable[[str, str], bool] = lambda method, path: False
    cuts: int = 0
    status: Callable[[str, str], int] = lambda method, path: 0

    def owner(self, token: str | None) -> tuple[str, ...] | None:
        return self.tokens.get((token or "").removeprefix("Bearer "))

    def main(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][self.branches[repo]["main"]]


@contextmanager
def writable(hub: WritableHub) -> Iterator[WritableHub]:
    """Runs it; requests that write are answered too."""
    with serving(hub, _Writing) as running:
        yield running


class _Writing(_Handler):
    hub: WritableHub

    def do_POST(self) -> None:  # noqa: N802 (the name that http.server looks for)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.hub.asked.append(Asked(self.command, "", path, None, self.headers["Authorization"]))
        if self.hub.cut(self.command, path):
            self.hub.cuts += 1
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status = self.hub.status(self.command, path)
        answer = (status, {"error": "as the test wants it"}) if status else self._write(path, body)
        text = json.dumps(answer[1]).encode()
        self.send_response(answer[0])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST

    def _answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        """Reading: a private repository is not there for others, and a wrong token is refused."""
        if asked.path.startswith("/api/models/"):
            owners = self.hub.owner(asked.token)
            if asked.token and owners is None:
                return 401, {}, b'{"error": "Invalid username or password."}'
            repo = "/".join(asked.path.split("/")[3:5])
            if self.hub.private.get(repo) and repo.split("/")[0] not in (owners or ()):
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return super()._answer(asked)

    def _write(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        hub = self.hub
        if match := re.fullmatch(r"/store/upload/([0-9a-f]{64})", path):  # signed: without a token
            if self.headers["Authorization"] or hashlib.sha256(body).hexdigest() != match[1]:
                return 400, {"error": "another file"}
            hub.objects[match[1]] = body
            return 200, {}
        owners = hub.owner(self.headers["Authorization"])
        if owners is None:
            return 401, {"error": "Invalid username or password."}
        value = json.loads(body) if body and not path.count("/commit/") else {}
        if path == "/api/validate-yaml":
            wrong = _wrong_fields(value["content"])
            return (400, {"errors": [{"message": wrong}], "warnings": []}) if wrong else (200, {"warnings": []})
        if path == "/api/repos/create":
            owner, repo = value["organization"], f"{value['organization']}/{value['name']}"
            if owner not in owners:
                return 403, {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'}
            if repo in hub.repos:
                return 409, {"error": "You already created this model repo"}
            hub.put(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
            hub.private[repo] = value.get("visibility") == "private"
            return 200, {"url": f"{hub.url}/{repo}", "name": repo}
        return self._write_files(path, body, value, owners)

    def _write_files(
        self, path: str, body: bytes, value: dict[str, Any], owners: tuple[str, ...]
    ) -> tuple[int, dict[str, Any]]:
        hub = self.hub
        match = re.search(r"(?:/api/models/|^/)([\w.-]+/[\w.-]+?)(?:\.git/info|/preupload|/commit)", path)
        if match is None or match[1] not in hub.repos:
            return 404, {"error": "Repository not found"}
        repo = match[1]
        if repo.split("/")[0] not in owners:
            return 403, {"error": "Forbidden: you must be in a group with write access"}
        if "/preupload/" in path:
            kinds = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in value["files"]}
            return 200, {"files": [{"path": p, "uploadMode": k, "shouldIgnore": False} for p, k in kinds.items()]}
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._object(one) for one in value["objects"]]}
        return self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _object(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["size"] > self.hub.largest:
            message = f"Maximum file size exceeded: {one['size']} > {self.hub.largest}"
            return {**one, "error": {"code": 422, "message": message}}
        if one["oid"] in self.hub.objects:
            return dict(one)
        return {**one, "actions": {"upload": {"href": f"{self.hub.store}/store/upload/{one['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        hub = self.hub
        header, *operations = [(line["key"], line["value"]) for line in lines]
        parent = header[1].get("parentCommit")
        if parent is not None and parent != hub.branches[repo]["main"]:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        files = dict(hub.main(repo))
        for kind, value in operations:
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        hub.parents.append(parent)
        hub.messages.append(header[1]["summary"])
        commit = hub.put(repo, files)
        return 200, {"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}


def _wrong_fields(text: str) -> str:
    """What a hub says of the head of a README.md that it does not take."""
    parts = text.split("---")
    head = yaml.safe_load(parts[1]) if text.startswith("---") and len(parts) > 2 else {}
    if head.get("license", "other") not in LICENCES:
        return f'"license" must be one of [{", ".join(LICENCES)}]'
    codes = head.get("language", [])
    if not all(re.fullmatch(r"[a-z]{2,3}", code) for code in ([codes] if isinstance(codes, str) else codes)):
        return '"language" must only contain lowercase ISO 639 codes'
    parents = head.get("base_model", [])
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in ([parents] if isinstance(parents, str) else parents)):
        return '"base_model" must be a model on the hub'
    return ""
