"""Refuses regular expressions whose matching may take exponentially long."""

import re
from math import log2
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

LONGEST, MOST_BITS = 1_000, 18
"""Maximum length of a pattern, and maximum logarithm of the number of ways in which it may match a name."""
FEW, BITS_OF_REPEAT = 16, 6
"""Repetitions up to which a repeat counts as its part written several times; any other may begin and end anywhere."""
REPEATS = 1_000, 4
"""Maximum length of a pattern, and number of its parts that may repeat without a limit."""
FEW = 16
"""Repetitions up to which a repeat is as harmless as writing its part several times."""
REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)


def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression is not used, or None: it is invalid, or may match forever.

    Each repeat multiplies the time by the length of the name, and a repeat, or a choice, inside of a repeat makes it
    exponential.
    """
    if len(pattern) > LONGEST:
        return f"a pattern of {len(pattern):,} characters; at most {LONGEST:,} are supported"
    try:
        parsed = _parser.parse(pattern)
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        return f"not a valid regular expression: {e}"
    try:
        bits = _bits(parsed)
    except ValueError as e:
        return str(e)
    if bits > MOST_BITS:
        return f"more repeats and choices than can be tried in time; at most {MOST_BITS // BITS_OF_REPEAT} such as `.*`"
    return None


def _bits(parsed: Any, inside: bool = False) -> float:
    """Logarithm of the number of ways in which a pattern may match a name.

    Raises:
        ValueError: if a long repeat contains a repeat or a choice, or if the pattern refers to what it has matched.
    """
    bits = 0.0
    for kind, value in parsed:
        if kind in REPEATS:
            least, most, part = value
            is_long = most > FEW and most > least
            if inside and most > 1:
                raise ValueError("a repeat inside of a repeat, which may match forever; write it without nesting")
            own = BITS_OF_REPEAT if is_long else log2(most - least + 1)
            bits += own + _bits(part, inside or most > FEW) * min(most, LONGEST)
        elif kind is _constants.BRANCH:
            if inside:
                raise ValueError("a choice inside of a repeat, which may match forever; write it without nesting")
            bits += log2(len(value[1])) + max(_bits(part) for part in value[1])
        elif kind in (_constants.GROUPREF, _constants.GROUPREF_EXISTS):
            raise ValueError("a reference to a group, which is not supported")
        else:
            bits += sum(_bits(part, inside) for part in _inner(value))
    return bits


def _inner(value: Any) -> list[Any]:
    """The patterns inside of a group or a condition."""
    if isinstance(value, _parser.SubPattern):
        return [value]
    return [part for part in value if isinstance(part, _parser.SubPattern)] if isinstance(value, tuple | list) else []
