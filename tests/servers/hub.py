"""A Hugging Face Hub for one test: the part of its protocol that `huggingface_hub` uses to download a repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_planted_token_for_tests"


@dataclass
class Repo:
    """One repository.

    Attributes:
        commits: Files of each commit by 40-digit sha.
        branches: Commit of each branch.
        gated: Whether only `TOKEN` may read it.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False


@dataclass
class Hub:
    """What the server serves, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: int | None = None
    """Answer everything with this status."""
    url: str = ""

    def add(self, name: str, files: dict[str, bytes], gated: bool = False) -> str:
        """Add a commit to `main` of a repository, making it first if need be; returns the commit."""
        content = json.dumps([[path, hashlib.sha256(body).hexdigest()] for path, body in sorted(files.items())])
        commit = hashlib.sha1(f"{name}{content}".encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}, gated))
        repo.commits[commit] = files
        repo.branches["main"] = commit
        return commit


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on 127.0.0.1 until the context ends."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        self.served.requests.append(f"{self.command} /{path}")
        if self.served.failing:
            return self._refuse(self.served.failing, None, body)
        owner_name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        repo = self.served.repos.get(owner_name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", body)
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(403, "GatedRepo", body)
        rest = path.removeprefix("api/models/").removeprefix(owner_name).strip("/").split("/")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", body)
        files = repo.commits[commit]
        if rest[0] == "revision":
            return self._send_json(
                {"id": owner_name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}, body
            )
        if rest[0] == "tree":
            tree = [{"type": "file", "path": f, "size": len(b), "oid": _oid(b)} for f, b in files.items()]
            return self._send_json(tree, body)
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self._refuse(404, "EntryNotFound", body, commit)
        return self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit}, body)

    def _refuse(self, status: int, code: str | None, body: bool, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._send(status, b"", {**headers, **({"X-Repo-Commit": commit} if commit else {})}, body)

    def _send_json(self, tree: Any, body: bool) -> None:
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
