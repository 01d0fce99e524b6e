"""A Hugging Face Hub for one test: the part of its protocol that `huggingface_hub` and `datasets` use to download, and
what the former uses to upload a model.

It can be as unkind as the real one: gated, throttled, failing, cutting connections, serving what was damaged.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_planted_token_for_tests"
LARGE = 100_000
"""Files from this size on are kept as the Hub keeps large ones (LFS): named by their sha256."""


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
    """What the server serves, and what it was asked.

    Attributes:
        repos: By name; datasets as `datasets/owner/name`.
        requests: Method, path and range of everything that was asked.
        failing: Answer everything with this status.
        failures_left: Answer so many requests with `failing`, the rest well; None for all.
        cut_after: Close the connection after so many bytes of a file, each time.
        damaged: Serve these bytes instead, by path, so many times.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: int | None = None
    failures_left: int | None = None
    cut_after: int | None = None
    damaged: Counter[str] = field(default_factory=Counter)
    url: str = ""
    large: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded and not committed yet, by sha256."""

    def add(self, name: str, files: dict[str, bytes], gated: bool = False, branch: str = "main") -> str:
        """Add a commit to a branch of a repository, making it first if need be; returns the commit."""
        content = json.dumps([[path, hashlib.sha256(body).hexdigest()] for path, body in sorted(files.items())])
        commit = hashlib.sha1(f"{name}{content}".encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}, gated))
        repo.commits[commit] = files
        repo.branches[branch] = commit
        return commit

    def fails_now(self) -> bool:
        if self.failing is None or self.failures_left == 0:
            return False
        if self.failures_left is not None:
            self.failures_left -= 1
        return True


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on 127.0.0.1 until the context ends."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PATH = re.compile(
    r"/(?:api/(?P<type>models|datasets)/(?P<api>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<at>[^/]+)/?(?P<below>.*))?"
    r"|(?P<file>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+))"
)


UPLOADS = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>preupload|commit)/(?P<branch>[^/]+)")
BATCH = re.compile(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        path, sent = unquote(self.path.split("?")[0]), self._sent()
        self.served.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, None, True)
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.served.repos:
                return self._refuse(409, None, True)
            self.served.repos[name] = Repo({"0" * 40: {}}, {"main": "0" * 40}, asked.get("private", False))
            return self._send_json({"url": f"{self.served.url}/{name}", "name": name}, True)
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []}, True)
        if match := BATCH.fullmatch(path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.served.url}/lfs/{o['oid']}"}}}
                for o in json.loads(sent)["objects"]
            ]
            return self._send_json({"transfer": "basic", "objects": objects}, True)
        match = UPLOADS.fullmatch(path)
        if match is None or match["name"] not in self.served.repos:
            return self._refuse(404, "RepoNotFound", True)
        if match["what"] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(sent)["files"]
            ]
            return self._send_json({"files": files}, True)
        return self._commit(match["name"], match["branch"], [json.loads(line) for line in sent.splitlines()])

    def do_PUT(self) -> None:
        oid, sent = self.path.rpartition("/")[2], self._sent()
        self.served.requests.append(f"PUT {self.path}")
        if _sha256(sent) != oid:
            return self._refuse(400, None, True)
        self.served.large[oid] = sent
        return self._send(200, b"", {}, True)

    def _sent(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repo = self.served.repos[name]
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.served.large[value["oid"]]
        commit = self.served.add(name, files, repo.gated, branch)
        address = f"{self.served.url}/{name}/commit/{commit}"
        return self._send_json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""}, True)

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _answer(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.served.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        asked = PATH.fullmatch(path)
        if self.served.fails_now():
            return self._refuse(self.served.failing or 500, None, body)
        if asked is None:
            return self._refuse(404, "RepoNotFound", body)
        name = asked["file"] or f"{'datasets/' if asked['type'] == 'datasets' else ''}{asked['api']}"
        repo = self.served.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound", body)
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(403, "GatedRepo", body)
        revision = asked["at"] or asked["revision"] or "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", body)
        files = repo.commits[commit]
        if asked["file"]:
            return self._send_file(files, asked["path"], commit, body)
        if asked["what"] == "tree":
            deep = "recursive=true" in self.path.lower()
            return self._send_json([e for e in _tree(files) if _is_below(e["path"], asked["below"], deep)], body)
        siblings = [{"rfilename": path} for path in files]
        return self._send_json({"id": asked["api"], "sha": commit, "siblings": siblings}, body)

    def _send_file(self, files: dict[str, bytes], path: str, commit: str, body: bool) -> None:
        if path not in files:
            return self._refuse(404, "EntryNotFound", body, commit)
        content = files[path]
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(content) >= LARGE:
            headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        if body and self.served.damaged[path] > 0:
            self.served.damaged[path] -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin is None:
            return self._send(200, content, headers, body)
        start = int(begin[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[start:], headers, body)

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
        if not body:
            return
        limit = self.served.cut_after
        if limit is not None and len(content) > limit and "X-Repo-Commit" in headers:
            self.wfile.write(content[:limit])
            self.close_connection = True
            return
        self.wfile.write(content)


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    folders = sorted({path.rpartition("/")[0] for path in files} - {""})
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
    ]
    for path, content in files.items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries


def _is_below(path: str, folder: str, deep: bool) -> bool:
    inside = f"{folder}/" if folder else ""
    return path.startswith(inside) and (deep or "/" not in path.removeprefix(inside))


def _oid(content: bytes) -> str:
    """Git's hash of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
