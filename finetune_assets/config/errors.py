"""The error for invalid settings, with a uniform message format."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from finetune_assets.display import message
from finetune_assets.errors import UserError

SECRET = re.compile(
    r"(^|[._])(secrets?|passw(or)?d|pass|api_?keys?|access_?keys?|tokens?|auth)($|[._=])", re.IGNORECASE
)
"""Pattern of names whose values are not shown."""
MOST_SHOWN = 200
"""Maximum number of characters of a value in an error."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, missing, or invalid.

    Args:
        where: File (or `override`) that contains the setting.
        key: Dotted path of the setting; empty for the whole file.
        problem: Description of the problem, with the value and a remedy.
    """

    def __init__(self, where: str, key: str, problem: str) -> None:
        super().__init__(": ".join(message(part) for part in (where, key, problem) if part))


def suggest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?`, or all valid names if none is similar."""
    names = sorted(valid)
    near = get_close_matches(name[:MOST_SHOWN], names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(names)}"


def shown(value: Any) -> str:
    """A value for an error: on one line, and shortened if it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
