"""When raw data counts as new."""

from dataclasses import dataclass

import pytest

from finetune_assets.automation.change_detection import Observation, SensorCursor, observe
from finetune_assets.config.raw_data_schema import Arrivals


@dataclass
class Folder:
    """Raw data whose look, content and rows the test sets."""

    looks: str = "1"
    holds: str = "A"
    count: int = 100
    read: int = 0

    def peek(self) -> str:
        return self.looks

    def version(self) -> str:
        self.read += 1
        return self.holds

    def rows(self) -> int:
        return self.count


@dataclass
class Clock:
    """Looks again and again, five seconds apart."""

    folder: Folder
    settings: Arrivals
    seen: SensorCursor = SensorCursor()  # noqa: RUF009
    now: float = 1_000_000.0

    def look(self, seconds: float = 5.0) -> Observation:
        self.now += seconds
        found = observe(self.folder, SensorCursor.read(self.seen.write()), self.settings, self.now)
        self.seen = found.seen
        return found

    def until_start(self, looks: int = 20) -> int | None:
        """How many looks it takes until something is started."""
        return next((number for number in range(1, looks + 1) if self.look().starts), None)


@pytest.fixture
def clock() -> Clock:
    return Clock(Folder(), Arrivals())


def test_first_data_is_read_once_it_is_still(clock: Clock) -> None:
    first = clock.look()
    assert not first.starts
    assert "4 s" in first.message
    assert clock.folder.read == 0, "nothing is read while it may still grow"
    assert clock.look().starts
    assert not clock.until_start()
    assert clock.seen.settled == clock.folder.looks
    read = clock.folder.read
    clock.look()
    assert clock.folder.read == read


def test_growing_file_is_waited_for(clock: Clock) -> None:
    for size in range(10):
        clock.folder.looks = str(size)
        assert not clock.look().starts
    assert clock.folder.read == 0
    assert clock.until_start() == 1


def test_files_that_drip_in_are_gathered(clock: Clock) -> None:
    clock.settings = Arrivals(quiet_seconds=30)
    for number in range(8):
        clock.folder.looks = str(number)
        assert not clock.look(10).starts
    assert clock.look(30).starts


def test_touched_or_renamed_is_not_new(clock: Clock) -> None:
    clock.until_start()
    clock.folder.looks = "touched"
    assert not clock.look().starts
    assert clock.seen.settled != "touched"
    assert not clock.look().starts
    assert clock.seen.settled == "touched"
    read = clock.folder.read
    clock.look()
    assert clock.folder.read == read, "what was settled is not read again"


def test_earlier_version_that_comes_back_is_new(clock: Clock) -> None:
    keys = []
    for looks, holds in (("1", "A"), ("2", "B"), ("3", "A")):
        clock.folder.looks, clock.folder.holds = looks, holds
        assert clock.until_start(), holds
        keys.append(f"{clock.seen.number}-{clock.seen.version}")
    assert keys == ["1-A", "2-B", "3-A"], "Dagster never runs one key twice"


def test_change_that_is_taken_back_at_once_starts_nothing(clock: Clock) -> None:
    clock.until_start()
    clock.folder.looks, clock.folder.holds = "2", "B"
    clock.look()
    clock.folder.looks, clock.folder.holds = "1", "A"
    assert not clock.until_start()


def test_few_rows_wait_for_more_and_not_for_ever(clock: Clock) -> None:
    clock.settings = Arrivals(min_new_rows=50, max_wait_seconds=600)
    assert clock.until_start(), "there is nothing to add to"
    clock.folder.looks, clock.folder.holds, clock.folder.count = "2", "B", 120
    assert not clock.until_start(looks=10)
    assert {"+20", "50);"} <= set(clock.look().message.split())
    clock.folder.looks, clock.folder.holds, clock.folder.count = "3", "C", 150
    assert clock.until_start() == 2
    clock.folder.looks, clock.folder.holds, clock.folder.count = "4", "D", 149
    assert not clock.until_start(looks=100)
    assert clock.look(200).starts


def test_rows_that_are_gone_count_as_well(clock: Clock) -> None:
    clock.settings = Arrivals(min_new_rows=50)
    clock.until_start()
    clock.folder.looks, clock.folder.holds, clock.folder.count = "2", "B", 40
    assert clock.until_start() == 2
