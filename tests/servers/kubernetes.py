"""An API server of Kubernetes for tests, on loopback, with a kubelet that runs containers as processes of this machine.

It holds pods, jobs, services and network policies as the real one does, as far as this project and dagster-k8s's client
ask; what it is given must pass the published schema strictly. What a real cluster has beyond that (networks, policies
that act, images, limits on memory) it has not: names of pods lead to loopback, and an image is there unless its name
says `absent`.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import yaml

VERSION = "1.34"
"""Of the schemas."""
KINDS = {
    "pods": ("v1", "Pod"),
    "services": ("v1", "Service"),
    "jobs": ("batch/v1", "Job"),
    "events": ("v1", "Event"),
    "networkpolicies": ("networking.k8s.io/v1", "NetworkPolicy"),
}
ROUTE = re.compile(
    r"/(?:api/v1|apis/batch/v1|apis/networking\.k8s\.io/v1)/namespaces/([^/]+)/"
    r"(pods|services|jobs|events|networkpolicies)(?:/([^/]+))?(/log)?"
)
GPUS = 0
"""Of the only node."""


@dataclass
class Pod:
    """A pod and the process that its container is."""

    tree: dict[str, Any]
    output: Path
    process: "subprocess.Popen[bytes] | None" = None
    deleted: bool = False


@dataclass
class Server:
    """A running API server.

    Attributes:
        url: Where it answers.
        folder: What its kubelet keeps.
        requests: What it was asked: method, path with names left out, and names of parameters.
    """

    url: str
    folder: Path
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    running: dict[str, Pod] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    refuses: str = ""
    refused_kinds: set[str] = field(default_factory=set)
    """What the Role of its client does not name."""
    away: float = 0
    """Until when it answers 503, on the monotonic clock."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def pods(self) -> list[str]:
        with self.lock:
            return [name for kind, name in self.objects if kind == "pods"]

    def config(self) -> Path:
        """A KUBECONFIG that leads here."""
        path = self.folder / "kubeconfig"
        named = {
            "cluster": {"server": self.url},
            "user": {"token": "planted"},
            "context": {"cluster": "c", "user": "c"},
        }
        lists = {f"{kind}s": [{"name": "c", kind: value}] for kind, value in named.items()}
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "c", **lists}))
        return path

    def evict(self, name: str) -> None:
        """As a kubelet does whose node runs out of something."""
        pod = self.running[name]
        with self.lock:
            pod.tree["status"] |= {
                "phase": "Failed",
                "reason": "Evicted",
                "message": "The node was low on resource: ephemeral-storage.",
            }
        if pod.process:
            pod.process.kill()

    # ---- what is asked

    def create(self, kind: str, namespace: str, tree: dict[str, Any]) -> dict[str, Any]:
        version, name_of_kind = KINDS[kind]
        tree = {"apiVersion": version, "kind": name_of_kind, **tree}
        kubernetes_validate.validate(tree, VERSION, strict=True)
        with self.lock:
            self.created.append(json.loads(json.dumps(tree)))
            name = tree["metadata"]["name"]
            tree["metadata"] |= {"namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": _now()}
            self.objects[kind, name] = tree
            if kind == "pods":
                self._start(tree)
            if kind == "jobs":
                tree["status"] = {}
                for index in range(tree["spec"]["completions"]):
                    self._start_of_job(tree, index)
        return tree

    def _start_of_job(self, job: dict[str, Any], index: int) -> None:
        template = json.loads(json.dumps(job["spec"]["template"]))
        name = f"{job['metadata']['name']}-{index}-{uuid.uuid4().hex[:5]}"
        template["metadata"] |= {
            "name": name,
            "namespace": job["metadata"]["namespace"],
            "uid": str(uuid.uuid4()),
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": "u"}],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        self.objects["pods", name] = pod
        self._start(pod, {"JOB_COMPLETION_INDEX": str(index)})

    def _start(self, tree: dict[str, Any], more: dict[str, str] | None = None) -> None:
        name, container = tree["metadata"]["name"], tree["spec"]["containers"][0]
        pod = self.running[name] = Pod(tree, self.folder / f"{name}.log")
        pod.output.touch()
        if int(container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0)) > GPUS:
            message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            tree["status"] = {"phase": "Pending", "conditions": [condition]}
            return
        tree["spec"]["nodeName"] = "node-1"
        if "absent" in container["image"]:
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{container["image"]}"'}
            tree["status"] = {"phase": "Pending", "containerStatuses": [self._container(tree, {"waiting": waiting})]}
            return
        tree["status"] = {"phase": "Running", "podIP": "127.0.0.1"}
        environment = {**os.environ, "KUBERNETES_SERVICE_HOST": "", **(more or {})}
        for variable in container.get("env", []):
            value = variable.get("value")
            if value is None:
                value = {"status.podIP": "127.0.0.1"}[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            environment[variable["name"]] = self._resolved(value, name)
        command = [sys.executable if word == "python" else word for word in container["command"]]
        with pod.output.open("ab") as out:
            pod.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)

    def _resolved(self, value: str, pod: str) -> str:
        """The volume's folder, and the address behind a pod's name."""
        if value == "/cache":
            return str(self.folder / "volumes" / pod)
        if found := re.fullmatch(r"([a-z0-9-]+)-0\.\1:(\d+)", value):
            return f"127.0.0.1:{self._port(found[1])}"
        return value

    def _port(self, service: str) -> int:
        ports = self.__dict__.setdefault("ports", {})
        if service not in ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports[service] = free.getsockname()[1]
        return int(ports[service])

    def _container(self, tree: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        container = tree["spec"]["containers"][0]
        common = {"image": container["image"], "imageID": "", "restartCount": 0}
        return {"name": container["name"], "ready": "running" in state, "state": state, **common}

    def refresh(self) -> None:
        """What the kubelet and the controllers do meanwhile."""
        with self.lock:
            for name, pod in list(self.running.items()):
                if pod.process:
                    self._look(pod)
                if pod.deleted and (pod.process is None or pod.process.poll() is not None):
                    self.running.pop(name)
                    self.objects.pop(("pods", name), None)
            for (kind, name), tree in list(self.objects.items()):
                if kind == "jobs" and not tree["status"].get("conditions"):
                    self._control(name, tree)

    def _look(self, pod: Pod) -> None:
        assert pod.process
        code, status = pod.process.poll(), pod.tree["status"]
        deadline = pod.tree["spec"].get("activeDeadlineSeconds")
        if code is None:
            status["containerStatuses"] = [self._container(pod.tree, {"running": {"startedAt": _now()}})]
            began = pod.tree.setdefault("began", time.monotonic())
            if deadline and time.monotonic() - began > deadline:
                status |= {
                    "phase": "Failed",
                    "reason": "DeadlineExceeded",
                    "message": "Pod was active on the node too long",
                }
                pod.process.terminate()
            return
        code = code if code >= 0 else 128 - code
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}
        status["containerStatuses"] = [self._container(pod.tree, {"terminated": ended})]
        if status["phase"] == "Running":
            status["phase"] = "Succeeded" if code == 0 else "Failed"

    def _control(self, name: str, job: dict[str, Any]) -> None:
        mine = [pod for pod in self.running.values() if pod.tree["metadata"]["name"].startswith(f"{name}-")]
        phases = [pod.tree["status"]["phase"] for pod in mine]
        if phases.count("Succeeded") == job["spec"]["completions"]:
            job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
        elif phases.count("Failed") > job["spec"].get("backoffLimit", job["spec"].get("maxFailedIndexes")):
            elastic = "maxFailedIndexes" in job["spec"]
            reason = "MaxFailedIndexesExceeded" if elastic else "BackoffLimitExceeded"
            condition = {"type": "Failed", "status": "True", "reason": reason}
            job["status"]["conditions"] = [condition]
            for pod in mine:
                if pod.process and pod.process.poll() is None:
                    pod.process.terminate()

    def patch(self, kind: str, name: str, change: dict[str, Any]) -> dict[str, Any] | None:
        """Merge a change of an object's metadata, which is all that this project changes."""
        with self.lock:
            tree = self.objects.get((kind, name))
            if tree:
                assert change.keys() == {"metadata"}
                metadata = {**tree["metadata"], **change["metadata"]}
                changed = {**tree, "metadata": {key: value for key, value in metadata.items() if value is not None}}
                kubernetes_validate.validate(changed, VERSION, strict=True)
                self.objects[kind, name] = changed
                return changed
            return None

    def _delete_owned(self, job: str) -> None:
        """What a Job owns is deleted with it."""
        for (kind, name), tree in list(self.objects.items()):
            owners = tree["metadata"].get("ownerReferences", [])
            if kind != "pods" and any(one["kind"] == "Job" and one["name"] == job for one in owners):
                del self.objects[kind, name]

    def delete(self, kind: str, name: str) -> bool:
        with self.lock:
            if (kind, name) not in self.objects:
                return False
            if kind != "pods":
                del self.objects[kind, name]
            if kind == "jobs":
                for pod in [pod for pod in self.running if pod.startswith(f"{name}-")]:
                    self.delete("pods", pod)
                self._delete_owned(name)
            if kind == "pods":
                pod = self.running[name]
                pod.deleted = True
                if pod.process and pod.process.poll() is None:
                    pod.process.terminate()
            return True


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """A cluster of one node until the context ends."""
    (folder / "volumes").mkdir(parents=True)
    server = Server("", folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, server)

        do_POST = do_DELETE = do_PATCH = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        for pod in server.running.values():
            if pod.process and pod.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(pod.process.pid, signal.SIGKILL)
                pod.process.wait()


