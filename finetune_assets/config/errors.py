"""One form for everything that can be wrong with a setting."""

from collections.abc import Iterable
from difflib import get_close_matches

from finetune_assets.errors import UserError


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, missing, or impossible.

    Args:
        where: The file (or `override`) that says it.
        key: Dotted path of the setting; empty when the whole file is meant.
        problem: What is wrong, with the value, and what to do.
    """

    def __init__(self, where: str, key: str, problem: str) -> None:
        super().__init__(": ".join(part for part in (where, key, problem) if part))


def suggest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?`, or all that would be valid where nothing is near."""
    names = sorted(valid)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(names)}"
