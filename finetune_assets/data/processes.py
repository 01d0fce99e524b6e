"""Computes in other processes of this machine: batches in several, or one function in a process of its own.

Batches are computed in order, in bounded memory, and without temporary files. This process is one of those that compute
them: a thread of it does while the others start, which takes each about a CPU second. The others are fresh interpreters
rather than forks, because the steps of a Dagster run may be threads of one process. They import neither torch nor
pandas, which takes seconds and hundreds of MiB. Each ends when its owner does, even by SIGKILL: its stdin is a pipe
that closes then. What they log is logged by this process.

`python -m finetune_assets.data.processes FILE` is such a process; FILE is the descriptor of its connection.
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.abc import MetaPathFinder
from logging.handlers import QueueHandler
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from finetune_assets.config.cluster import AUTO
from finetune_assets.data.cores import available_cores
from finetune_assets.errors import UserError
from finetune_assets.progress import Progress
from finetune_assets.progress.relay import from_environment, heard

MOST = 16
"""Maximum number of processes with `auto`. This process also reads the rows and writes the results, and keeps no more
than about so many busy (benchmarks/RESULTS.md)."""
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of processes that compute batches. They use all cores together, so each has one thread."""
TORCH, PANDAS = "torch", "pandas"
"""Packages that count as not installed in the other processes: transformers imports the one where it renders chat
templates, and pyarrow the other for its first array."""
TRANSFORMERS, WITH_TORCH = "transformers", "with-torch"
PROCESSES = "data.processes"
"""Setting with the number of processes of the data preparation."""
LIFELINE = 0
logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class LostProcess(UserError):
    """A process that ended before it returned a result."""

    retriable = True


class Processes:
    """Processes that compute the same function of several batches; a context manager that ends them.

    They are started when they are first used.

    Args:
        count: Number of processes with this one; 1 starts none.
        setting: Name of the setting that chooses the number, for messages.
    """

    def __init__(self, count: int, setting: str = "processes") -> None:
        self.count, self.setting = count, setting
        self._children: list[_Child] = []
        self._idle: SimpleQueue[_Child | _Here] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in self._children:
            child.end()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The function's results in the order of the items, as `map` of Python returns them.

        Errors are those of the computation in this process, in the same order: the error of the first item that has
        one, and an error of the iterable after the results of the items before it. At most `2 * count` items and
        results are in memory.

        Args:
            function: Function of a module, or `functools.partial` of one. If it cannot be pickled, it is computed in
                this process.
            items: The items, which are pickled.

        Raises:
            LostProcess: if a process is killed.
        """
        pickled = None if self.count == 1 else _pickled(function)
        if pickled is None:
            yield from map(function, items)
            return
        threads = self._started()
        calls: deque[Future[R]] = deque()
        iterator, error = iter(items), None
        while True:
            try:
                calls.append(threads.submit(self._call, function, pickled, next(iterator)))
            except StopIteration:
                break
            except Exception as e:
                error = e
                break
            if len(calls) == 2 * self.count:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()
        if error:
            raise error

    def _started(self) -> ThreadPoolExecutor:
        """The threads, of which each waits for a process or computes itself."""
        if not self._threads:
            self._children = [_Child(self.setting, ONE_THREAD) for _ in range(self.count - 1)]
            for child in self._children:
                self._idle.put(child)
            self._idle.put(_Here())
            self._threads = ThreadPoolExecutor(self.count, "data-process")
        return self._threads

    def _call(self, function: Callable[[T], R], pickled: bytes, item: T) -> R:
        process = self._idle.get()
        try:
            return process.call(function, pickled, item)
        finally:
            self._idle.put(process)


def in_own_process(function: Callable[..., R], *arguments: Any, torch: bool = False) -> R:
    """Call a function in a process of its own, so that what it imports does not stay in this one.

    Importing a tokenizer takes a CPU second there, and eight with torch. If this process has transformers already, the
    function is called here.

    Args:
        function: Function of a module.
        arguments: Its arguments, which are pickled, as is the result.
        torch: Whether the function may import torch.

    Raises:
        Exception: as the function raised it.
        LostProcess: if the process is killed.
    """
    if sys.modules.get(TRANSFORMERS):
        return function(*arguments)
    with (
        tempfile.TemporaryDirectory(prefix="finetune-") as folder,
        heard(Path(folder), Progress.display) as environment,
    ):
        child = _Child(PROCESSES, environment, torch)
        try:
            return child.call(_applied, pickle.dumps(_applied), (function, arguments))
        finally:
            child.end()
            child.close()


def _applied(call: tuple[Callable[..., R], tuple[Any, ...]]) -> R:
    function, arguments = call
    return function(*arguments)


class _Here:
    """This process."""

    def call(self, function: Callable[[T], R], pickled: bytes, item: T) -> R:
        return function(item)


class _Child:
    """Another process, and the connection to it.

    Args:
        setting: Name of the setting that chooses the number of processes, for messages.
        environment: Added to the environment of this process.
        torch: Whether it may import torch.
    """

    def __init__(self, setting: str, environment: Mapping[str, str], torch: bool = False) -> None:
        self._setting = setting
        self._connection, theirs = Pipe()
        self._function = b""
        paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
        options = [WITH_TORCH] if torch else []
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "finetune_assets.data.processes", str(theirs.fileno()), *options],
                env={**os.environ, **environment, "PYTHONPATH": paths},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def call(self, function: Callable[[T], R], pickled: bytes, item: T) -> R:
        """Compute a function of an item in the process, which is sent its pickle.

        Raises:
            Exception: as the function raised it.
            LostProcess: if the process ends.
        """
        try:
            self._connection.send_bytes(b"" if pickled is self._function else pickled)
            self._connection.send_bytes(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            while isinstance(message := pickle.loads(self._connection.recv_bytes()), logging.LogRecord):
                _log(message)
        except (EOFError, OSError) as e:
            raise self._lost() from e
        is_error, result = message
        self._function = b"" if is_error else pickled  # it may have failed to load
        if is_error:
            raise result
        return result

    def _lost(self) -> LostProcess:
        code = self._process.wait()
        cause = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        advice = "it may have used too much memory; " if code == -signal.SIGKILL else ""
        return LostProcess(
            f"process {self._process.pid} of the data preparation ended with {cause}; {advice}retry, or set "
            f"{self._setting} to a lower number than the {AUTO} one (1 computes in one process)"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Release the files of the ended process."""
        self._connection.close()
        if self._process.stdin:
            self._process.stdin.close()