def _answer(http: BaseHTTPRequestHandler, server: Server) -> None:
    parts = urlsplit(http.path)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    body = http.rfile.read(int(http.headers.get("Content-Length") or 0))
    found = ROUTE.fullmatch(parts.path)
    if not found:
        return _send(http, 404, _status(404, "NotFound", parts.path))
    namespace, kind, name, log = found.groups()
    asked = f"{kind}{'/NAME' if name else ''}{log or ''}"
    server.requests.append(" ".join([http.command, asked, *sorted(query)]))
    if time.monotonic() < server.away:
        return _send(http, 503, _status(503, "ServiceUnavailable", "the server is being upgraded"))
    if server.refuses and http.command == "POST":
        return _send(http, 403, _status(403, "Forbidden", server.refuses))
    if kind in server.refused_kinds:
        return _send(http, 403, _status(403, "Forbidden", f"{kind} is forbidden"))
    server.refresh()
    if log:
        return _log(http, server, name, query)
    if http.command == "POST":
        try:
            return _send(http, 201, server.create(kind, namespace, json.loads(body)))
        except kubernetes_validate.ValidationError as e:
            return _send(http, 422, _status(422, "Invalid", e.message))
    if http.command == "PATCH":
        assert "merge-patch+json" in http.headers["Content-Type"]
        patched = server.patch(kind, name, json.loads(body))
        return _send(http, 200 if patched else 404, patched or _status(404, "NotFound", name))
    if http.command == "DELETE":
        gone = server.delete(kind, name)
        return _send(http, 200 if gone else 404, _status(200 if gone else 404, "NotFound", name))
    with server.lock:
        if name:
            tree = server.objects.get((kind, name))
            return _send(http, 200 if tree else 404, tree or _status(404, "NotFound", name))
        items = [tree for (one, _), tree in server.objects.items() if one == kind and _selected(tree, query)]
        version, name_of_kind = KINDS[kind]
        return _send(http, 200, {"apiVersion": version, "kind": f"{name_of_kind}List", "metadata": {}, "items": items})


