"""torchrun without the warnings and the traceback that it prints when it is terminated by a signal.

The arguments are those of `torch.distributed.run`. The exit code after a signal is 128 plus its number.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException

LOGGER = "torch.distributed"
"""Logger whose handlers write torchrun's log."""


def main() -> None:
    for handler in logging.getLogger(LOGGER).handlers:
        handler.addFilter(_is_no_termination)
    try:
        run.main()
    except SignalException as e:
        sys.exit(128 + e.sigval)


def _is_no_termination(record: logging.LogRecord) -> bool:
    """Whether a record is logged while no signal is handled."""
    return not isinstance(sys.exception(), SignalException)


if __name__ == "__main__":
    main()
