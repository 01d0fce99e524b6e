"""Jobs on a real Slurm of two machines, with the store on a real S3 server that they reach over their network."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import proxy as proxy_server
from servers import slurm as slurm_server
from servers.s3 import Bucket
from servers.slurm import Slurm

from finetune_assets.launch.job import JobFailed, JobSpec
from finetune_assets.launch.slurm import SlurmLauncher
from finetune_assets.store.artifacts import open_store

Make = Callable[..., JobSpec]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := slurm_server.missing():
        pytest.skip(f"{missing} is not there (Debian: slurm-wlm munge iproute2)")
    with slurm_server.running(tmp_path_factory.mktemp("slurm"), jobs=6) as running:
        yield running


@pytest.fixture(autouse=True)
def _on_the_cluster(cluster: Slurm, ceph: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with proxy_server.running(ceph.endpoint, cluster.controller) as forwarder:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", forwarder.url)
        monkeypatch.setenv("FINETUNE_STORE", ceph.url)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield
        assert cluster.jobs() == []
        assert [key for key in ceph.listed() if "/jobs/" in key] == []


def left(cluster: Slurm) -> list[str]:
    """Processes of jobs that are still there."""
    found = []
    for node in cluster.nodes:
        for pid in cluster.processes_of(node):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "slurmd" not in command.split(" ")[0]:
                found.append(command)
    return found


@pytest.mark.parametrize("nodes", [(1, 1), (2, 2), (1, 2)])
def test_job_ends_in_an_artifact(job: Make, tmp_path: Path, cluster: Slurm, nodes: tuple[int, int]) -> None:
    ref = SlurmLauncher().run(job("good", "2", nodes), {})
    store = open_store(os.environ["FINETUNE_STORE"], "me", tmp_path / "elsewhere")
    assert store.find("adapters", "f1") == ref
    assert (store.fetch(ref) / "x.txt").read_text() == "HELLO"
    assert left(cluster) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("user_error", "rank: 0 is wrong"),
        ("one_rank", "rank one is ill"),
        ("import_error", "no_such_module"),
        ("exit", "last words"),
    ],
)
def test_failure_is_told_in_the_workers_own_words(job: Make, cluster: Slurm, body: str, words: str) -> None:
    with pytest.raises(JobFailed, match=words):
        SlurmLauncher().run(job(body, "1", (2, 2)), {})
    assert left(cluster) == []
