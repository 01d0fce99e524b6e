"""A TCP proxy on loopback between a client and an HTTP server, which can do to each request what networks do.

It delays, throttles, cuts, flips a byte, tells a wrong length, or answers with an error in the server's stead.
"""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

What = Literal[
    "delay", "throttle", "cut", "cut_request", "drop_answer", "refuse", "flip", "flip_request", "wrong_length", "status"
]
BLOCK = 64 << 10


@dataclass
class Fault:
    """What happens to requests that match.

    Attributes:
        match: Regular expression over `METHOD /path?query`.
        what: `delay` answers after `seconds`; `throttle` sends `rate` bytes a second; `cut` closes the connection after
            `after` bytes of the answer's body, `cut_request` after as many of the request's, `drop_answer` before the
            answer to a request that was carried out; `refuse` closes it at once; `flip` changes the byte at `after` of
            the answer's body, `flip_request` of the request's; `wrong_length` promises more bytes than come; `status`
            answers with `status` and S3's XML of `code`.
        times: To so many requests; None for all.
    """

    match: str
    what: What
    times: int | None = 1
    after: int = 0
    seconds: float = 0.0
    rate: int = 0
    status: int = 500
    code: str = "InternalError"


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        url: Where clients connect.
        server: Host and port of the server behind it.
        faults: Those that are left; the first that matches is taken.
        requests: Every request line's method and path that came.
        sent: Bytes of answers' bodies that went to clients.
    """

    url: str
    server: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.match, request):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def count(self, match: str) -> int:
        """How many requests matched so far."""
        return sum(bool(re.search(match, request)) for request in self.requests)


@contextmanager
def running(server_url: str, host: str = "127.0.0.1") -> Iterator[Proxy]:
    """A proxy before `server_url` until the context ends, which listens on one of this machine's addresses."""
    where = urlsplit(server_url)
    listener = socket.create_server((host, 0), backlog=128)
    proxy = Proxy(f"http://{host}:{listener.getsockname()[1]}", (where.hostname or "", where.port or 80))

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=_serve, args=(proxy, client), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=5)


def _serve(proxy: Proxy, client: socket.socket) -> None:
    with suppress(OSError, _Cut), closing(client):
        stream = client.makefile("rb")
        while head := _head(stream):
            _exchange(proxy, client, stream, head)


class _Cut(Exception):
    """The connection is to be closed now."""


def _exchange(proxy: Proxy, client: socket.socket, stream, head: bytes) -> None:  # type: ignore[no-untyped-def]
    method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    fault = proxy.fault(f"{method} {path}") or Fault("", "delay")
    if fault.what == "refuse":
        raise _Cut
    with closing(socket.create_connection(proxy.server)) as upstream:
        asked_to_go_on = _header(head, "expect")
        if fault.what == "status":
            _drop(stream, int(_header(head, "content-length") or 0), client if asked_to_go_on else None)
            body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>made by a test</Message></Error>"
            answer = f"HTTP/1.1 {fault.status} Made\r\nContent-Type: application/xml\r\n"
            client.sendall(f"{answer}Content-Length: {len(body)}\r\n\r\n{body if method != 'HEAD' else ''}".encode())
            return
        if asked_to_go_on:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
        upstream.sendall(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n")
        for block in _faulty(_blocks(stream, int(_header(head, "content-length") or 0)), fault, "_request"):
            upstream.sendall(block)
        answers = upstream.makefile("rb")
        answer = _head(answers)
        if not answer or fault.what == "drop_answer":
            raise _Cut
        time.sleep(fault.seconds)
        length = _header(answer, "content-length")
        if fault.what == "wrong_length" and length:
            answer = re.sub(rb"(?i)(content-length: *)\d+", b"\\g<1>%d" % (int(length) + 7), answer)
        client.sendall(answer)
        if method == "HEAD":
            return
        left = int(length) if length is not None else 1 << 62
        for block in _faulty(_blocks(answers, left), fault, ""):
            client.sendall(block)
            proxy.sent += len(block)
        if length is None or fault.what == "wrong_length" or (_header(answer, "connection") or "").lower() == "close":
            raise _Cut


def _faulty(blocks: Iterator[bytes], fault: Fault, side: str) -> Iterator[bytes]:
    """A body as the fault leaves it."""
    seen = 0
    for block in blocks:
        begin, seen = seen, seen + len(block)
        reached = begin <= fault.after < seen
        if fault.what == f"cut{side}" and reached:
            yield block[: fault.after - begin]
            raise _Cut
        if fault.what == f"flip{side}" and reached:
            at = fault.after - begin
            block = block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]
        if fault.what == "throttle" and not side:
            time.sleep(len(block) / fault.rate)
        yield block


def _head(stream) -> bytes:  # type: ignore[no-untyped-def]
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b""
        head += line
    return head


def _header(head: bytes, name: str) -> str | None:
    found = re.search(rb"(?i)\r\n" + name.encode() + rb": *([^\r]*)", head)
    return found[1].decode("latin-1") if found else None


def _blocks(stream, left: int) -> Iterator[bytes]:  # type: ignore[no-untyped-def]
    while left > 0:
        block = stream.read1(min(left, BLOCK))
        if not block:
            return
        left -= len(block)
        yield block


def _drop(stream, left: int, client: socket.socket | None) -> None:  # type: ignore[no-untyped-def]
    if client is not None:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    for _ in _blocks(stream, left):
        pass
