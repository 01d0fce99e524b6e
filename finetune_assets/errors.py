"""What a person did, or found, that this project cannot go on with."""


class UserError(Exception):
    """Something a person can mend. Its text names file, key or row, the value, and what to do.

    Every entry point prints the text alone, without a traceback.
    """

    retriable = False
    """Whether the same thing may succeed if it is done again, with nothing mended."""
