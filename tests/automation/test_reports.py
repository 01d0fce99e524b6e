"""When the page about all experiments is asked for: after evaluations and champions, once, and never in a circle."""

from datetime import datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from finetune_assets.assets.experiment_report import experiment_report
from finetune_assets.automation.reports import SETTLED_SECONDS

KEY = experiment_report.key
BEFORE = ("adapter_evaluation", "champion_adapter", "stacked_adapter", "served_adapter")
EXPERIMENTS = dg.StaticPartitionsDefinition(["a", "b"])


class World:
    """The real condition behind assets that cost nothing; time passes when a test says so."""

    def __init__(self) -> None:
        self.instance, self.cursor = dg.DagsterInstance.ephemeral(), None
        self.failing, self.later = False, 0.0

    def assets(self) -> list[dg.AssetsDefinition]:
        def before(name: str) -> dg.AssetsDefinition:
            @dg.asset(name=name, partitions_def=EXPERIMENTS)
            def made() -> None: ...

            return made

        @dg.asset(
            name="experiment_report",
            deps=["adapter_evaluation"],
            automation_condition=experiment_report.automation_conditions_by_key[KEY],
        )
        def page() -> None:
            if self.failing:
                raise dg.Failure("as the test wants it", allow_retries=False)

        return [*map(before, BEFORE), page]

    def run(self, name: str, partition: str | None = None) -> None:
        job = dg.Definitions(assets=self.assets()).resolve_implicit_global_asset_job_def()
        job.execute_in_process(
            asset_selection=[dg.AssetKey(name)], partition_key=partition, instance=self.instance, raise_on_error=False
        )

    def look(self, later: float = SETTLED_SECONDS + 1) -> bool:
        """Whether the page is asked for, so many seconds from now; it is made then."""
        self.later += later
        result: Any = dg.evaluate_automation_conditions(
            dg.Definitions(assets=self.assets()),
            self.instance,
            cursor=self.cursor,
            evaluation_time=datetime.now().astimezone() + timedelta(seconds=self.later),
        )
        self.cursor = result.cursor
        asked = bool(result.get_num_requested(KEY))
        if asked:
            self.run("experiment_report")
        return asked


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_was_evaluated_yet(world: World) -> None:
    assert not world.look()


@pytest.mark.parametrize("name", BEFORE)
def test_each_of_any_partition_is_followed_once(world: World, name: str) -> None:
    for partition in ("a", "b"):
        world.run(name, partition)
        assert [world.look() for _ in range(3)] == [True, False, False]


def test_what_ends_together_shares_a_page(world: World) -> None:
    world.run("adapter_evaluation", "a")
    assert not world.look(later=1), "its champion may follow"
    world.run("champion_adapter", "a")
    world.run("adapter_evaluation", "b")
    assert world.look()
    assert not world.look()


def test_a_page_that_a_person_made_is_not_made_again(world: World) -> None:
    world.run("adapter_evaluation", "a")
    world.run("experiment_report")
    assert not world.look()


def test_a_page_that_failed_waits_for_something_new(world: World) -> None:
    world.failing = True
    world.run("adapter_evaluation", "a")
    assert [world.look() for _ in range(3)] == [True, False, False]
    world.failing = False
    assert not world.look()
    world.run("champion_adapter", "a")
    assert [world.look() for _ in range(2)] == [True, False]


def test_a_daemon_that_starts_anew_asks_for_nothing(world: World) -> None:
    world.run("adapter_evaluation", "a")
    assert world.look()
    world.cursor = None
    assert not world.look()