def _selected(tree: dict[str, Any], query: dict[str, str]) -> bool:
    labels = tree["metadata"].get("labels", {})
    wanted = [pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair]
    fields = [pair.split("=") for pair in query.get("fieldSelector", "").split(",") if pair]
    named = all(tree["metadata"]["name"] == value for name, value in fields if name == "metadata.name")
    return named and all(labels.get(name) == value for name, value in wanted)


def _log(http: BaseHTTPRequestHandler, server: Server, name: str, query: dict[str, str]) -> None:
    pod = server.running.get(name)
    if pod is None:
        return _send(http, 404, _status(404, "NotFound", name))
    http.send_response(200)
    http.send_header("Content-Type", "text/plain")
    http.send_header("Transfer-Encoding", "chunked")
    http.end_headers()
    stamp = query.get("timestamps") in ("True", "true")
    with suppress(OSError), pod.output.open("rb") as file:
        while True:
            ended = pod.process is None or pod.process.poll() is not None
            while line := file.readline():
                while not line.endswith(b"\n") and not ended:
                    time.sleep(0.02)
                    line += file.readline()
                content = (f"{_now()} ".encode() if stamp else b"") + line
                http.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
            if ended or query.get("follow") not in ("True", "true"):
                break
            time.sleep(0.1)
        http.wfile.write(b"0\r\n\r\n")


def _send(http: BaseHTTPRequestHandler, code: int, tree: dict[str, Any]) -> None:
    content = json.dumps(tree).encode()
    http.send_response(code)
    http.send_header("Content-Type", "application/json")
    http.send_header("Content-Length", str(len(content)))
    http.end_headers()
    http.wfile.write(content)


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    answer = "Success" if code == 200 else "Failure"
    return {"kind": "Status", "apiVersion": "v1", "status": answer, "code": code, "reason": reason, "message": message}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
