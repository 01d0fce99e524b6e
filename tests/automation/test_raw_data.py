"""The sensor on real folders and a real S3 server: what starts, what does not, and what the tick says."""

import json
import os
import time
from pathlib import Path

import dagster as dg
import pytest
from projects import TestProject
from servers import ceph as ceph_server
from servers.s3 import Bucket
from tiers import tiered

from finetune_assets.automation import raw_data
from finetune_assets.automation.raw_data import raw_data_sensor

ROW = '{{"instruction": "Question {0}?", "response": "Answer {0}."}}\n'


class Sensor:
    """Ticks of `raw_data_sensor`, a minute apart, each in a process that may have been restarted in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cursor: str | None = None
        self.now = time.time()
        monkeypatch.setattr(raw_data.time, "time", lambda: self.now)

    def tick(self) -> dg.SensorResult:
        self.now += 60
        context = dg.build_sensor_context(dg.DagsterInstance.ephemeral(), self.cursor)
        result = raw_data_sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        return result

    def starts(self, ticks: int = 3) -> list[str]:
        """Keys of the runs that so many ticks ask for."""
        return [str(request.run_key) for _ in range(ticks) for request in self.tick().run_requests or []]

    def says(self) -> str:
        """What stands beside a tick that starts nothing."""
        result = self.tick()
        assert not result.run_requests
        reason = result.skip_reason
        return reason if isinstance(reason, str) else str(reason and reason.skip_message)


@pytest.fixture
def sensor(monkeypatch: pytest.MonkeyPatch) -> Sensor:
    return Sensor(monkeypatch)


@pytest.fixture
def inbox(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project.root / "inbox"
    folder.mkdir()
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(folder))
    return folder


def rows(*numbers: int) -> str:
    return "".join(map(ROW.format, numbers))


def test_each_version_starts_once(inbox: Path, sensor: Sensor) -> None:
    assert sensor.starts() == []
    (inbox / "a.jsonl").write_text(rows(1, 2))
    (first,) = sensor.starts()
    (inbox / "b.jsonl").write_text(rows(3))
    (second,) = sensor.starts()
    (inbox / "b.jsonl").unlink()
    (third,) = sensor.starts()
    assert [key.partition("-")[0] for key in (first, second, third)] == ["1", "2", "3"]
    assert first.partition("-")[2] == third.partition("-")[2] != second.partition("-")[2]
    assert sensor.starts() == []


def test_same_rows_start_nothing(inbox: Path, sensor: Sensor) -> None:
    (inbox / "a.jsonl").write_text(rows(1, 2))
    assert len(sensor.starts()) == 1
    (inbox / "a.jsonl").write_text(rows(1, 2))
    assert sensor.starts() == []
    (inbox / "a.jsonl").rename(inbox / "renamed.jsonl")
    assert sensor.starts() == []


def test_changed_bytes_behind_the_same_size_and_time_are_new(inbox: Path, sensor: Sensor) -> None:
    file = inbox / "a.jsonl"
    file.write_text(rows(1, 2))
    assert len(sensor.starts()) == 1
    status = file.stat()
    file.write_text(rows(1, 3))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert len(sensor.starts()) == 1


def test_half_of_a_copy_is_not_seen(inbox: Path, sensor: Sensor) -> None:
    (inbox / "a.jsonl").write_text(rows(1))
    assert len(sensor.starts()) == 1
    (inbox / ".b.jsonl").write_text(rows(2)[:10])
    assert sensor.starts() == []
    (inbox / ".b.jsonl").rename(inbox / "b.jsonl")
    assert len(sensor.starts()) == 1


def test_what_is_wrong_with_the_source_stands_in_the_tick(
    inbox: Path, sensor: Sensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(inbox) in sensor.says()
    monkeypatch.setenv("FINETUNE_RAW_DATA", "./gone.jsonl")
    assert "gone.jsonl" in sensor.says()
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(inbox))
    (inbox / "a.jsonl").write_text(rows(1))
    assert len(sensor.starts()) == 1, "it goes on once the source is there"


def test_broken_settings_stand_in_the_tick(project: TestProject, inbox: Path, sensor: Sensor) -> None:
    (project.configs / "raw_data.yaml").write_text("source: sample\narrivals: {quiet_secnds: 3}\n")
    said = sensor.says()
    assert "raw_data.yaml" in said
    assert "arrivals.quiet_secnds" in said


def test_threshold_of_a_check_is_a_version_of_its_own(project: TestProject, inbox: Path, sensor: Sensor) -> None:
    """The checks are to be made again."""
    (inbox / "a.jsonl").write_text(rows(1))
    assert len(sensor.starts()) == 1
    raw = project.configs / "raw_data.yaml"
    raw.write_text(raw.read_text() + "\nchecks: {max_duplicate_share: 0.5}\n")
    assert len(sensor.starts()) == 1


def test_drip_fed_rows_wait_for_more(project: TestProject, inbox: Path, sensor: Sensor) -> None:
    raw = project.configs / "raw_data.yaml"
    raw.write_text(raw.read_text() + "\narrivals: {min_new_rows: 3, max_wait_seconds: 100000}\n")
    (inbox / "a.jsonl").write_text(rows(1))
    assert len(sensor.starts()) == 1
    (inbox / "b.jsonl").write_text(rows(2, 3))
    assert sensor.starts() == []
    assert {"+2", "3)"} <= set(sensor.says().split(";")[0].split())
    (inbox / "c.jsonl").write_text(rows(4))
    assert len(sensor.starts()) == 1


def test_restart_forgets_nothing(inbox: Path, sensor: Sensor) -> None:
    (inbox / "a.jsonl").write_text(rows(1))
    assert len(sensor.starts()) == 1
    assert json.loads(sensor.cursor or "")["started"] == 1
    from finetune_assets.sources import local

    local._known_content.cache_clear()
    local._known_rows.cache_clear()
    assert sensor.starts() == []


@pytest.mark.parametrize("server", tiered(["moto", "ceph"], system={"ceph"}))
def test_prefix_of_a_bucket(
    server: str,
    project: TestProject,
    sensor: Sensor,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """New objects, the same bytes uploaded in another way, and no server; on the real one a wrong secret too."""
    bucket: Bucket = request.getfixturevalue(server)
    source = f"s3://{bucket.name}/in/coming"
    monkeypatch.setenv("FINETUNE_RAW_DATA", source)

    def put(name: str, text: str) -> None:
        bucket.client.put_object(Bucket=bucket.name, Key=name, Body=text.encode())

    assert source in sensor.says()
    put("in/coming/a.jsonl", rows(1, 2))
    put("in/other/b.jsonl", rows(3))
    put("in/coming/.hidden.jsonl", rows(4))
    put("in/coming/readme.txt", "no rows")
    (first,) = sensor.starts()
    put("in/coming/a.jsonl", rows(1, 2))
    client, etag = bucket.client, lambda: bucket.client.head_object(Bucket=bucket.name, Key="in/coming/a.jsonl")["ETag"]
    before = etag()
    upload = client.create_multipart_upload(Bucket=bucket.name, Key="in/coming/a.jsonl")["UploadId"]
    same = {"Bucket": bucket.name, "Key": "in/coming/a.jsonl", "UploadId": upload}
    part = client.upload_part(**same, PartNumber=1, Body=rows(1, 2).encode())
    client.complete_multipart_upload(**same, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    assert etag() != before
    assert sensor.starts() == [], "another ETag, the same bytes"
    put("in/coming/b.jsonl", rows(3))
    (second,) = sensor.starts()
    assert first != second
    put("in/coming/c.jsonl", rows(4))
    if server == "ceph":  # moto takes any secret
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-wrong-secret")
        said = sensor.says()
        assert source in said
        assert "planted-wrong-secret" not in said
        assert ceph_server.SECRET_KEY not in said
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ceph_server.SECRET_KEY)
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert source in sensor.says()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    assert len(sensor.starts()) == 1, "it goes on once the server is there"


@pytest.fixture
def two_sources(project: TestProject) -> tuple[Path, Path]:
    folders = project.root / "one", project.root / "two"
    for folder in folders:
        folder.mkdir()
        (folder / "a.jsonl").write_text(rows(1, 2))
    (project.configs / "raw_data.yaml").write_text("sources: {one: {source: ./one}, two: {source: ./two}}\n")
    return folders


def test_each_source_starts_its_own_versions(two_sources: tuple[Path, Path], sensor: Sensor) -> None:
    assert len(sensor.starts()) == 1, "both are new"
    for number, folder in enumerate(two_sources):
        (folder / "b.jsonl").write_text(rows(10 + number))
        assert len(sensor.starts()) == 1
    (two_sources[1] / "b.jsonl").unlink()
    assert len(sensor.starts()) == 1
    (two_sources[0] / "a.jsonl").touch()
    assert sensor.starts() == []


def test_a_source_that_is_away_stops_no_other(two_sources: tuple[Path, Path], sensor: Sensor) -> None:
    assert len(sensor.starts()) == 1
    one, two = two_sources
    two.rename(two.with_name("away"))
    assert sensor.starts() == []
    assert "two: not read" in sensor.says()
    (one / "b.jsonl").write_text(rows(3))
    assert len(sensor.starts()) == 1
    two.with_name("away").rename(two)
    assert sensor.starts() == [], "the same rows as before"


def test_a_second_source_is_added(project: TestProject, inbox: Path, sensor: Sensor) -> None:
    (inbox / "a.jsonl").write_text(rows(1, 2))
    assert len(sensor.starts()) == 1
    os.environ.pop("FINETUNE_RAW_DATA")
    (project.configs / "raw_data.yaml").write_text(
        "sources: {one: {source: ./inbox}, two: {source: ./inbox/a.jsonl}}\n"
    )
    assert len(sensor.starts()) == 1
    assert sensor.starts() == []


def test_sources_that_are_added_removed_or_moved_are_read_again(
    project: TestProject, two_sources: tuple[Path, Path], sensor: Sensor
) -> None:
    """Each time under a key of its own: Dagster never runs a key twice."""
    settings = project.configs / "raw_data.yaml"
    keys = sensor.starts()
    both = settings.read_text()
    for text in ("sources: {one: {source: ./one}}", both, "source: ./one", both):
        settings.write_text(text)
        started = sensor.starts(4)
        assert len(started) == 1, text
        keys += started
    (project.root / "one").rename(project.root / "moved")
    settings.write_text(both.replace("./one", "./moved"))
    keys += sensor.starts(4)
    assert len(keys) == len({*keys}) == 6
