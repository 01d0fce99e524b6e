"""What a kind of secret or personal data is, and what a finding of one is."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

HIDDEN = "***"
LONG = 20
"""Shortest secret of which both ends are shown: six characters of it identify a key and do not help to guess it."""
START = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt]))"
"""Start of a token; also after an escaped line break, as in code and in JSON inside a text."""
END = r"(?![A-Za-z0-9_-])"


class Finding(NamedTuple):
    """A secret or personal data in a text.

    Attributes:
        kind: Name of the kind.
        start: Position of the first character.
        end: Position after the last character.
        shown: The span with its essential part hidden.
        is_example: Whether it is a placeholder, such as an address at example.com.
    """

    kind: str
    start: int
    end: int
    shown: str
    is_example: bool = False


def ends(secret: str) -> str:
    """The first four and the last two characters of a long secret; the first one of a short one."""
    return f"{secret[:4]}{HIDDEN}{secret[-2:]}" if len(secret) >= LONG else f"{secret[:1]}{HIDDEN}"


def _any(text: str) -> bool:
    return True


def _none(text: str) -> bool:
    return False


@dataclass(frozen=True)
class Kind:
    """A kind of secret or personal data.

    Attributes:
        name: Its name in the check's metadata.
        pattern: Matches it. A group `secret` is the span to hide, if it is only a part of the match.
        hints: Texts without any of these are not searched.
        is_valid: Whether a span is one, beyond its pattern (a checksum, for example).
        hide: The span as it is shown.
        is_example: Whether a valid span is a placeholder.
        sieve: Expression that a text must match to be searched, in the syntax that Python and RE2 share; empty if the
            hints are enough.
    """

    name: str
    pattern: re.Pattern[str]
    hints: tuple[str, ...]
    is_valid: Callable[[str], bool] = field(default=_any)
    hide: Callable[[str], str] = field(default=ends)
    is_example: Callable[[str], bool] = field(default=_none)
    sieve: str = ""

    def find(self, text: str) -> list[Finding]:
        """All of this kind in a text, in order."""
        hints = self.hints
        if not (any(hint in text for hint in hints) if hints else re.search(self.sieve, text)):
            return []
        findings = []
        group = "secret" if "secret" in self.pattern.groupindex else 0
        for match in self.pattern.finditer(text):
            span = match[group]
            if self.is_valid(span):
                findings.append(Finding(self.name, *match.span(group), self.hide(span), self.is_example(span)))
        return findings


def entropy(text: str) -> float:
    """Shannon entropy of a text's characters, in bits per character."""
    return -math.fsum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())
