"""Resident process with torch, transformers and peft imported, from which workers on this machine are forked.

`python -P finetune_assets/worker/forkserver.py FILE`, where FILE is the descriptor of a listening socket. `worker.warm`
starts it. The server imports and waits. It never computes, uses a GPU or reads a model, so that a child starts in the
state of a fresh interpreter after its imports. Its stdin is a lifeline: the server and all its children end when the
process at the other end of the pipe ends, even by SIGKILL. (The forkserver of `multiprocessing` gives a child neither a
separate environment nor separate output streams, and makes it import its parent's main module.)

Each connection is one child. The client sends a 4-byte header with its stdin, stdout and stderr attached, then a JSON
object of that length: `module`, `arguments`, `environment`, `folder`. The server responds with a line of JSON with the
child's `pid`, and with a second line with its exit `code` when it ends. A byte from the client is a signal for the
child. If the client closes the connection or dies, the child is killed.
"""

import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

from setproctitle import getproctitle

from finetune_assets.worker.model_libraries import import_lean
from finetune_assets.worker.process import die_with_parent, set_threads, show_as

TORCHRUN = "finetune_assets.worker.torchrun"
PRELOADED = (
    "torch",
    TORCHRUN,
    "finetune_assets.training.cli",
    "finetune_assets.evaluation.cli",
    "finetune_assets.preflight.cli",
    "finetune_assets.preflight.simulation",
    "finetune_assets.worker.bootstrap",
    "transformers.models.llama.modeling_llama",
    "pandas",  # imported by pyarrow at the first array
)
CLIENT_SECONDS = 10
"""Timeout for a client to send its request, during which other clients wait."""
FORK = get_context("fork")
HEADER_BYTES = 4
LIFELINE = 0


@dataclass
class Request:
    """Request to run `python -m module arguments` in the given environment and working directory."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str

    def run(self) -> None:
        """Run the module in this process, as a fresh interpreter would."""
        inherited = {"", str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:] = [self.folder, *added, *(path for path in sys.path if path not in inherited)]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
        set_threads()
        sys.argv = [self.module, *self.arguments]
        show_as(self.module, self.arguments)
        if self.module == TORCHRUN:
            # torchrun inspects its stack at each event, and searches all modules for each frame without a module, such
            # as runpy's: two seconds of CPU
            return import_module(TORCHRUN).main()
        # runpy warns that the module was imported before it runs
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


@dataclass
class Server:
    """Accepts connections, forks children, and forwards signals and exit codes.

    Attributes:
        listener: Socket that clients connect to.
        children: Running children, each with the connection of its client.
        ending: Whether SIGTERM was received. The server then exits after its children, which may have a checkpoint to
            save and would be killed with it.
    """

    listener: socket.socket
    children: dict[ForkProcess, socket.socket] = field(default_factory=dict)
    ending: bool = False

    def __post_init__(self) -> None:
        self.woken, waker = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(waker, False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in children: Ctrl-C is for the process that waits
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "ending", True))
        signal.set_wakeup_fd(waker)
        self.selector = selectors.DefaultSelector()
        for file in (self.listener, self.woken, LIFELINE):
            self.selector.register(file, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until the lifeline closes or, after SIGTERM, until the last child has ended."""
        while self.children or not self.ending:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fileobj == self.woken:
                    os.read(self.woken, 4096)
                    self._reap()
                elif key.fileobj == LIFELINE:
                    return self._end()
                else:
                    self._forward_signals(key.data)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(CLIENT_SECONDS)
        try:
            header, files, _, _ = socket.recv_fds(connection, HEADER_BYTES, 3)
            request = Request(**json.loads(_exactly(connection, int.from_bytes(header, "big"))))
        except (OSError, ValueError, EOFError):  # the client has died
            connection.close()
            return
        child = FORK.Process(target=self._child, args=(request, connection, files, os.getpid()))
        child.start()
        for file in files:
            os.close(file)
        self.children[child] = connection
        self.selector.register(connection, selectors.EVENT_READ, child)
        self._send(connection, {"pid": child.pid or 0})

    def _child(self, request: Request, connection: socket.socket, files: list[int], server: int) -> None:
        """Release the server's resources and run the request."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent(server)
        self.selector.close()
        for other in (self.listener, connection, *self.children.values()):
            other.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        request.run()

    def _forward_signals(self, child: ForkProcess) -> None:
        """Forward signals from the client; kill the child if the client has died."""
        connection = self.children.get(child)
        if connection is None:
            return
        try:
            signals = connection.recv(16)
        except OSError:
            signals = b""
        for number in signals or (signal.SIGKILL,):
            if child.exitcode is None and child.pid:  # otherwise the PID may belong to another process by now
                os.kill(child.pid, number)
        if not signals:
            self.selector.unregister(connection)

    def _reap(self) -> None:
        for child, connection in [*self.children.items()]:
            if child.exitcode is None:
                continue
            del self.children[child]
            if connection in self.selector.get_map():
                self.selector.unregister(connection)
                self._send(connection, {"code": child.exitcode})
            connection.close()

    def _send(self, connection: socket.socket, message: dict[str, int]) -> None:
        with suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

    def _end(self) -> None:
        for child in self.children:
            child.kill()


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def preload() -> None:
    """Import the modules that workers need. Exits as soon as the owner of this process has ended."""
    selector = selectors.DefaultSelector()
    selector.register(LIFELINE, selectors.EVENT_READ)
    for name in PRELOADED:
        if selector.select(0):
            os._exit(0)
        import_lean(name)
    selector.close()
    getproctitle()  # locates the title by the environment, which a child changes
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it visits


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    preload()
    Server(listener).serve()
    shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)


if __name__ == "__main__":
    main()
