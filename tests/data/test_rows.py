"""The split: by content, for ever."""

from collections import Counter

import pytest

from finetune_assets.config.schema import Data
from finetune_assets.data.rows import HoldoutRows, Split, draw, side_of
from finetune_assets.sample.world import instruction_rows, make_world

ROWS = instruction_rows(make_world())


def sides(data: Data, salt: str = "salt") -> list[Split]:
    return [side_of(draw(row["instruction"], row["context"], salt), data) for row in ROWS]


def test_shares_are_about_those_asked_for() -> None:
    counts = Counter(sides(Data(val_fraction=0.2, gate_fraction=0.1)))
    assert 0.15 < counts[Split.VAL] / len(ROWS) < 0.25
    assert 0.06 < counts[Split.GATE] / len(ROWS) < 0.14


@pytest.mark.parametrize(
    ("instruction", "context"),
    [("Who came?", "a b"), ("  who  CAME? ", "A\n b"), ("Who came?", "\uff41 b")],
)
def test_a_row_that_reads_the_same_stands_on_the_same_side(instruction: str, context: str) -> None:
    assert draw(instruction, context, "salt") == draw("Who came?", "a b", "salt")


def test_instruction_and_context_are_told_apart() -> None:
    assert draw("ab", "", "salt") != draw("a", "b", "salt")


def test_growing_one_held_out_part_moves_no_row_of_the_other() -> None:
    before = sides(Data(val_fraction=0.1, gate_fraction=0.1))
    after = sides(Data(val_fraction=0.3, gate_fraction=0.1))
    moved = {(old, new) for old, new in zip(before, after, strict=True) if old != new}
    assert moved == {(Split.TRAIN, Split.VAL)}


def test_the_salt_deals_anew() -> None:
    data = Data(val_fraction=0.5, gate_fraction=0.0)
    assert sides(data, "salt") != sides(data, "other")


def test_fractions_of_zero_hold_nothing_out() -> None:
    assert set(sides(Data(val_fraction=0.0, gate_fraction=0.0))) == {Split.TRAIN}


def test_what_is_held_back_by_two_is_what_neither_has_seen() -> None:
    one, two = HoldoutRows("salt", gate=0.2, val=0.1), HoldoutRows("salt", gate=0.1, val=0.3)
    assert one & two == two & one == HoldoutRows("salt", 0.1, 0.1)
    for end in (Split.GATE, Split.VAL):
        by_each = [[held.holds(row["instruction"], row["context"], end) for row in ROWS] for held in (one, two)]
        both = [(one & two).holds(row["instruction"], row["context"], end) for row in ROWS]
        assert both == [a and b for a, b in zip(*by_each, strict=True)]
        assert 0 < sum(both) < max(map(sum, by_each))
    mixed = one & HoldoutRows("other", 0.2, 0.1)
    assert not any(mixed.holds(row["instruction"], row["context"], Split.GATE) for row in ROWS)


def test_what_is_held_back_is_that_side_of_the_split() -> None:
    data = Data(gate_fraction=0.2, val_fraction=0.1)
    held = HoldoutRows("salt", data.gate_fraction, data.val_fraction)
    for row, side in zip(ROWS, sides(data), strict=True):
        for end in (Split.GATE, Split.VAL):
            assert held.holds(row["instruction"], row["context"], end) == (side == end)
