"""Start Python modules as processes: forked from a fork server with imports done, or as fresh interpreters.

FINETUNE_FORKSERVER: `off` to always start fresh interpreters, or the socket of a shared fork server. By default, on
    Linux machines without a GPU, each process that runs jobs starts a fork server with its first job; it ends with that
    process. A process that has used CUDA must not be forked.
"""

import atexit
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

from finetune_assets.worker import forkserver, gpus
from finetune_assets.worker.process import FORKSERVER, OFF, die_with_parent, openmp_waiting

END_SECONDS = 1
logger = logging.getLogger(__name__)


class Process(Protocol):
    """Subset of `subprocess.Popen` used by launchers."""

    returncode: Any
    stderr: IO[str] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class ForkServer:
    """A fork server that ends with this process.

    Attributes:
        address: Path of its socket, in a folder accessible only to this user.
    """

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="finetune-forkserver-")
        self.address = f"{self.folder}/socket"
        self._owner = os.getpid()
        environment = {**openmp_waiting(), **os.environ, "HF_HUB_OFFLINE": "1"}
        with socket.socket(
            socket.AF_UNIX
        ) as listener:  # listens before the server has imported: clients can connect at once
            listener.bind(self.address)
            listener.listen()
            file = listener.fileno()
            command = [
                sys.executable,
                "-P",
                forkserver.__file__,
                str(file),
            ]  # as a file: see `Request.run` for torchrun
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=[file])
        atexit.register(self.close)

    def close(self) -> None:
        """Terminate the server and its children."""
        if os.getpid() != self._owner:
            return  # a fork of the owner
        if self._process.stdin:
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._process.kill()  # during imports, the server checks the lifeline only between modules
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@cache
def _own_of(owner: int) -> ForkServer:
    return ForkServer()


_starting = threading.Lock()


def own() -> ForkServer:
    """Return the fork server of this process, starting it if necessary."""
    with _starting:
        return _own_of(os.getpid())


def is_safe() -> bool:
    """Whether workers on this machine may be forked: on Linux without a visible GPU."""
    return sys.platform == "linux" and not gpus.visible()


def prepare() -> None:
    """Start this process's fork server in advance, if it will use one, so that it imports in the background."""
    if FORKSERVER not in os.environ and is_safe():
        own()


def _address() -> str:
    address = os.environ.get(FORKSERVER)
    if address:
        return address
    return own().address if is_safe() else OFF


def was_forked() -> bool:
    """Whether this process was forked by a fork server, which also forks its child processes."""
    return os.environ.get(FORKSERVER, OFF) != OFF


def start(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stderr: int | None = None,
    binds: bool = False,
) -> Process:
    """Start `python -m MODULE ARGUMENTS`.

    Args:
        module: Module to run.
        arguments: Arguments of the module.
        environment: Complete environment of the process; FINETUNE_FORKSERVER is added.
        stderr: `subprocess.PIPE`, or None to inherit stderr.
        binds: Make the kernel kill the process when this process dies, for modules that do not do this themselves.

    Returns:
        The running process.
    """
    try:
        if (address := _address()) != OFF:
            return ForkedProcess(address, module, arguments, {**environment, FORKSERVER: address}, stderr)
    except OSError as e:
        logger.debug("Cannot fork a worker, starting a fresh interpreter: %s", e)
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**environment, FORKSERVER: OFF},
        stderr=stderr,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent if binds else None,
    )


def _connected(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


class ForkedProcess:
    """A process forked by a fork server on behalf of this process.

    Attributes:
        pid: Process ID.
        returncode: Exit code as in `subprocess`; None while the process runs.
        stderr: Stream of the process's stderr with `subprocess.PIPE`, otherwise None.

    Args:
        address: Socket of the server.
        module: Module to run.
        arguments: Arguments of the module.
        environment: Complete environment of the process.
        stderr: `subprocess.PIPE`, or None to inherit stderr.

    Raises:
        OSError: If the server is not running.
    """

    def __init__(
        self,
        address: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        stderr: int | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.stderr: IO[str] | None = None
        self._connection = _connected(address)
        read, write = os.pipe() if stderr == subprocess.PIPE else (None, None)
        try:
            request = {
                "module": module,
                "arguments": [*arguments],
                "environment": {**environment},
                "folder": str(Path.cwd()),
            }
            body = json.dumps(request).encode()
            _flush()
            files = [0, 1, 2 if write is None else write]
            socket.send_fds(self._connection, [len(body).to_bytes(4, "big")], files)
            self._connection.sendall(body)
            self._received = b""
            self.pid = int(self._next()["pid"])
        except (OSError, EOFError) as e:
            self._connection.close()
            if read is not None:
                os.close(read)
            raise OSError(f"the fork server ended: {e}") from e
        finally:
            if write is not None:
                os.close(write)
        if read is not None:
            self.stderr = os.fdopen(read, encoding="utf-8", errors="replace")

    def _next(self) -> dict[str, int]:
        while b"\n" not in self._received:
            part = self._connection.recv(4096)
            if not part:
                raise EOFError
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end.

        Args:
            timeout: Timeout in seconds; None to wait indefinitely.

        Returns:
            The exit code; -SIGKILL for a process that ended together with its server.

        Raises:
            subprocess.TimeoutExpired: If the process is still running.
        """
        if self.returncode is not None:
            return self.returncode
        if not self._received and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("forked process", timeout or 0)
        try:
            self.returncode = int(self._next()["code"])
        except (OSError, EOFError):
            self.returncode = -signal.SIGKILL
        self._connection.close()
        return self.returncode

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(OSError):
                self._connection.send(bytes([number]))


def _flush() -> None:
    """Flush buffered output, so that it precedes the child's output."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
