"""Base class of the errors that users can fix."""


class UserError(Exception):
    """Error that the user can fix. The message names the file, key or row, the value and the fix.

    Every entry point prints only the message, without a traceback.
    """

    retriable = False
    """Whether a retry may succeed without a fix."""
