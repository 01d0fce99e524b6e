"""Route the output of a process and its children through the process that draws progress bars."""

import atexit
import codecs
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from finetune_assets.progress.screen import Screen, drawn, is_terminal

POLL_SECONDS = 0.1


@contextmanager
def owned() -> Iterator[None]:
    """Draw bars on the terminal, and print all output of this process and its children above them.

    Dagster starts separate processes that copy stdout and stderr into files; their output would overwrite the bars.
    """
    with ExitStack() as stack:
        screen = stack.enter_context(drawn())
        if isinstance(screen, Screen):
            stack.enter_context(_mirrored(screen))
        atexit.register(stack.close)  # the process may exit without closing the context
        try:
            yield
        finally:
            atexit.unregister(stack.close)


@contextmanager
def _mirrored(screen: Screen) -> Iterator[None]:
    taken = {number: os.dup(number) for number in (1, 2) if is_terminal(number)}
    source, sink = os.pipe()
    ended = threading.Event()
    reader = threading.Thread(target=_mirror, args=(source, screen, ended), daemon=True)
    reader.start()
    _flush()
    for number in taken:
        os.dup2(sink, number)
    os.close(sink)
    try:
        yield
    finally:
        _flush()
        for number, terminal in taken.items():
            os.dup2(terminal, number)
            os.close(terminal)
        ended.set()
        reader.join()
        os.close(source)


def _mirror(source: int, screen: Screen, ended: threading.Event) -> None:
    """Print the output until none is left after `ended`; orphaned processes may keep the write end of the pipe open."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        if select.select([source], [], [], POLL_SECONDS)[0]:
            content = os.read(source, 65536)
            if not content:
                return
            screen.write(decoder.decode(content))
        elif ended.is_set():
            return
        else:
            screen.flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
