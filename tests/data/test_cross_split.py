"""Which training rows repeat a held-out row."""

import random
from typing import Any

import numpy as np
import pytest

from finetune_assets.data.cross_split import NearDuplicates, near_duplicates_across
from finetune_assets.data.rows import Row

LONG = " ".join(f"word{i}" for i in range(60))


def row(instruction: str, response: str = "It is so.", context: str = "") -> Row:
    return {"instruction": instruction, "context": context, "response": response, "category": "", "messages": None}


def talk(*said: str, system: str = "") -> Row:
    """A conversation; every other turn is the assistant's."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, said, strict=False)]
    before = [{"role": "system", "content": system}] if system else []
    last = said[len(said) - 1 - len(said) % 2]
    return {**row(said[0], last, system), "messages": [*before, *turns]}


def repeated(held_out: list[Row], train: list[Row], size: int = 1_000, **options: Any) -> NearDuplicates:
    """Training rows are numbered from 100."""

    def batches(rows: list[Row], first: int) -> Any:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield first + start + np.arange(len(batch)), batch

    return near_duplicates_across(batches(held_out, 0), batches(train, 100), **options)


@pytest.mark.parametrize(
    ("held_out", "train"),
    [
        (row("Who is it?"), row("who is IT", "another answer")),
        (row("Why?", context="A text."), row("why", context="a text")),
        (row(LONG), row(f"{LONG} please")),
        (row("Why?", context=LONG), row("Why then?", context=LONG)),
        (talk("Who?", "Me", system="Be kind."), talk("Who?", "Me", system="Be brief.")),
        (talk("Who?", "Me", system="Be kind."), row("Who?", "Me")),
        (row("Who?", "Me", context="You are a text."), talk("Who? You are a text.", "me", system="S")),
        (talk("Who?", "Me", system="Be kind."), talk("Who?", "You", system="be kind")),
        (talk("Hi", "Hello", "Who?", "Me"), talk("Hi", "Hello", system="S")),
        (talk("Hi", "Hello", system="S"), talk("Hi", "Hello", "Who?", "Me")),
        (talk("Hi", "Hello", "Who?", "Me"), talk("Hi!", "Hello", "Who?", "Me", "And?", "You")),
        (talk("Hi", "Hello", LONG, "Me"), talk("Yo", "Hey", LONG, "Me")),
        (talk("Hi", "Hello", "Who?", LONG), talk("Hi", "Hello", "Who?", f"{LONG} indeed", system="S")),
    ],
)
def test_near_duplicates(held_out: Row, train: Row) -> None:
    assert repeated([held_out], [train]) == NearDuplicates([100], [0], [0])
    assert repeated([train], [held_out]) == NearDuplicates([100], [0], [0])


@pytest.mark.parametrize(
    ("held_out", "train"),
    [
        (row("What is 3 + 4?", "7"), row("What is 3 * 4?", "12")),
        (row("What is 3 + 4?", "7"), row("What is 3 - 4?", "7")),
        (row("Summarize this.", context="One text."), row("Summarize this.", context="Another text.")),
        (row("ab", context="c"), row("a", context="bc")),
        (talk("Who?", "Me", system="Be kind."), talk("Who?", "You", system="Be brief.")),
        (talk("Hi", "Hello", "Who?", "Me"), talk("Hi", "Hello", "Why?", "So")),
        (talk("Hi", "Hello", "Thanks!", "You are welcome."), talk("Who?", "Me", "Thanks!", "You are welcome.")),
    ],
)
def test_different_rows(held_out: Row, train: Row) -> None:
    assert repeated([held_out], [train]) == NearDuplicates()


def test_the_first_held_out_row_is_named_and_all_are_listed() -> None:
    held_out = [row("Why?"), row("Who?"), row("WHY"), row("When?")]
    found = repeated(held_out, [row("Where?"), row("why!"), row("why"), row("who")], size=2)
    assert found == NearDuplicates([101, 102, 103], [0, 0, 1], [0, 1, 2])


def test_order_has_no_effect() -> None:
    rng = random.Random(0)
    vocabulary = LONG.split()
    texts = [rng.choices(vocabulary, k=50) for _ in range(200)]
    changed = [[word if rng.random() > 0.03 else "other" for word in text] for text in texts]
    held_out, train = [row(" ".join(text)) for text in texts], [row(" ".join(text)) for text in changed]
    found = repeated(held_out, train)
    backwards = repeated(held_out[::-1], train[::-1], size=7)
    assert 20 < len(found.train) < 200
    assert sorted(299 - number + 100 for number in backwards.train) == found.train
    left = [one for number, one in enumerate(train, 100) if number not in found.train]
    assert repeated(held_out, left) == NearDuplicates()


def test_many_equal_rows_are_fast() -> None:
    found = repeated([row("Why?")] * 5_000, [row("Why")] * 20_000)
    assert (len(found.train), len(found.all_held_out)) == (20_000, 5_000)


def test_no_rows() -> None:
    assert repeated([], [row("Why?")]) == repeated([row("Why?")], []) == NearDuplicates()
