"""Data errors: of a whole source, of one row, and of one row with an experiment's template."""

from finetune_assets.data.sensitive import masked
from finetune_assets.display import message
from finetune_assets.errors import UserError


class DataError(UserError):
    """Data that cannot be used; the message names file and line, and secrets in it are hidden."""

    def __init__(self, text: str) -> None:
        super().__init__(message(masked(text)))


class Unreachable(DataError):
    """A source that did not respond; a retry may succeed."""

    retriable = True


class BadRow(Exception):
    """A row to quarantine; the message is the reason, without file and line, and secrets in it are hidden."""

    def __init__(self, reason: str) -> None:
        super().__init__(message(masked(reason)))


class RefusedRow(Exception):
    """A valid row that an experiment's template cannot render; the message is the reason, without secrets."""

    def __init__(self, reason: str) -> None:
        super().__init__(message(masked(reason)))
