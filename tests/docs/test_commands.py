"""What the documentation shows works: its commands run, print what stands there, and its files are right."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from reading.blocks import FIRST_RUN, MUST_BE_MARKED, PAGES, blocks
from reading.reader import Reader

pytestmark = pytest.mark.timeout(1800)  # the first page trains the whole demo, and the others wait for it
FOR_EVERY_CHANGE = "extending-index"
"""The page with commands that `make test` follows; the others are in `make test-system`."""


def tier(page: Path) -> tuple[pytest.MarkDecorator, ...]:
    """Of a page: those that show files and no commands are for every change too."""
    runs = any(block.mark == "run" for block in blocks(page))
    return (pytest.mark.system,) if runs and page.stem != FOR_EVERY_CHANGE else ()


SHOWS_SOMETHING = [
    pytest.param(page, marks=tier(page), id=page.stem)
    for page in PAGES
    if page != FIRST_RUN and any(block.mark == "run" or block.file for block in blocks(page))
]


@pytest.mark.minutes
@pytest.mark.system
def test_the_demo_learns_to_answer_and_trains_nothing_twice(first_run: Path) -> None:
    """`make demo` as a newcomer meets it on the first page, twice, and then the same graph in their own deployment.

    There, the adapter is found by its fingerprint: the demo's is put beside, so that it is not trained a second time.
    """
    first, second, own = json.loads((first_run / "said.json").read_text())
    store = first_run / ".finetune" / "store"
    (evaluated,) = store.glob("*-demo/evaluations/*/*/evaluation.json")
    evaluation = json.loads(evaluated.read_text())
    base, challenger = evaluation["contenders"]["base"], evaluation["contenders"]["challenger"]
    assert base["exact_match"] <= 0.05
    assert challenger["exact_match"] >= 0.7
    assert challenger["loss"] < base["loss"]
    for printed in (first, second):
        assert f"{base['exact_match']:.1%}" in printed
        assert f"{challenger['exact_match']:.1%}" in printed
        assert all(sample["expected"] in printed for sample in evaluation["samples"][:5])
        assert "make demo-ui" in printed
    demos, yours = sorted(store.glob("*/adapters/*/manifest.json"), key=lambda path: "-demo/" not in str(path))
    assert demos.parent.name in first.replace("\n", "")
    assert yours.parent.name in own.replace("\n", "")
    assert demos.parent.name == yours.parent.name, "the same rows, settings and code"
    for asset in ("lora_adapter", "adapter_evaluation"):
        assert cache_hits(first_run / ".finetune" / "demo", asset) == [False, True]
    own_evaluations = cache_hits(first_run / ".dagster_home", "adapter_evaluation")
    assert own_evaluations == [False], "the demo does nothing in a user's deployment"


def cache_hits(home: Path, asset: str) -> list[bool]:
    """Whether the store had it already, for each materialization."""
    with dg.DagsterInstance.from_config(str(home)) as instance:
        found = instance.fetch_materializations(dg.AssetKey(asset), limit=10, ascending=True).records
    made = [record.asset_materialization for record in found]
    return [bool(one.metadata["cache_hit"].value) for one in made if one]


@pytest.mark.parametrize("page", SHOWS_SOMETHING)
def test_a_page(page: Path, reader_of: Callable[[Path], Reader]) -> None:
    reader_of(page).follow(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_goes_untested_in_silence(page: Path) -> None:
    bare = [b.where for b in blocks(page) if b.language in MUST_BE_MARKED and not (b.mark or b.file)]
    assert not bare, f"say `<!-- run -->` or `<!-- not run: reason -->` above; see tests/docs/blocks.py: {bare}"
    assert {b.mark for b in blocks(page)} <= {"", "run", "output", "not run", "accepted", "becomes", "refused"}
    assert all(b.option for b in blocks(page) if b.mark == "not run"), "a reason is needed"
