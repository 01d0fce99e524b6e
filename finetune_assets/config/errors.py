"""The error for invalid settings, with a uniform message format."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from finetune_assets.display import message
from finetune_assets.errors import UserError

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
STRONG = re.compile(r"passw(or)?d|passphrase|passcode|secret|credential|api_?key|authorization|webhook", re.IGNORECASE)
"""What names of nothing but secrets contain."""
SECRET_WORDS = {
    *("pass", "pwd", "pw", "pat", "pats", "token", "tokens", "key", "keys", "auth", "oauth", "bearer", "cookie", "jwt"),
    *("dsn", "creds", "apitoken", "authtoken", "accesskey", "privatekey", "sshkey"),
}
"""Last words of names of secrets: `SSH_KEY`, `dbPass`."""
SECRET_PAIRS = {
    ("access", "key"),
    ("private", "key"),
    ("ssh", "key"),
    ("auth", "header"),
    ("auth", "config"),
    ("connection", "string"),
}
"""Neighbouring words in names of secrets: `SSH_KEY_BASE64`."""
LOCATION_WORDS = {"file", "files", "path", "dir", "folder", "sock", "endpoint", "type", "mode", "method", "ttl"}
"""Last words of names of files and kinds: `AWS_WEB_IDENTITY_TOKEN_FILE`, `SSH_AUTH_SOCK`."""
OTHER_WORDS = {
    *("disable", "disabled", "enable", "enabled", "use", "require", "no"),
    *("max", "min", "num", "n", "new", "total", "per", "batch", "added", "special", "general", "cutoff"),
    *("pad", "eos", "bos", "unk", "sep", "mask", "public", "primary", "sort"),
}
"""Words in names of switches and numbers: `HF_HUB_DISABLE_IMPLICIT_TOKEN`, `MAX_TOKENS`, `EOS_TOKEN`."""
NOT_SECRET = {"pwd", "google_application_credentials"}
"""Names of a folder and of a file."""
NAME = re.compile(r"[\w.-]+(?=['\"]?\s*[:=])")
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


def is_secret(name: str) -> bool:
    """Whether the value of a setting or an environment variable of this name is not to be shown or stored."""
    return any(map(_is_secret_part, name.split(".")))


def _is_secret_part(name: str) -> bool:
    words = [word.lower() for word in WORD.findall(name)]
    if not words or name.lower() in NOT_SECRET or words[-1] in LOCATION_WORDS:
        return False
    if STRONG.search(name):
        return not words[0].startswith(("disable", "enable", "use", "require"))
    pairs = {*pairwise(words)}
    return not OTHER_WORDS & {*words} and (words[-1] in SECRET_WORDS or bool(SECRET_PAIRS & pairs))


def names_secret(text: str) -> bool:
    """Whether a text such as `name=value` or `{name: value}` has the name of a secret."""
    return any(is_secret(name) for name in NAME.findall(text))


def suggest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'?`, or all valid names if none is similar."""
    names = sorted(valid)
    near = get_close_matches(name[:MOST_SHOWN], names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(names)}"


def shown(value: Any) -> str:
    """A value for an error: on one line, and shortened if it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
