"""Citations: numbers of passages at the end of an answer, such as `Paris [2]`."""

import re
from collections.abc import Sequence

AT_THE_END = re.compile(r"\s*((?:\[[0-9]{1,3}\][\s.]*)+)$")
NUMBER = re.compile("[0-9]+")


def with_citations(answer: str, numbers: Sequence[int]) -> str:
    """An answer that cites passages."""
    return f"{answer.rstrip()} {''.join(f'[{number}]' for number in numbers)}"


def cited(answer: str) -> list[int]:
    """Numbers of the passages that an answer cites at its end."""
    found = AT_THE_END.search(answer)
    return [int(number) for number in NUMBER.findall(found[1])] if found else []


def without_citations(answer: str) -> str:
    """An answer without the citations at its end."""
    return AT_THE_END.sub("", answer)
