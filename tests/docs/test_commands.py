"""What the documentation shows works: its commands run, print what stands there, and its files are right."""

from collections.abc import Callable
from pathlib import Path

import pytest
from reading.blocks import FIRST_RUN, MUST_BE_MARKED, PAGES, blocks
from reading.reader import Reader

RUNNABLE = [page for page in PAGES if page != FIRST_RUN and any(b.mark == "run" or b.file for b in blocks(page))]


def test_the_first_page(first_run: Path) -> None:
    assert list((first_run / ".finetune" / "store").glob("*/adapters/*/manifest.json"))


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_a_page(page: Path, reader_of: Callable[[Path], Reader]) -> None:
    reader_of(page).follow(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_goes_untested_in_silence(page: Path) -> None:
    bare = [b.where for b in blocks(page) if b.language in MUST_BE_MARKED and not (b.mark or b.file)]
    assert not bare, f"say `<!-- run -->` or `<!-- not run: reason -->` above; see tests/docs/blocks.py: {bare}"
    assert {b.mark for b in blocks(page)} <= {"", "run", "output", "not run"}
    assert all(b.option for b in blocks(page) if b.mark == "not run"), "a reason is needed"
