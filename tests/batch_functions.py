"""Functions that tests compute in other processes, which import this module alone."""

import logging
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from finetune_assets.data.errors import DataError
from finetune_assets.progress import ROWS, Progress


class Unpicklable(Exception):
    """An error that cannot be created from its message alone."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def slow_square(number: int) -> int:
    """The earlier item takes longer."""
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number


def refuse_some(number: int) -> int:
    if number in (3, 4):
        time.sleep(0.3 if number == 3 else 0.0)
        raise DataError(f"row {number} is bad")
    return number


def refuse(number: int) -> int:
    raise Unpicklable("number", str(number))


def end(owner: int) -> None:
    """Kill this process unless it is the owner of the others."""
    if os.getpid() != owner:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)


def process(_: int) -> tuple[int, str, bool, bool]:
    """This process: its PID, the tokenizer's threads, and whether it has imported torch and pandas."""
    time.sleep(0.05)
    loaded = (sys.modules.get(name) is not None for name in ("torch", "pandas"))
    return os.getpid(), os.environ.get("TOKENIZERS_PARALLELISM", ""), *loaded  # type: ignore[return-value]


def sleep(folder: str) -> None:
    """Name this process in a folder, and compute for a minute."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def report(rows: int) -> int:
    """Log, count rows, and return this process."""
    logging.getLogger("finetune_assets.data").warning("%s rows are bad", rows)
    with Progress("checking", rows, ROWS) as progress:
        progress.add(rows)
    return os.getpid()


def has_torch() -> bool:
    """Whether torch can be imported."""
    try:
        return find_spec("torch") is not None
    except ValueError:  # `sys.modules` has None for it
        return False
