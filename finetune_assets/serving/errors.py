"""Errors of servers, each with the diagnosis that the check `verified` reports."""

from finetune_assets.errors import UserError

BASE = "base"
PREVIOUS = "previous adapter"
OTHER = "another adapter"
SCALE = "wrong scale"
TEMPLATE = "wrong template"
STALE = "stale cache"
LEAK = "unload leaks"
OTHER_BASE = "another base"
TOKEN = "token refused"
ERROR = "server error"
TIMEOUT = "timeout"
UNKNOWN = "unknown"
DIAGNOSES = (BASE, PREVIOUS, OTHER, SCALE, TEMPLATE, STALE, LEAK, OTHER_BASE, TOKEN, ERROR, TIMEOUT, UNKNOWN)


class ServerError(UserError):
    """A server does not answer as it should.

    Attributes:
        diagnosis: One of `DIAGNOSES`.
        status: The HTTP status; 0 without an answer.
    """

    def __init__(self, text: str, diagnosis: str = ERROR, status: int = 0) -> None:
        super().__init__(text)
        self.diagnosis, self.status = diagnosis, status
