"""What the documentation shows works: its commands run, print what stands there, and its files are right."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from reading.blocks import FIRST_RUN, MUST_BE_MARKED, PAGES, blocks
from reading.reader import Reader

RUNNABLE = [page for page in PAGES if page != FIRST_RUN and any(b.mark == "run" or b.file for b in blocks(page))]


def test_the_demo_learns_to_answer_and_trains_nothing_twice(first_run: Path) -> None:
    """`make demo` as a newcomer meets it on the first page, twice."""
    first, second, _ = json.loads((first_run / "said.json").read_text())
    before, after = re.search(r"exact match\W+(\d+)%\W+(\d+)%", first).groups()  # type: ignore[union-attr]
    assert int(before) <= 5
    assert int(after) >= 70
    loss = re.search(r"│ held-out loss\W+([\d.]+)\W+([\d.]+)", first)
    assert loss
    assert float(loss[2]) < float(loss[1])
    assert first.count("├") == 4, "five answers side by side"
    assert "Nothing was trained again" not in first
    assert "Nothing was trained again" in second
    assert "make ui" in first
    (manifest,) = (first_run / ".finetune" / "store").glob("*/adapters/*/manifest.json")
    assert manifest.parent.name in first.replace("\n", "")


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_a_page(page: Path, reader_of: Callable[[Path], Reader]) -> None:
    reader_of(page).follow(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_goes_untested_in_silence(page: Path) -> None:
    bare = [b.where for b in blocks(page) if b.language in MUST_BE_MARKED and not (b.mark or b.file)]
    assert not bare, f"say `<!-- run -->` or `<!-- not run: reason -->` above; see tests/docs/blocks.py: {bare}"
    assert {b.mark for b in blocks(page)} <= {"", "run", "output", "not run"}
    assert all(b.option for b in blocks(page) if b.mark == "not run"), "a reason is needed"