def _log(record: logging.LogRecord) -> None:
    log = logging.getLogger(record.name)
    if log.isEnabledFor(record.levelno):
        log.handle(record)


def _pickled(function: Callable[..., Any]) -> bytes | None:
    try:
        return pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
    except Exception as e:  # a tokenizer with a part written in Python raises any exception type
        logger.info("Using one process, because the computation cannot be sent to others: %s", e)
        return None


# ---- number of processes


def process_count(setting: str, size: int, least: int) -> int:
    """Number of processes for an input.

    Args:
        setting: A number, or `auto`.
        size: Size of the input.
        least: Size for each process from which several are faster than one.
    """
    if setting != AUTO:
        return int(setting)
    return max(1, min(available_cores(), size // least, MOST))


# ---- in each process


def main() -> None:
    threading.Thread(target=_end_with_owner, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner ends this process
    if WITH_TORCH not in sys.argv:
        sys.modules[TORCH] = None  # type: ignore[assignment]  # `find_spec` and `import` treat it as not installed
        sys.meta_path.insert(0, _WithoutPandas())  # pyarrow, compiled by Cython, takes None for a module
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # warns that torch is not installed
    connection = Connection(int(sys.argv[1]))
    Progress.display = from_environment()
    # Not `basicConfig`, whose format would be added to the messages
    logging.root.addHandler(_ToOwner(connection))  # type: ignore[arg-type]
    logging.root.setLevel(logging.INFO)
    function: Callable[[Any], Any] = repr
    with suppress(EOFError):
        while True:
            pickled, item = connection.recv_bytes(), connection.recv_bytes()
            try:
                function = pickle.loads(pickled) if pickled else function
                result = pickle.dumps((False, function(pickle.loads(item))), pickle.HIGHEST_PROTOCOL)
            except Exception as e:
                result = _pickled_error(e)
            connection.send_bytes(result)


class _ToOwner(QueueHandler):
    """Sends log records to the owner, which logs them."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.send_bytes(pickle.dumps(record))  # type: ignore[attr-defined]


class _WithoutPandas(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == PANDAS:
            raise ModuleNotFoundError(f"{PANDAS} is not used here", name=name)


def _end_with_owner() -> None:
    while os.read(LIFELINE, 1):
        pass
    os._exit(1)


def _pickled_error(error: Exception) -> bytes:
    """An error, with its traceback as a note; of a type that cannot be pickled, a `RuntimeError` with its message."""
    text = "".join(traceback.format_exception(error))
    with suppress(Exception):
        error.add_note(text)
        pickled = pickle.dumps((True, error), pickle.HIGHEST_PROTOCOL)
        if type(pickle.loads(pickled)[1]) is type(error):
            return pickled
    replacement = RuntimeError(f"{type(error).__name__}: {error}")
    replacement.add_note(text)
    return pickle.dumps((True, replacement), pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    main()
