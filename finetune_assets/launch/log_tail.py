"""The output of a job on another machine, passed on as it comes."""

import sys
from pathlib import Path

MOST = 1 << 20


class Followed:
    """A file that another machine writes.

    Args:
        path: The file, which may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0

    def pass_on(self) -> None:
        """Print on stderr what has come since."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                while content := file.read(MOST):
                    self.position += len(content)
                    sys.stderr.write(content.decode(errors="replace"))
        except OSError:  # not there yet, or not visible here
            return
        sys.stderr.flush()
