"""Champions: numbered records, none lost or torn, whoever promotes at once or dies meanwhile."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from finetune_assets.artifacts.champions import ChampionMoved, Champions, Record
from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore, open_store
from finetune_assets.store.errors import ArtifactMissing, StoreError

SPAWN = multiprocessing.get_context("spawn")  # the object store client's threads do not survive a fork
KILLS, WRITERS = (50, 8) if os.environ.get("SOAK") else (3, 4)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")


@pytest.fixture
def adapter(store: ArtifactStore, tmp_path: Path) -> Callable[[int], ArtifactRef]:
    """Publishes the adapter of a number."""

    def publish(number: int) -> ArtifactRef:
        folder = tmp_path / "made" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(bytes([number]) * 100)
        name = f"{number:064x}"
        return store.publish(folder, ADAPTERS.folder, name, name, {})

    return publish


def promoted(adapter: ArtifactRef, **more: object) -> Record:
    return Record("demo", adapter.fingerprint, "promoted", **more)  # type: ignore[arg-type]


def test_the_highest_record_is_current(store: ArtifactStore, adapter: Callable[[int], ArtifactRef]) -> None:
    champions = Champions(store, "demo")
    assert champions.current() is None
    assert champions.champion() is None
    for number in range(1, 12):
        champions.promote(promoted(adapter(number), reason="better"), after=number - 1)
    assert champions.champion() == adapter(11)
    assert [record.number for record in champions.history()] == [*range(1, 12)]
    assert [record.before for record in champions.history()] == [None, *(f"{n:064x}" for n in range(1, 11))]
    assert Champions(store, "other").current() is None
    assert Champions(store, "dem").current() is None, "another experiment whose name begins so"


def test_a_decision_against_an_earlier_champion_is_refused(
    store: ArtifactStore, adapter: Callable[[int], ArtifactRef]
) -> None:
    champions = Champions(store, "demo")
    champions.promote(promoted(adapter(1)), after=0)
    with pytest.raises(ChampionMoved):
        champions.promote(promoted(adapter(2)), after=0)
    assert len(champions.history()) == 1


def test_a_person_promotes_with_a_reason(store: ArtifactStore, adapter: Callable[[int], ArtifactRef]) -> None:
    champions = Champions(store, "demo")
    with pytest.raises(StoreError, match="--reason"):
        champions.promote_by_hand(adapter(1), " ", "me")
    record = champions.promote_by_hand(adapter(1), "the first", "me")
    assert record is not None
    assert (record.action, record.reason, record.by) == ("promoted by hand", "the first", "me")
    assert champions.promote_by_hand(adapter(1), "again", "me") is None, "an identical adapter is a no-op"
    assert len(champions.history()) == 1


def test_roll_back_is_a_record_and_restores_the_files(
    store: ArtifactStore, adapter: Callable[[int], ArtifactRef]
) -> None:
    champions = Champions(store, "demo")
    with pytest.raises(StoreError, match="demo"):
        champions.roll_back("why not", "me")
    for number in (1, 2, 3):
        against = f"{number - 1:064x}" if number > 1 else None
        champions.promote(promoted(adapter(number), against=against, evaluation=f"{number}" * 64), after=number - 1)
    back = champions.roll_back("it stutters", "me")
    assert (back.number, back.adapter, back.before) == (4, adapter(2).fingerprint, adapter(3).fingerprint)
    assert (back.against, back.evaluation) == (adapter(1).fingerprint, "2" * 64), "as when it was promoted"
    assert (store.fetch(champions.champion()) / "adapter_model.safetensors").read_bytes() == b"\2" * 100  # type: ignore[arg-type]
    assert champions.withdrawn().keys() == {adapter(3).fingerprint}
    assert champions.roll_back("further", "me").adapter == adapter(1).fingerprint, "not what was rolled back itself"
    with pytest.raises(StoreError, match=r"\b5\b"):
        champions.roll_back("all the way", "me")
    assert champions.withdrawn().keys() == {adapter(2).fingerprint, adapter(3).fingerprint}
    champions.promote_by_hand(adapter(3), "it was the microphone", "me")
    assert champions.withdrawn().keys() == {adapter(2).fingerprint}
    for wrong in (9, 3):
        with pytest.raises(StoreError, match=rf"\b{wrong}\b"):
            champions.roll_back("so", "me", to=wrong)
    assert len(champions.history()) == 6


def test_the_first_champion_has_none_before_it(store: ArtifactStore, adapter: Callable[[int], ArtifactRef]) -> None:
    champions = Champions(store, "demo")
    champions.promote(promoted(adapter(1)), after=0)
    with pytest.raises(StoreError, match=r"\b1\b"):
        champions.roll_back("so", "me")


def test_a_champion_that_is_gone_is_refused(store: ArtifactStore, adapter: Callable[[int], ArtifactRef]) -> None:
    champions = Champions(store, "demo")
    champions.promote(promoted(adapter(1)), after=0)
    champions.promote(promoted(adapter(2)), after=1)
    store.objects.delete([f"{store.prefix(ADAPTERS.folder, adapter(2).name)}/manifest.json"])
    with pytest.raises(ArtifactMissing, match=f"{2:064x}"):
        champions.champion()
    assert champions.roll_back("lost", "me").adapter == adapter(1).fingerprint


def test_a_record_that_is_none_is_refused_with_its_key(store: ArtifactStore) -> None:
    store.objects.put("me/champions/demo/00000001.json", b"{")
    store.objects.put("me/champions/demo/notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"champions/demo/00000001\.json"):
        Champions(store, "demo").current()


def _promote(root: Path, number: int, ready: object) -> None:
    store = open_store(f"file://{root}/store", "me", root / f"cache-{number}")
    ref = store.find(ADAPTERS.folder, f"{number:064x}")
    assert ref is not None
    ready.wait()  # type: ignore[attr-defined]
    Champions(store, "demo").promote_by_hand(ref, f"reason {number}", f"process {number}")


def test_of_several_at_once_each_has_its_line(
    store: ArtifactStore, adapter: Callable[[int], ArtifactRef], tmp_path: Path
) -> None:
    ready = SPAWN.Barrier(WRITERS)
    for number in range(WRITERS):
        adapter(number)
    processes = [SPAWN.Process(target=_promote, args=(tmp_path, number, ready)) for number in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    history = Champions(store, "demo").history()
    assert [record.number for record in history] == [*range(1, WRITERS + 1)]
    assert sorted(record.reason for record in history) == [f"reason {number}" for number in range(WRITERS)]
    for before, record in pairwise(history):
        assert record.before == before.adapter


def _promote_for_ever(root: Path, told: object) -> None:
    store = open_store(f"file://{root}/store", "me", root / "cache-of-the-killed")
    champions, number = Champions(store, "demo"), 0
    told.set()  # type: ignore[attr-defined]
    while True:
        number += 1
        ref = store.find(ADAPTERS.folder, f"{number % 4:064x}")
        assert ref is not None
        champions.promote_by_hand(ref, "again", "the one that is killed")


def test_killed_in_promotion_leaves_the_old_or_the_new(
    store: ArtifactStore, adapter: Callable[[int], ArtifactRef], tmp_path: Path
) -> None:
    for number in range(4):
        adapter(number)
    champions, before = Champions(store, "demo"), 0
    for kill in range(KILLS):
        told = SPAWN.Event()
        process = SPAWN.Process(target=_promote_for_ever, args=(tmp_path, told))
        process.start()
        told.wait(60)
        time.sleep(0.05 + 0.37 * kill % 0.2)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        history = champions.history()
        assert [record.number for record in history] == [*range(1, len(history) + 1)], "none is torn, none is left out"
        assert len(history) > before
        assert champions.champion() == adapter(int(history[-1].adapter, 16))
        before = len(history)
