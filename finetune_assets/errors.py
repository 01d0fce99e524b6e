"""Base class of the errors that users can fix."""

from finetune_assets.display import message


class UserError(Exception):
    """Error that the user can fix. The message names the file, key or row, the value and the fix.

    Every entry point prints only the message, without a traceback. The message is shown as `display.message` does,
    because it may name what comes from elsewhere.
    """

    def __init__(self, text: str) -> None:
        super().__init__(message(text, lines=True))

    retriable = False
    """Whether a retry may succeed without a fix."""
