"""A Weights & Biases server for one test: the part of its protocol with which the real client starts a run, streams
its history, logs artifacts, resumes and ends.

It can be as unkind as a real one: refuse a key, answer nothing, be cut off in the middle of a run.
"""

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

KEY = "0123456789abcdef0123456789abcdef01234567"
ENTITY = "someone"
Lines = dict[int, dict[str, Any]]


@dataclass
class Run:
    """What the server knows of a run; `lines` are those of its files (history, events, summary) by name and number."""

    name: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, Lines] = field(default_factory=dict)
    exit_code: int | None = None
    started: int = 0
    used: list[str] = field(default_factory=list)
    """Ids of the artifacts that it used."""
    logged: list[str] = field(default_factory=list)
    """Ids of the artifacts that it logged."""

    def file(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file in order."""
        return [line for _, line in sorted(self.lines.get(name, {}).items())]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.file("wandb-history.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        last = self.file("wandb-summary.json")[-1:]
        return last[0] if last else {}


@dataclass
class Artifact:
    """An artifact that was logged."""

    id: str
    project: str
    name: str
    type: str
    digest: str
    metadata: dict[str, Any]
    aliases: list[str]
    committed: bool = False


@dataclass
class Server:
    """What the server keeps, and how it behaves.

    Attributes:
        url: Where it listens.
        runs: By name, which is what clients call the id.
        artifacts: By id.
        files: Bodies that were uploaded, by path.
        asked: Names of the GraphQL operations and paths of everything else, in order.
        silent: Accept requests and never answer them.
    """

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    silent: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: Callable[[], None] = lambda: None


@contextmanager
def running() -> Iterator[Server]:
    """A server on 127.0.0.1 until the context ends, or until its `stop` is called."""
    server = Server()

    class Handler(_Handler):
        served = server

    http = _Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.05,))
    thread.start()

    def stop() -> None:
        server.ended.set()
        http.shutdown()
        thread.join()
        http.server_close()

    server.stop = stop
    try:
        yield server
    finally:
        if not server.ended.is_set():
            stop()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients may go at any time."""


class _Handler(BaseHTTPRequestHandler):
    served: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        path, sent = urlsplit(self.path).path, self._sent()
        if not self._may_go_on():
            return
        if path == "/graphql":
            asked = json.loads(sent)
            self._graphql(asked.get("operationName") or _operation(asked["query"]), asked.get("variables") or {})
        elif path.endswith("/file_stream"):
            self._stream(path.split("/")[-2], json.loads(sent))
        else:
            self._send(404, {})

    def do_PUT(self) -> None:
        sent = self._sent()
        if self._may_go_on(authorized=False):
            self.served.files[urlsplit(self.path).path] = sent
            self._send(200, {})

    def do_GET(self) -> None:
        if self._may_go_on(authorized=False):
            self._send(404, {})

    def _may_go_on(self, authorized: bool = True) -> bool:
        """Whether this request is answered well."""
        self.served.asked.append(urlsplit(self.path).path)
        was_silent = self.served.silent
        while self.served.silent and not self.served.ended.wait(0.05):
            pass
        if was_silent or self.served.ended.is_set():
            self.close_connection = True
            return False
        if authorized and self.headers.get("Authorization") != _basic(KEY):
            self._send(401, {"errors": [{"message": "user is not logged in"}]})
            return False
        return True

    def _graphql(self, operation: str, variables: dict[str, Any]) -> None:
        self.served.asked[-1] = operation
        answer = getattr(self, f"_{operation}", None)
        with self.served.lock:
            self._send(200, {"data": answer(variables.get("input") or variables) if answer else {}})

    # ---- GraphQL, one method an operation

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "V", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams}}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.served.runs.get(asked["name"])
        bucket = run and {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.name,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]),
            "eventsTail": json.dumps([json.dumps(line) for line in run.file("wandb-events.jsonl")[-1:]]),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.file("wandb-events.jsonl")),
            "logLineCount": len(run.file("output.log")),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "P", "name": asked["project"], "entity": {"id": "E", "name": ENTITY}, "bucket": bucket}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["name"] or asked["id"].removeprefix("id-")
        inserted = name not in self.served.runs
        run = self.served.runs.setdefault(name, Run(name, asked["project"] or ""))
        run.config.update(json.loads(asked["config"] or "{}"))
        project = {"id": "P", "name": run.project, "entity": {"id": "E", "name": asked.get("entity") or ENTITY}}
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "displayName": asked["displayName"] or name,
            "config": json.dumps(run.config),
            "project": project,
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.served.url}/uploads/{asked['run']}/{name}"} for name in asked["files"]
        ]
        return {"createRunFiles": {"runID": f"id-{asked['run']}", "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["artifactCollectionName"]
        metadata = json.loads(asked.get("metadata") or "{}")
        number, type_ = len(self.served.artifacts), asked["artifactTypeName"]
        aliases = [alias["alias"] for alias in asked.get("aliases") or []]
        artifact = Artifact(f"artifact-{number}", asked["projectName"], name, type_, asked["digest"], metadata, aliases)
        self.served.artifacts[artifact.id] = artifact
        self.served.runs[asked["runName"]].logged.append(artifact.id)
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": artifact.id, "state": "PENDING", "artifactSequence": sequence}}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(asked["artifactID"])}}

    def _UpdateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(asked["artifactManifestID"])}}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        url = f"{self.served.url}/manifests/{artifact}"
        return {"id": artifact, "file": {"id": artifact, "uploadUrl": url, "uploadHeaders": []}}

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": f"files/{file['artifactID']}/{file['name']}",
                "uploadUrl": f"{self.served.url}/files/{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in asked["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _ArtifactType(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _ArtifactByID(self, asked: dict[str, Any]) -> dict[str, Any]:
        artifact = self.served.artifacts[asked["id"]]
        project = {"id": "P", "internalId": "P", "name": artifact.project, "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": artifact.name, "project": project}
        aliases = [
            {"__typename": "ArtifactAlias", "id": alias, "alias": alias, "artifactCollection": collection}
            for alias in ("latest", "v0")
        ]
        known = {
            "__typename": "Artifact",
            "id": artifact.id,
            "artifactSequence": collection,
            "versionIndex": 0,
            "artifactType": {"name": artifact.type},
            "description": None,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 0,
            "digest": artifact.digest,
            "commitHash": None,
            "fileCount": 0,
            "createdAt": "2026-01-01T00:00:00",
            "updatedAt": None,
            "aliases": aliases,
        }
        return {"artifact": known}

    def _CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.served.artifacts[asked["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": ""}}}

    def _UseArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.served.runs[asked["runName"]].used.append(asked["artifactID"])
        return {"useArtifact": {"artifact": {"id": asked["artifactID"]}}}

    # ---- the stream of a run's files

    def _stream(self, name: str, sent: dict[str, Any]) -> None:
        with self.served.lock:
            run = self.served.runs[name]
            for file, chunk in (sent.get("files") or {}).items():
                lines = run.lines.setdefault(file, {})
                for number, line in enumerate(chunk["content"], chunk["offset"]):
                    lines[number] = json.loads(line) if file.endswith(("json", "jsonl")) else {"text": line}
            if sent.get("complete"):
                run.exit_code = sent.get("exitcode")
        self._send(200, {"limits": {}})

    def _sent(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"api:{key}".encode()).decode()


def _operation(query: str) -> str:
    found = re.search(r"(?:query|mutation) (\w+)", query)
    return found[1] if found else ""
