"""The history of a source, and which of its versions are earlier ones."""

from projects import TestProject

from finetune_assets.artifacts.kinds import RAW
from finetune_assets.artifacts.streams import earlier_versions, record_good
from finetune_assets.store.artifacts import ArtifactRef


def publish(project: TestProject, digit: str) -> ArtifactRef:
    folder = project.root / digit
    folder.mkdir()
    (folder / "rows.parquet").write_text(digit)
    return project.store.publish(folder, RAW.folder, digit * 64, digit * 64, {})


def test_earlier_versions_are_good_ones_of_the_same_source(project: TestProject) -> None:
    first, second, third, bad = (publish(project, digit) for digit in "abcd")
    for version in (first, second, third):
        record_good(project.store, "inbox", version.fingerprint)
    record_good(project.store, "other", "e" * 64)
    names = [ref.fingerprint for ref in earlier_versions(project.store, "inbox", third.fingerprint)]
    assert names == [first.fingerprint, second.fingerprint]
    record_good(project.store, "inbox", first.fingerprint)
    assert earlier_versions(project.store, "inbox", first.fingerprint) == [], "its history is that of its first time"
    assert len(earlier_versions(project.store, "inbox", bad.fingerprint)) == 3, "a version that is not good yet"


def test_a_version_that_was_collected_is_left_out(project: TestProject) -> None:
    second = publish(project, "b")
    record_good(project.store, "inbox", "a" * 64)
    record_good(project.store, "inbox", second.fingerprint)
    assert earlier_versions(project.store, "inbox", second.fingerprint) == []
