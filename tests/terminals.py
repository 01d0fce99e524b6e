"""A terminal that programs run in, and what a person sees in it."""

import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from fcntl import ioctl
from pathlib import Path
from pty import fork
from tempfile import TemporaryDirectory
from termios import TIOCSWINSZ

import pyte

SEEN = "TERMINAL_HAS_SHOWN"
"""Environment variable: a file that comes to be once the terminal has shown what a test waits for."""


class Seen:
    """What a program left in its terminal.

    Attributes:
        moments: The lines of the terminal after each piece of output.
        code: How the program ended.
    """

    def __init__(self, columns: int, lines: int) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.moments: list[list[str]] = []
        self.raw, self.code = b"", 0

    def take(self, output: bytes) -> None:
        self.raw += output
        self.stream.feed(output)
        self.moments.append(self.lines)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def ever(self, *parts: str) -> bool:
        """Whether one line held all of these at some moment."""
        return any(all(part in line for part in parts) for lines in self.moments for line in lines)


def run(
    *arguments: str,
    columns: int = 120,
    lines: int = 60,
    shows: Callable[[Seen], bool] = lambda seen: True,
    interrupt: bool = False,
    environment: Mapping[str, str] = {},
    seconds: float = 120,
) -> Seen:
    """Run Python with these arguments in a terminal, until it ends.

    Args:
        arguments: Python's.
        columns: Of the terminal; 0 if it does not say.
        lines: Of the terminal; 0 if it does not say.
        shows: What is waited for; the program finds the file of `SEEN` then.
        interrupt: Hit Ctrl-C instead.
        environment: Added to this process's own.
        seconds: After which the program is ended.
    """
    with TemporaryDirectory() as folder:
        file, arguments = Path(folder) / "seen", (sys.executable, *arguments)
        variables = {**os.environ, "TERM": "xterm-256color", SEEN: str(file), **environment}
        process, terminal = fork()
        if process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background of a shell it is ignored, also by children
            os.execve(sys.executable, arguments, variables)
        ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        seen, until, shown = Seen(columns or 80, lines or 24), time.monotonic() + seconds, False
        try:
            while output := _read(terminal, until):
                seen.take(output)
                if not shown and shows(seen):
                    shown = True
                    os.write(terminal, b"\x03") if interrupt else file.touch()
        finally:
            if time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
            os.close(terminal)
            seen.code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return seen


def _read(terminal: int, until: float) -> bytes:
    if not select.select([terminal], [], [], max(0, until - time.monotonic()))[0]:
        raise AssertionError("the program does not end")
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the program has ended
        return b""
