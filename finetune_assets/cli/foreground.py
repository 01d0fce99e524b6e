"""Ctrl-C for a run in a terminal: it reaches the run itself and none of the processes that the run has started.

A terminal sends the signal to all processes of its foreground group. What Dagster starts there to copy the output of a
step would then end with a traceback of its own, before the step has reported what became of its training.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from finetune_assets.worker.process import die_with_parent

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def in_own_group(work: Callable[[], int]) -> int:
    """Do the work in a child process with a process group of its own, and return its result.

    The child gets the signals that this process gets, stops and continues with it (Ctrl-Z), and is killed if it is
    killed. Where Ctrl-C would not reach this process either, the work is done in this process.

    Args:
        work: The work; its result is an exit code.
    """
    if not _is_foreground():
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write, as before
        die_with_parent(parent)
        sys.exit(work())
    return _result_of(child)


def _is_foreground() -> bool:
    """Return whether Ctrl-C in the terminal of stdin reaches this process."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # no terminal, or that of another session
        return False


def _result_of(child: int) -> int:
    """Wait for a child, and return its exit code; 128 and the number of the signal that killed it."""

    def forward(number: int, _: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    def stop(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGSTOP)

    ours = {number: forward for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN}  # by nohup
    before = {number: signal.signal(number, handler) for number, handler in (ours | {signal.SIGTSTP: stop}).items()}
    try:
        while True:
            _, status = os.waitpid(child, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            os.kill(os.getpid(), signal.SIGSTOP)
            os.killpg(child, signal.SIGCONT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
