"""What is found wrong with good rows."""

from typing import Any

import numpy as np
import pytest

from finetune_assets.data.quality import Inspector, Quality, distance, inspect_rows


def row(instruction: str, response: str = "It is so.", context: str = "", messages: Any = None) -> dict[str, Any]:
    return {
        "instruction": instruction,
        "context": context,
        "response": response,
        "category": "",
        "messages": messages,
    }


def inspected(*rows: dict[str, Any], threshold: float | None = 0.8) -> Quality:
    inspector = Inspector(threshold)
    inspector.add(inspect_rows(rows, threshold))
    return inspector.sum_up()


@pytest.mark.parametrize("threshold", [0.8, None])
def test_repeated_rows_are_counted_and_named(threshold: float | None) -> None:
    rows = row("Why?"), row("Who?"), row("Why?"), row("WHY ?!"), row("Why?"), row("who")
    found = inspected(*rows, threshold=threshold)
    assert (found.duplicates, found.first_duplicates) == (2, [(2, 0), (4, 0)])
    assert (found.near_duplicates, found.first_near_duplicates) == (2, [(3, 0), (5, 1)])


def test_a_few_changed_words_make_a_near_duplicate() -> None:
    text = "The river rises in the hills above the town and flows for ninety miles to the sea, past mills and meadows. "
    answer = (
        "Merchants built the bridge in the year after the flood, and their guild still pays for its repair each spring."
    )
    rows = row(text, answer), row(text + "Why?", answer), row("A question of another kind.", answer)
    found = inspected(*rows)
    assert (found.duplicates, found.near_duplicates, found.first_near_duplicates) == (0, 1, [(1, 0)])
    assert inspected(*rows, threshold=None).near_duplicates == 0


@pytest.mark.parametrize("threshold", [0.8, None])
def test_symbols_tell_rows_apart(threshold: float | None) -> None:
    rows = [row(f"What is 3 {sign} 4?", "I do not know.") for sign in "+-*/<>=%^"]
    assert inspected(*rows, row("what is 3+4", "I do not know"), threshold=threshold).first_near_duplicates == [(9, 0)]


def test_another_answer_or_context_is_no_repetition() -> None:
    found = inspected(row("Why?"), row("Why?", "Because."), row("Why?", context="A text."))
    assert (found.duplicates, found.near_duplicates) == (0, 0)


def test_parts_of_a_row_do_not_run_into_one_another() -> None:
    found = inspected(row("ab", "c"), row("a", "bc"), row("a b", "c"), row("a", "b c"))
    assert (found.duplicates, found.near_duplicates) == (0, 0)


def test_conversations_differ_by_all_their_turns() -> None:
    def talk(last: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": last}]
        return row("Hi", "Bye", messages=turns)

    assert inspected(talk("one"), talk("two")).duplicates == 0
    assert inspected(talk("one"), talk("one")).duplicates == 1


@pytest.mark.parametrize(
    ("instruction", "context", "response", "leaks"),
    [
        ("Repeat: the quick brown fox jumps.", "", "The quick brown fox jumps", True),
        ("Name the animal.", "The quick brown fox jumps over it.", "The quick brown fox jumps", False),
        ("Is a whale a fish or a mammal?", "", "a mammal", False),
        ("Name the animal.", "", "The quick brown fox jumps", False),
    ],
)
def test_response_in_its_instruction_leaks(instruction: str, context: str, response: str, leaks: bool) -> None:
    found = inspected(row(instruction, response, context))
    assert (found.leaked, found.first_leaked) == ((1, [0]) if leaks else (0, []))


def test_no_rows() -> None:
    assert inspected() == Quality(near_duplicate_threshold=0.8)


def test_rows_beyond_one_batch_keep_their_numbers() -> None:
    rows = [row(f"Question {i}?") for i in range(2_500)]
    leaking = row("Repeat: the quick brown fox jumps.", "The quick brown fox jumps")
    found = inspected(*rows, leaking, row("question 7"), row("Question 2400?"))
    assert (found.first_near_duplicates, found.first_duplicates) == ([(2_501, 7)], [(2_502, 2_400)])
    assert found.first_leaked == [2_500]


def test_distance_is_total_variation() -> None:
    assert distance({"a": 1, "b": 1}, {"a": 50, "b": 50}) == 0
    assert distance({"a": 1}, {"b": 1}) == 1
    assert distance({"a": 3, "b": 1}, {"a": 1, "b": 1}) == pytest.approx(0.25)
    assert distance({}, {}) == 0
    assert distance({}, {"a": 1}) == 1
    ours, others = (np.random.default_rng(seed).integers(1, 9, 6) for seed in (0, 1))
    expected = abs(ours / ours.sum() - others / others.sum()).sum() / 2
    names = "abcdef"
    assert distance(
        dict(zip(names, map(int, ours), strict=True)), dict(zip(names, map(int, others), strict=True))
    ) == pytest.approx(expected)
