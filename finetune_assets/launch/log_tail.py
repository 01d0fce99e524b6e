"""Forward the output file of a job on another machine to stderr while it grows."""

import sys
from pathlib import Path

MOST = 1 << 20
"""Maximum number of bytes per read."""


class Followed:
    """A log file that another machine writes.

    Args:
        path: Path of the file, which may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def pass_on(self) -> None:
        """Print to stderr what was appended since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                while content := file.read(MOST):
                    self.position += len(content)
                    sys.stderr.write(content.decode(errors="replace"))
        except OSError:  # not created yet, or not visible on this machine
            return
        sys.stderr.flush()
