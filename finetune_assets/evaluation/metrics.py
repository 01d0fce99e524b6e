"""How answers are judged."""


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same but for case, white space and a final full stop."""
    return _folded(answer) == _folded(expected)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
