"""New data under a daemon as it runs in production: PostgreSQL, what runs print in S3, the store in S3."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.daemon import Daemon, processes_of, running
from integration.test_daemon import QUICK, drop, inbox, rows
from paths import ROOT
from projects import TestProject
from servers import postgres as postgres_server
from servers.postgres import Postgres
from servers.s3 import Bucket

__all__ = ["inbox", "rows"]
LONGER = QUICK.replace("max_steps: 2", "max_steps: 120, save_steps: 10, logging_steps: 10")


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    if missing := postgres_server.missing():
        pytest.skip(f"{missing} is not installed (Debian: postgresql)")
    with postgres_server.running(tmp_path / "postgres") as server:
        yield server


@pytest.fixture
def production(project: TestProject, postgres: Postgres, ceph: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The project with deploy/dagster.yaml."""
    (project.root / "dagster_home" / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())
    for name, value in {**postgres.environment, "FINETUNE_LOGS_BUCKET": ceph.name, "FINETUNE_STORE": ceph.url}.items():
        monkeypatch.setenv(name, value)
    return ceph


@pytest.mark.real_data
def test_two_runs_and_a_daemon_that_is_killed_lose_nothing(
    project: TestProject, production: Bucket, inbox: Path, rows: list[str]
) -> None:
    for number, name in enumerate(("one", "two")):
        project.write_experiment(name, LONGER + f"lora: {{rank: {number + 2}}}\n")
    drop(inbox, "a.jsonl", rows[:100])
    with running(project) as daemon:
        daemon.wait_for("a training", lambda: processes_of(project, "torch.distributed.run"))
        daemon.wait_for("two runs at once", lambda: len(unfinished(daemon)) == 2)
        daemon.kill()
    # running() has ended everything of that daemon's session, its code server and runs included
    assert not processes_of(project, "dagster")
    with running(project) as daemon:
        daemon.wait_for("two evaluations", lambda: len(daemon.made("adapter_evaluation")) == 2, 420)
        daemon.wait_for("no run", daemon.quiet)
        assert {record.partition_key for record in daemon.made("lora_adapter")} == {"one", "two"}
        drop(inbox, "b.jsonl", rows[100:150])
        daemon.wait_for("two more", lambda: len(daemon.made("adapter_evaluation")) == 4, 420)
    keys = production.listed()
    assert len([key for key in keys if "/adapters/" in key and key.endswith("manifest.json")]) == 4
    assert any(key.startswith("dagster-logs/") for key in keys)
    assert not [key for key in keys if "/checkpoints/" in key]


def unfinished(daemon: Daemon) -> list[object]:
    return [record for record in daemon.runs() if not record.dagster_run.is_finished]
