"""Checkpoints in the store: a training that goes on elsewhere, and one that was given up and does not know it."""

from pathlib import Path

import pytest

from finetune_assets.artifacts.kinds import RETENTION
from finetune_assets.config.schema import StoreConfig
from finetune_assets.store.artifacts import ArtifactStore, open_store
from finetune_assets.store.checkpoints import Checkpoints, Superseded
from finetune_assets.store.gc import inventory, plan

FINGERPRINT = "c" * 64


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(f"file://{tmp_path}/store", "me", tmp_path / "cache")


def begun(store: ArtifactStore, local: Path, keep: int = 2) -> Checkpoints:
    local.mkdir(parents=True, exist_ok=True)
    return Checkpoints(store, FINGERPRINT, {"experiment": "demo"}, local, keep)


def write(local: Path, step: int, text: str = "state") -> None:
    folder = local / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text(f"{text} {step}")


def stored(store: ArtifactStore) -> list[str]:
    return sorted(artifact.name for artifact in inventory(store.objects).artifacts)


def test_training_goes_on_on_another_machine(store: ArtifactStore, tmp_path: Path) -> None:
    first = begun(store, tmp_path / "one")
    for step in (5, 10):
        write(first.local, step)
        first.publish_new()
    other = begun(open_store(store.url, "me", tmp_path / "elsewhere"), tmp_path / "two")
    assert other.attempt == first.attempt + 1
    other.fetch_newest()
    assert [path.name for path in other.local.iterdir()] == ["step-00000010"]
    assert (other.local / "step-00000010" / "optimizer.pt").read_text() == "state 10"


def test_what_is_here_and_newer_stays(store: ArtifactStore, tmp_path: Path) -> None:
    first = begun(store, tmp_path / "one")
    write(first.local, 5)
    first.publish_new()
    other = begun(store, tmp_path / "two")
    write(other.local, 7, "own")
    other.fetch_newest()
    assert [path.name for path in other.local.iterdir()] == ["step-00000007"]


def test_only_the_newest_stay_in_the_store(store: ArtifactStore, tmp_path: Path) -> None:
    first = begun(store, tmp_path / "one", keep=2)
    for step in (1, 2, 3, 4):
        write(first.local, step)
        first.publish_new()
        first.publish_new()
    assert [name.rpartition("-")[2] for name in stored(store)] == ["00000003", "00000004"]


def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    store: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = begun(store, tmp_path / "one")
    for step in (5, 10):
        write(first.local, step)
        first.publish_new()
    (newest,) = Path(tmp_path / "store").glob("**/step-00000010/*/optimizer.pt")
    newest.write_text("wrong 10")
    other = begun(open_store(store.url, "me", tmp_path / "elsewhere"), tmp_path / "two")
    other.fetch_newest()
    assert (other.local / "step-00000005" / "optimizer.pt").read_text() == "state 5"
    assert "step-00000010" in caplog.text


def test_attempt_that_was_given_up_publishes_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    first = begun(store, tmp_path / "one")
    write(first.local, 5)
    second = begun(store, tmp_path / "two")
    with pytest.raises(Superseded):
        first.publish_new()
    assert stored(store) == []
    second.check_current()


def test_attempt_that_fails_leaves_its_checkpoints_or_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    first = begun(store, tmp_path / "one")
    first.give_up()
    assert not list(store.objects.listing())
    second = begun(store, tmp_path / "one")
    write(second.local, 5)
    second.publish_new()
    second.give_up()
    assert len(stored(store)) == 1
    assert begun(store, tmp_path / "two").attempt == 2


def test_store_that_does_not_answer_ends_no_training(
    store: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(store, tmp_path / "one")
    write(first.local, 5)
    monkeypatch.setattr(store, "publish", lambda *args: (_ for _ in ()).throw(OSError("the disk is full")))
    first.publish_new()
    assert "the disk is full" in caplog.text
    monkeypatch.undo()
    first.publish_new()
    assert len(stored(store)) == 1


def test_nothing_is_left_of_a_training_that_is_done(store: ArtifactStore, tmp_path: Path) -> None:
    first, second = begun(store, tmp_path / "one"), begun(store, tmp_path / "two")
    write(second.local, 5)
    second.publish_new()
    second.clear()
    assert not list(store.objects.listing())
    assert first.attempt == 1


def test_what_a_training_that_was_given_up_left_is_collected(store: ArtifactStore, tmp_path: Path) -> None:
    first = begun(store, tmp_path / "one")
    write(first.local, 5)
    first.publish_new()
    assert plan(inventory(store.objects), "me", StoreConfig(), RETENTION) == []
    going = plan(inventory(store.objects), "me", StoreConfig(keep_days=0), RETENTION)
    assert {removal.prefix.rpartition("/")[2] for removal in going} == {"000001", "step-00000005"}
