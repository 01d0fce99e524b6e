"""A resident process with torch, transformers and peft imported, from which workers of this machine are forked.

`python -P finetune_assets/worker/forkserver.py FILE`, the descriptor of a socket that listens: `launch.warm` starts it.
It imports and waits; it never computes, touches a GPU or reads a model, so that a child begins with what a fresh
interpreter has after its imports. Its stdin is a lifeline: the server and all its children end when the process that
holds the other side does, even by SIGKILL. (The forkserver of `multiprocessing` gives a child neither environment nor
output of its own, and has it import its parent's main module.)

One connection is one child. The client sends a header of 4 bytes with its stdin, stdout and stderr attached, and a JSON
object of that length: `module`, `arguments`, `environment`, `folder`. The server answers with a line of JSON, the
child's `pid`, and one with its `code` when it ends. A byte from the client is a signal for the child; a connection that
the client closes, or that breaks because it died, kills the child.
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

TORCHRUN = "torch.distributed.run"
PRELOADED = (
    "torch",
    TORCHRUN,
    "finetune_assets.training.cli",
    "finetune_assets.evaluation.cli",
    "finetune_assets.preflight.cli",
    "finetune_assets.preflight.simulation",
    "finetune_assets.worker.bootstrap",
    "transformers.models.llama.modeling_llama",
    "pandas",  # pyarrow asks for it at the first array
)
CLIENT_SECONDS = 10
"""For a client to say what it wants, while others wait."""
FORK = get_context("fork")
HEADER_BYTES = 4
LIFELINE = 0


@dataclass
class Request:
    """What a child runs: `python -m module arguments`, in that environment and folder."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str

    def run(self) -> None:
        """Run it in this process, as a fresh interpreter would."""
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
            # It looks through its stack at each event, and through all modules for each frame that is of none of them,
            # as runpy's are: two seconds of CPU
            return import_module(TORCHRUN).main()
        # it says that a module was imported before it runs
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


@dataclass
class Server:
    """Accepts connections, forks, and passes on signals and exit codes.

    Attributes:
        listener: Socket that clients connect to.
        children: Those that run, each with the connection of its client.
        ending: Asked by SIGTERM to end, which it does after its children: they may have a checkpoint to keep, and would
            be killed with it.
    """

    listener: socket.socket
    children: dict[ForkProcess, socket.socket] = field(default_factory=dict)
    ending: bool = False

    def __post_init__(self) -> None:
        self.woken, waker = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(waker, False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the children, and the process that waits for them
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "ending", True))
        signal.set_wakeup_fd(waker)
        self.selector = selectors.DefaultSelector()
        for file in (self.listener, self.woken, LIFELINE):
            self.selector.register(file, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until the lifeline breaks, or the last child has ended after SIGTERM."""
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
                    self._hear(key.data)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(CLIENT_SECONDS)
        try:
            header, files, _, _ = socket.recv_fds(connection, HEADER_BYTES, 3)
            request = Request(**json.loads(_exactly(connection, int.from_bytes(header, "big"))))
        except (OSError, ValueError, EOFError):  # the client is gone
            connection.close()
            return
        child = FORK.Process(target=self._child, args=(request, connection, files, os.getpid()))
        child.start()
        for file in files:
            os.close(file)
        self.children[child] = connection
        self.selector.register(connection, selectors.EVENT_READ, child)
        self._tell(connection, {"pid": child.pid or 0})

    def _child(self, request: Request, connection: socket.socket, files: list[int], server: int) -> None:
        """Give up all that is the server's, and run what is asked for."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
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

    def _hear(self, child: ForkProcess) -> None:
        """Pass on signals; kill the child of a client that is gone."""
        connection = self.children.get(child)
        if connection is None:
            return
        try:
            signals = connection.recv(16)
        except OSError:
            signals = b""
        for number in signals or (signal.SIGKILL,):
            if child.exitcode is None and child.pid:  # else the number may be another process's by now
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
                self._tell(connection, {"code": child.exitcode})
            connection.close()

    def _tell(self, connection: socket.socket, message: dict[str, int]) -> None:
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
    """Import what workers need. Ends the process as soon as its owner has ended."""
    selector = selectors.DefaultSelector()
    selector.register(LIFELINE, selectors.EVENT_READ)
    for name in PRELOADED:
        if selector.select(0):
            os._exit(0)
        import_lean(name)
    selector.close()
    getproctitle()  # finds the place of the title by the environment, which a child changes
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    preload()
    Server(listener).serve()
    shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)


if __name__ == "__main__":
    main()
