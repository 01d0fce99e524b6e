"""What can be wrong with data: all of it, one row, or one row under one experiment's template."""

from finetune_assets.errors import UserError


class DataError(UserError):
    """Data that cannot be used, named by file and line."""


class Unreachable(DataError):
    """A source that did not answer, and may the next time."""

    retriable = True


class BadRow(Exception):
    """A row that is set aside. Its text is the reason, without file and line."""


class RefusedRow(Exception):
    """A good row that an experiment's template cannot put into words. Its text is the reason."""
