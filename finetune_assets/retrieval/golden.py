"""Golden passages: those that a row's answer is in, known by the row's context."""

from finetune_assets.retrieval.passages import Passages


def golden_passages(passages: Passages, context: str) -> list[int]:
    """Numbers of the passages that a row's context consists of, in the order of the context; none if it has none.

    A context is compared as a whole, and then in the parts that the document set's settings split it into: a context
    of several passages has several golden ones. Parts that are no passages are left out.
    """
    if not context.strip():
        return []
    if (whole := passages.number_of(context)) is not None:
        return [whole]
    numbers = (passages.number_of(part) for part in passages.parts_of(context))
    return [*dict.fromkeys(number for number in numbers if number is not None)]
